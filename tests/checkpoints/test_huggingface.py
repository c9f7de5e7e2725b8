"""Safetensors checkpoints: read to the right place and dtype, refused by name, written as transformers reads them."""

import json
import tracemalloc
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_checkpoint import SHAPES, write_random_checkpoint
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from small_model import SMALL, random_tensors, write_checkpoint

from nanovllm_jax.checkpoints import huggingface
from nanovllm_jax.checkpoints.huggingface import CheckpointFiles, save_pretrained
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.checkpoints.orbax import save_weights
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.parameters import checked_weights, parameter_targets, parameters_of
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.sharding import make_mesh

BIASED = replace(SMALL, attention_bias=True, tie_word_embeddings=True)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(directory, dtype=jnp.float32):
    return load_model(directory, ModelConfig.from_pretrained(directory), dtype=dtype, mesh=make_mesh(1))


def arrays_of(model):
    return {path: np.asarray(param[...]) for path, param in parameters_of(model).items()}


def assert_equal(found, expected):
    """Two models have the same parameters, bit for bit."""
    found, expected = arrays_of(found), arrays_of(expected)
    assert found.keys() == expected.keys()
    for path in expected:
        assert found[path].dtype == expected[path].dtype, path
        np.testing.assert_array_equal(found[path], expected[path], err_msg=str(path))


def write_sharded(directory):
    """The small checkpoint, its tensors dealt out to three files with an index."""
    write_checkpoint(directory)
    tensors, weight_map = load_file(directory / MODEL), {}
    (directory / MODEL).unlink()
    for i in range(3):
        names, file = sorted(tensors)[i::3], f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def change_tensors(directory, changes):
    """Replace tensors of a checkpoint of one file; None removes one."""
    tensors = load_file(directory / MODEL) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / MODEL)


# --- what is read ---


@pytest.mark.parametrize("config", [SMALL, BIASED], ids=["untied", "tied_biased"])
def test_fused_parameters_are_the_originals(tmp_path, config):
    """Each head of qkv_proj and each half of gate_up_proj is what the checkpoint has for it."""
    tensors = random_tensors(config)
    found, h = arrays_of(load(write_checkpoint(tmp_path, config, tensors))), config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    np.testing.assert_array_equal(found["embed_tokens", "weight"], tensors["model.embed_tokens.weight"])
    assert (("lm_head", "weight") in found) == (not config.tie_word_embeddings)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            qkv = found["layers", i, "self_attn", "qkv_proj", kind]
            q, k, v = (tensors[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv")
            for head in range(config.num_attention_heads):
                np.testing.assert_array_equal(qkv[head // group, head % group], q[head * h : (head + 1) * h])
            for head in range(config.num_key_value_heads):
                np.testing.assert_array_equal(qkv[head, group], k[head * h : (head + 1) * h])
                np.testing.assert_array_equal(qkv[head, group + 1], v[head * h : (head + 1) * h])
        gate_up = found["layers", i, "mlp", "gate_up_proj", "weight"]
        np.testing.assert_array_equal(gate_up[0], tensors[f"{layer}.mlp.gate_proj.weight"])
        np.testing.assert_array_equal(gate_up[1], tensors[f"{layer}.mlp.up_proj.weight"])


def test_a_sharded_checkpoint_is_the_single_file(tmp_path):
    assert_equal(load(write_sharded(tmp_path / "sharded")), load(write_checkpoint(tmp_path / "single")))


def test_transformers_own_shards(tmp_path):
    for name, size in ("single", "50GB"), ("sharded", "60KB"):
        write_random_checkpoint(tmp_path / name, max_shard_size=size, **SHAPES["group5_bias"])
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert_equal(load(tmp_path / "sharded"), load(tmp_path / "single"))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_dtypes(tmp_path, stored, wanted):
    tensors = {name: tensor.astype(jnp.dtype(stored)) for name, tensor in random_tensors(SMALL).items()}
    found = arrays_of(load(write_checkpoint(tmp_path, tensors=tensors), jnp.dtype(wanted)))
    assert {array.dtype for array in found.values()} == {jnp.dtype(wanted)}
    for path, name in ((("norm", "weight"), "model.norm.weight"), (("lm_head", "weight"), "lm_head.weight")):
        np.testing.assert_array_equal(found[path], tensors[name].astype(jnp.dtype(wanted)))


def test_what_tied_models_carry_along_is_ignored(tmp_path):
    """A copy of the head, and the rotary frequencies that old versions saved."""
    write_checkpoint(tmp_path, BIASED)
    expected = load(tmp_path)
    head = load_file(tmp_path / MODEL)["model.embed_tokens.weight"]
    for dtype in (np.float32, np.float64):
        extra = {"lm_head.weight": head.astype(dtype), "model.rotary_emb.inv_freq": np.ones(8, np.float32)}
        change_tensors(tmp_path, extra)
        assert_equal(load(tmp_path), expected)


@pytest.mark.parametrize("change", ["a number", "shape", "dtype"])
def test_a_head_of_its_own_in_a_tied_model(tmp_path, monkeypatch, change):
    """transformers 5 does not tie such a model, and 4 does: one of them would give another model's answers."""
    monkeypatch.setattr(huggingface, "ROWS_COMPARED", 100)
    write_checkpoint(tmp_path, BIASED)
    head = load_file(tmp_path / MODEL)["model.embed_tokens.weight"].copy()
    if change == "a number":
        head[-1, -1] += 1
    head = {"a number": head, "shape": head[:-1], "dtype": head.astype(np.float16)}[change]
    change_tensors(tmp_path, {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from .*tie_word_embeddings=true .*: set that"):
        load(tmp_path)


def test_a_single_file_goes_before_a_stale_index(tmp_path):
    """As in transformers: saving one file over an old sharded checkpoint leaves its index."""
    write_sharded(tmp_path)
    new = random_tensors(SMALL, seed=1)
    save_file(new, tmp_path / MODEL)
    np.testing.assert_array_equal(arrays_of(load(tmp_path))["norm", "weight"], new["model.norm.weight"])


def test_no_second_copy_in_host_memory(tmp_path):
    """Beside the mapped file and the parameters' own places, only a few parameters at a time are in memory."""
    config = replace(SMALL, hidden_size=256, intermediate_size=512, num_hidden_layers=28, head_dim=32)
    write_checkpoint(tmp_path, config)
    size = (tmp_path / MODEL).stat().st_size
    assert size > 60e6
    model = nnx.eval_shape(lambda: Qwen3ForCausalLM(config, rngs=nnx.Rngs(0)))
    targets = parameter_targets(model, make_mesh(1))
    tracemalloc.start()
    try:
        parameters = CheckpointFiles(tmp_path).load(config, targets)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(array.nbytes for array in parameters.values()) == 4 * config.num_parameters
    assert peak - left < size / 3


# --- what is refused ---


def truncate(directory, name=MODEL, share=2):
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // share])


BAD_SINGLE = {
    "no weights": (lambda d: (d / MODEL).unlink(), f"holds neither {MODEL} nor {INDEX}"),
    "truncated": (truncate, f"{MODEL} is missing, truncated or corrupt"),
    "empty": (lambda d: (d / MODEL).write_bytes(b""), f"{MODEL} is missing, truncated or corrupt"),
    "corrupt": (lambda d: (d / MODEL).write_bytes(b"\xff" * 4096), f"{MODEL} is missing, truncated or corrupt"),
    "no safetensors": (lambda d: (d / MODEL).write_text("version https://git-lfs"), "corrupt: .* git-lfs"),
    "missing tensor": (
        lambda d: change_tensors(d, {"model.layers.1.mlp.up_proj.weight": None}),
        "model.layers.1.mlp.up_proj.weight is missing",
    ),
    "unexpected tensor": (
        lambda d: change_tensors(d, {"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}),
        "model.layers.2.mlp.up_proj.weight is unexpected",
    ),
    "untied without a head": (lambda d: change_tensors(d, {"lm_head.weight": None}), "lm_head.weight is missing"),
    "wrong shape": (
        lambda d: change_tensors(d, {"model.norm.weight": np.ones((48, 1), np.float32)}),
        r"model.norm.weight has shape \(48, 1\), config.json asks for \(48,\)",
    ),
    "integers": (
        lambda d: change_tensors(d, {"model.norm.weight": np.ones(48, np.int8)}),
        "model.norm.weight is stored as I8, not as one of BF16, F16, F32, F64",
    ),
}


def other_weights(name):
    return lambda d: (d / MODEL).rename(d / name)


def without_model(directory):
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(directory / MODEL).items()}
    save_file(tensors, directory / MODEL)


BAD_SINGLE |= {
    "PyTorch's weights": (other_weights("pytorch_model.bin"), "nor .*, but pytorch_model.bin: load it with transform"),
    "another name": (other_weights("model.fp16.safetensors"), "nor .*, but model.fp16.safetensors: load it with"),
    "parts": (other_weights("model-00001-of-00002.safetensors"), "nor .*, but .*: the index of such parts is missing"),
    "other names": (without_model, "model.norm.weight is missing; .*; embed_tokens.weight is unexpected; .* more$"),
}


@pytest.mark.parametrize("case", BAD_SINGLE)
def test_bad_checkpoint(tmp_path, case):
    spoil, message = BAD_SINGLE[case]
    spoil(write_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    write_checkpoint(tmp_path)
    monkeypatch.setattr(type(tmp_path), "open", refuse)  # as root one may read anything
    with pytest.raises(ValueError, match=f"cannot read {tmp_path / MODEL}: Permission denied"):
        CheckpointFiles(tmp_path)


SECOND = "model-00002-of-00003.safetensors"
BAD_SHARDED = {
    "missing shard": (lambda d: (d / SECOND).unlink(), f"{SECOND} is missing, truncated or corrupt"),
    "truncated shard": (lambda d: truncate(d, SECOND), f"{SECOND} is missing, truncated or corrupt"),
    "index no JSON": (lambda d: (d / INDEX).write_text("{"), f"{INDEX} is not valid JSON"),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), "weight_map must map tensor names to file names"),
    "map of another kind": (lambda d: write_index(d, ["a"]), "weight_map must map tensor names to file names"),
    "map to numbers": (lambda d: write_index(d, {"a": 1}), "weight_map must map tensor names to file names"),
    "outside the directory": (
        lambda d: write_index(d, {"a": "../secret.safetensors"}),
        "'../secret.safetensors' is not the name of a safetensors file in the same directory",
    ),
    "absolute path": (lambda d: write_index(d, {"a": "/etc/passwd"}), "'/etc/passwd' is not the name"),
    "another kind of file": (lambda d: write_index(d, {"a": "config.json"}), "'config.json' is not the name"),
    "shards left out": (
        lambda d: write_index(d, {"model.norm.weight": SECOND}),
        "lm_head.weight is missing; .* is missing and 9 more$",
    ),
}


@pytest.mark.parametrize("case", BAD_SHARDED)
def test_bad_sharded_checkpoint(tmp_path, case):
    spoil, message = BAD_SHARDED[case]
    spoil(write_sharded(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- what is written ---


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_what_is_saved(checkpoint, tmp_path, shape):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    directory, reference = checkpoint(shape)
    model = load(directory)
    save_pretrained(model, tmp_path)
    assert ModelConfig.from_pretrained(tmp_path) == model.config
    assert_equal(load(tmp_path), model)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, reference(tokens).logits)


def test_saving_in_another_dtype(tmp_path):
    model = load(write_checkpoint(tmp_path / "float32"))
    save_pretrained(model, tmp_path / "bfloat16", dtype=jnp.dtype("bfloat16"))
    assert ModelConfig.from_pretrained(tmp_path / "bfloat16") == replace(SMALL, dtype="bfloat16")
    assert (tmp_path / "bfloat16" / MODEL).stat().st_size < 0.6 * (tmp_path / "float32" / MODEL).stat().st_size
    for path, array in arrays_of(load(tmp_path / "bfloat16")).items():
        np.testing.assert_array_equal(array, arrays_of(model)[path].astype(jnp.bfloat16).astype(np.float32))


def test_parts_that_are_there_make_room(tmp_path):
    """Readers that look at the index first, as vLLM, would go on with the old weights."""
    write_sharded(tmp_path)
    (tmp_path / "model-card.txt").write_text("")
    model = load(write_checkpoint(tmp_path / "other", tensors=random_tensors(SMALL, seed=1)))
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model-card.txt", MODEL]
    assert_equal(load(tmp_path), model)


@pytest.mark.parametrize("save", [save_pretrained, save_weights])
def test_what_is_no_model_is_not_saved(tmp_path, save):
    model = load(write_checkpoint(tmp_path / "model"))
    with pytest.raises(TypeError, match="weights must be a Qwen3ForCausalLM, not <class 'dict'>"):
        save(parameters_of(model), tmp_path / "saved")
    with pytest.raises(TypeError, match=r"of an nnx.State make one by nnx.merge\(graph, state\)"):
        save(nnx.state(model), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("dtype", [*map(jnp.dtype, [np.int8, bool, jnp.float8_e4m3fn, np.float64]), "auto", object()])
def test_what_no_checkpoint_is_saved_in(tmp_path, dtype):
    model = load(write_checkpoint(tmp_path))
    before = (tmp_path / MODEL).read_bytes()
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, not"):
        save_pretrained(model, tmp_path, dtype=dtype)
    assert (tmp_path / MODEL).read_bytes() == before


def test_copies_of_a_kv_head_that_were_trained_apart(tmp_path):
    """Only one of them would be left."""
    config = replace(SMALL, kv_copies=2)
    paths, target = (write_checkpoint(tmp_path / "model"), SMALL), tmp_path / "saved"
    model = load_model(paths[0], config, dtype=np.dtype("float32"), mesh=make_mesh(1))
    save_pretrained(model, target)
    assert_equal(load(target), load(paths[0]))
    before = (target / MODEL).read_bytes()
    weight = model.layers[1].self_attn.qkv_proj.weight
    weight[...] = weight[...].at[3, -1, 0, 0].add(1)  # the second copy of a value head
    with pytest.raises(
        ValueError, match=r"1\.self_attn\.k_proj\.weight: the 2 copies of a kv head differ, as they were trained apart"
    ):
        save_pretrained(model, target)
    assert (target / MODEL).read_bytes() == before
    with pytest.raises(ValueError, match=r"1\.self_attn\.qkv_proj\.weight: the 2 copies of a kv head differ"):
        checked_weights(model, SMALL, parameter_targets(load(target), make_mesh(1)))


def test_who_may_read_what_is_saved(tmp_path):
    save_pretrained(load(write_checkpoint(tmp_path / "model")), tmp_path / "saved")
    assert (tmp_path / "saved" / MODEL).stat().st_mode == (tmp_path / "saved" / "config.json").stat().st_mode


def test_a_full_disk(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("No space left on device")

    model = load(write_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(OSError, match=f"saved/{MODEL} cannot be written: No space left on device"):
        save_pretrained(model, tmp_path / "saved")


def test_orbax_weights_would_be_loaded_in_place_of_what_is_saved(tmp_path):
    model = load(write_checkpoint(tmp_path / "model"))
    (tmp_path / "other" / "orbax").mkdir(parents=True)
    with pytest.raises(ValueError, match="other holds Orbax weights, which would be loaded in place of these"):
        save_pretrained(model, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["orbax"]
