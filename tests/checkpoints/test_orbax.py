"""Orbax checkpoints: bit-equal both ways, on any mesh, whole after a kill, and refused by name where they are bad."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import convert
import numpy as np
import pytest
from flax import nnx
from small_model import SMALL, random_tensors, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.checkpoints.huggingface import config_json
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.checkpoints.orbax import FOLDER, OrbaxWeights, save_weights, saved_weights
from nanovllm_jax.models.parameters import parameters_of, set_parameters, with_heads
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("programs_kept")
SCRIPT = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(convert.__file__).parent)]!r}
import jax
from test_orbax import *
"""


def in_process(code, *args, **environment):
    command = [sys.executable, "-c", SCRIPT + code, *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu", **environment})


def model_of(directory, config=SMALL, devices=1):
    return load_model(directory, config, dtype=np.dtype("float32"), mesh=make_mesh(devices))


def arrays_of(*args, **options):
    return {path: param[...] for path, param in parameters_of(model_of(*args, **options)).items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def saved(directory, tmp_path_factory):
    """The same as an Orbax checkpoint."""
    target = tmp_path_factory.mktemp("orbax") / "model"
    convert.convert(directory, target)
    return target


@pytest.fixture
def copy(saved, tmp_path):
    """One that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- there and back ---


def test_all_chat_templates_come_along(tmp_path):
    """Also those that transformers keeps in a folder, beside the default one."""
    source = write_checkpoint(tmp_path / "source")
    names = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    (source / "additional_chat_templates").mkdir()
    for name in names:
        (source / name).write_text(f"the template {name}")
    for _ in range(2):  # and once more over what is there
        convert.convert(source, tmp_path / "orbax")
        for name in names:
            assert (tmp_path / "orbax" / name).read_text() == f"the template {name}"


@pytest.mark.parametrize("shape", ["group2_tied", "group5_bias"])
def test_round_trip(checkpoint, tmp_path, shape):
    """Bit-equal tensors, and transformers opens the result and computes the same."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    source, model = checkpoint(shape)
    convert.convert(source, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])
    assert filecmp.cmp(source / "config.json", tmp_path / "back" / "config.json", shallow=False)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits
        np.testing.assert_array_equal(again.numpy(), model(tokens).logits.numpy())


def test_what_is_not_the_models_decides_no_dtype(tmp_path):
    """Tensors that checkpoints hold beside the model's are left out, in whatever type; others are named."""
    tensors = {name: array.astype("float16") for name, array in random_tensors(SMALL).items()}
    source = write_checkpoint(tmp_path / "source", tensors=tensors | {"a.rotary_emb.inv_freq": np.ones(8, "float64")})
    convert.convert(source, tmp_path / "orbax")
    assert {array.dtype for array in OrbaxWeights(tmp_path / "orbax").stored.values()} == {np.dtype("float16")}
    write_checkpoint(source, tensors=tensors | {"g_idx": np.ones(8, "int32")})
    with pytest.raises(ValueError, match=r"does not fit its config.json: g_idx is unexpected"):
        convert.convert(source, tmp_path / "more")


def test_the_engine_takes_either_form(directory, saved, caplog):
    """With tokenizer and all, and it says which it found."""
    params, texts = SamplingParams(temperature=0, max_tokens=8), []
    for path in (directory, saved):
        llm = small_llm(path)
        texts.append(llm.generate("What is 2 + 3?", params, use_tqdm=False)[0]["text"])
        assert llm.eos_token_ids == {511, llm.tokenizer.eos_token_id}  # the directory's and the tokenizer's own
    assert texts[0] == texts[1] != ""
    log = "\n".join(record.getMessage() for record in caplog.records)
    assert f"loaded {directory} (safetensors weights)" in log
    assert f"loaded {saved} (Orbax weights)" in log


def test_meshes(directory, tmp_path):
    """Saved from four devices, restored on one, two and four: each has its own part, and all together the same."""
    code = """
import logging
source, target = Path(sys.argv[1]), Path(sys.argv[2])
wanted = arrays_of(source)
save_weights(model_of(source, devices=4), target)
# absl, which Orbax logs by, gives the root logger a handler at each use: a program's basicConfig would do nothing then.
assert not logging.getLogger().handlers
for devices in (1, 2, 4):
    for path, array in arrays_of(target, devices=devices).items():
        np.testing.assert_array_equal(array, wanted[path])
        assert len(array.addressable_shards) == devices
        if array.ndim > 1:
            assert {shard.data.size * devices for shard in array.addressable_shards} == {array.size}, path
"""
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    process = in_process(code, directory, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert process.wait(300) == 0


def test_kv_heads_get_copies_where_devices_are_more(saved):
    """They are saved once, and loaded as engines with more devices than kv heads want them."""
    loaded = arrays_of(saved, replace(SMALL, kv_copies=2))
    for path, array in arrays_of(saved).items():
        expected = with_heads(array, 2 * SMALL.num_key_value_heads) if "qkv_proj" in path else array
        np.testing.assert_array_equal(loaded[path], expected)


# --- what goes wrong ---


def test_copies_of_kv_heads_are_not_saved(copy):
    """As an engine with more devices than kv heads has them: no config.json asks for them, and nothing is replaced."""
    model = Qwen3ForCausalLM(replace(SMALL, kv_copies=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="each kv head is there 2 times"):
        save_weights(model, copy)
    assert saved_weights(copy).name == "1"


def test_an_interrupted_save_leaves_the_old_checkpoint(directory, copy):
    """kill -9, when all but the last word of a save over it is written."""
    before = {path: np.array(array) for path, array in arrays_of(copy).items()}
    code = """
model = model_of(Path(sys.argv[1]))
set_parameters(model, {path: param[...] + 7 for path, param in parameters_of(model).items()})
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # a save's folder gets its name last
save_weights(model, sys.argv[1])
"""
    folder = copy / FOLDER
    assert in_process(code, copy).wait(300) == -signal.SIGKILL, "it was over before it was killed"
    assert len(list(folder.iterdir())) > 1, "it had not begun"
    assert saved_weights(copy).name == "1"
    for path, array in arrays_of(copy).items():
        np.testing.assert_array_equal(array, before[path])
    model = model_of(copy)
    set_parameters(model, {path: array + 1 for path, array in before.items()})
    (folder / ".DS_Store").touch()
    save_weights(model, copy)  # the next one is complete, and tidies up, but for what is no save
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", saved_weights(copy).name] != ["1"]
    for path, array in arrays_of(copy).items():
        np.testing.assert_array_equal(array, before[path] + 1)


def test_a_first_save_that_was_interrupted(copy):
    (copy / FOLDER / "1").rename(copy / FOLDER / "1.orbax-checkpoint-tmp")
    with pytest.raises(ValueError, match=r"copy/orbax holds no complete checkpoint"):
        arrays_of(copy)


@pytest.mark.parametrize("what", ["cut", "gone", "metadata"])
def test_a_corrupt_one_is_named(copy, what):
    path = copy / FOLDER / "1"
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    if what == "cut":
        largest.write_bytes(largest.read_bytes()[:1000])
    elif what == "gone":
        largest.unlink()
    else:
        (path / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"copy/orbax/1 is (corrupt|no Orbax checkpoint, or corrupt)"):
        arrays_of(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_hidden_layers=1), r"holds another model: \d+ weights, where config.json makes \d+"),
        (dict(num_attention_heads=4, head_dim=32, num_key_value_heads=2), "holds another model"),
    ],
)
def test_another_model(copy, change, message):
    config = replace(SMALL, **change)
    (copy / "config.json").write_text(json.dumps(config_json(config, "float32")))
    with pytest.raises(ValueError, match=message):
        arrays_of(copy, config)


def test_conversion_over_another_model(directory, saved, copy, tmp_path):
    (copy / "config.json").write_text(json.dumps(config_json(replace(SMALL, vocab_size=400), "float32")))
    with pytest.raises(ValueError, match=r"copy holds another model: its config.json is not that of"):
        convert.convert(directory, copy)
    with pytest.raises(ValueError, match=r"holds weights in the form of .* already"):
        convert.convert(saved, saved)


def test_a_conversion_runs_again(directory, copy):
    """Over itself: a new save in place of the old."""
    convert.convert(directory, copy)
    assert saved_weights(copy).name == "2"
    for (path, array), other in zip(arrays_of(copy).items(), arrays_of(directory).values(), strict=True):
        np.testing.assert_array_equal(array, other, str(path))
