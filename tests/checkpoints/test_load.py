"""From what a user names to a model: directories, Hub ids, random weights."""

import re
import shutil

import huggingface_hub.constants as hub
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from small_model import SMALL, write_checkpoint

from nanovllm_jax.checkpoints.load import HUB_FILES, TINY_MODEL, UNUSED_HUB_FILES, find_checkpoint, load_model
from nanovllm_jax.models.parameters import parameters_of
from nanovllm_jax.parallel.sharding import make_mesh


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The folder of an empty Hub cache, with the network switched off as HF_HUB_OFFLINE=1 does."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_directory(tmp_path, monkeypatch):
    (tmp_path / "Qwen").mkdir()
    directory = write_checkpoint(tmp_path / "Qwen" / "Qwen3-0.6B")
    assert find_checkpoint(directory) == find_checkpoint(str(directory)) == directory
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("Qwen/Qwen3-0.6B").resolve() == directory, "a directory goes before a Hub id"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/Qwen/Qwen3-0.6B/") == directory


def snapshot_of(name, hub):
    """Where a repository's files go, laid out as huggingface_hub keeps its downloads."""
    repo, commit = hub / f"models--some--{name}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def test_a_hub_id_that_is_cached(offline_hub):
    snapshot = snapshot_of("model", offline_hub)
    shutil.copytree(TINY_MODEL, snapshot)
    assert find_checkpoint("some/model") == snapshot


def test_a_hub_id_of_an_adapter(offline_hub):
    snapshot = snapshot_of("adapter", offline_hub)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    for model in ("some/adapter", snapshot):
        with pytest.raises(ValueError, match=f"{snapshot} is an adapter: merge it into its base model"):
            find_checkpoint(model)


def test_what_is_downloaded():
    """What the model is loaded from, and not what training left beside it."""
    ours = ["config.json", "model-00001-of-00002.safetensors", "merges.txt", "additional_chat_templates/tools.jinja"]
    others = ["checkpoint-500/model.safetensors", "onnx/config.json", "consolidated.safetensors", "pytorch_model.bin"]
    kept = filter_repo_objects(ours + others, allow_patterns=HUB_FILES, ignore_patterns=UNUSED_HUB_FILES)
    assert list(kept) == ours


def test_a_hub_id_offline_and_not_cached(offline_hub):
    message = r"'some/model' is not a local directory.*Hub or its local cache.*Offline, pass the directory"
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        find_checkpoint("some/model")


BAD_MODELS = [
    ("Qwen3-0.6B", ValueError, "'Qwen3-0.6B' is neither a directory nor a Hub id of the form 'organisation/name'"),
    ("/no/such/directory", ValueError, "'/no/such/directory' is neither a directory nor a Hub id"),
    ("~no-such-user/model", ValueError, "'~no-such-user/model' is neither a directory nor a Hub id"),
    ("", ValueError, "model '' is neither a directory nor a Hub id"),
    ("x" * 5000, ValueError, "is neither a directory nor a Hub id"),
    ("a/b/c", ValueError, "'a/b/c' is neither a directory nor a Hub id"),
    ("some/model ", ValueError, "'some/model ' is neither a directory nor a Hub id"),
    (None, TypeError, "model must be a directory or a Hub id, not None"),
    (3, TypeError, "model must be a directory or a Hub id, not 3"),
]


@pytest.mark.parametrize(("model", "error", "message"), BAD_MODELS)
def test_what_is_no_model(model, error, message):
    with pytest.raises(error, match=message):
        find_checkpoint(model)


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is no checkpoint: it has no config.json"):
        find_checkpoint(tmp_path)


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"model.safetensors' is neither a directory nor a Hub id"):
        find_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_need_no_files(tmp_path, dtype):
    def arrays(seed):
        options = dict(dtype=jnp.dtype(dtype), mesh=make_mesh(1), load_format="dummy", seed=seed)
        return {path: param[...] for path, param in parameters_of(load_model(tmp_path, SMALL, **options)).items()}

    first, again, other = arrays(0), arrays(0), arrays(1)
    assert {array.dtype for array in first.values()} == {jnp.dtype(dtype)}
    for path, array in first.items():
        values = np.asarray(array, np.float32)
        np.testing.assert_array_equal(array, again[path])
        if "norm" in str(path):
            assert (values == 1).all()
        else:
            assert values.std() == pytest.approx(0.02, rel=0.1)
            assert (array != other[path]).any()
    assert (first["layers", 0, "mlp", "down_proj", "weight"] != first["layers", 1, "mlp", "down_proj", "weight"]).any()
