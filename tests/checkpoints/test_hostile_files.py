"""Configs that were written to do harm: refused by name, and nothing is computed or reserved for them first."""

import json
import os
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hostile import attempt, changed, fuzz, open_checkpoint, rewritten, scalars, shapes_of, spoiled, values
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_model import SMALL, write_checkpoint

from nanovllm_jax.checkpoints.generation_config import FIELDS as SAMPLING
from nanovllm_jax.checkpoints.generation_config import default_sampling_params
from nanovllm_jax.checkpoints.huggingface import CheckpointFiles
from nanovllm_jax.checkpoints.tokenizer import stop_token_ids
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.layers.rope import inverse_frequencies

CONFIG, GENERATION = "config.json", "generation_config.json"


FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_bias", "torch_dtype", "dtype", "architectures", "model_type", "hidden_act", "use_sliding_window"),
    *("rope_theta", "rope_scaling", "rope_parameters", "quantization_config"),
    *("num_labels", "id2label", "layer_types", "auto_map", "tokenizer_class", "_name_or_path"),  # not ours
]
ROPE_FIELDS = [
    *("factor", "rope_theta", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "type"),
]
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "yarn"]) | scalars},
    optional=dict.fromkeys(ROPE_FIELDS, st.floats(0, 100) | scalars),
)


def read_config(directory):
    """The config, and what is computed from it alone, if it fits the weights."""
    config = ModelConfig.from_pretrained(directory)
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    CheckpointFiles(directory).check(config)
    return config, [*frequencies, config.rope.scale]


@settings(fuzz, max_examples=500)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), values | ropes, min_size=1, max_size=3))
@example({"architectures": {"Qwen3ForCausalLM": 1}})
@example({"architectures": None, "model_type": []})
@example({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1}})
@example({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308}})
@example({"rope_parameters": {"rope_type": "linear", "factor": 1e300}})
@example({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096.5}})
@example({"rope_theta": 10**400})
@example({"max_position_embeddings": 1})
@example({"tie_word_embeddings": True})
def test_config(directory, changes):
    """Refused with the name of a field, or as good as the one that fits the weights."""
    with changed(directory / CONFIG, **changes):
        result, refusal = attempt(read_config, directory)
    if refusal:
        words = [*changes, "dtype", "rope", "this engine runs Qwen3", "has shape", "is missing"]
        assert CONFIG in refusal
        assert any(word in refusal for word in words), refusal
    else:
        config, computed = result
        assert np.isfinite(computed).all()
        assert 2 <= config.max_context <= 2**24
        assert shapes_of(config).items() <= shapes_of(SMALL).items()  # a tied model leaves the head in the file


@fuzz
@given(data=st.data(), name=st.sampled_from([CONFIG, GENERATION]))
def test_text_that_is_hardly_json(directory, data, name):
    path = directory / name
    with rewritten(path, data.draw(spoiled(path.read_bytes()))):
        _, refusal = attempt(ModelConfig.from_pretrained, directory)
        assert refusal is None or CONFIG in refusal
        tokens, refusal = attempt(stop_token_ids, directory)
        assert GENERATION in refusal if refusal else all(type(token) is int for token in tokens)


@fuzz
@given(listed=values | st.lists(values))
def test_stop_tokens(directory, listed):
    with changed(directory / GENERATION, eos_token_id=listed):
        tokens, refusal = attempt(stop_token_ids, directory)
    if refusal:
        assert f"{directory / GENERATION}: eos_token_id" in refusal
    else:
        assert tokens == (set() if listed is None else set(listed) if isinstance(listed, list) else {listed})


@fuzz
@given(sampling=st.dictionaries(st.sampled_from([*SAMPLING, "do_sample"]), values, min_size=1, max_size=3))
def test_recommended_sampling(directory, sampling):
    with changed(directory / GENERATION, **sampling):
        _, refusal = attempt(default_sampling_params, directory)
    assert refusal is None or any(f"{directory / GENERATION}: {name}=" in refusal for name in sampling)


def test_a_key_that_occurs_twice(directory):
    """Readers differ in which of the two they take, so one could be shown and the other be used."""
    with (
        rewritten(directory / CONFIG, b'{"model_type": "llama", "model_type": "qwen3"}'),
        pytest.raises(ValueError, match=r"config\.json is not valid JSON: the key 'model_type' occurs twice"),
    ):
        ModelConfig.from_pretrained(directory)


# --- what would take the process with it, if it went wrong ---


def link_to_itself(directory):
    (directory / GENERATION).unlink()
    (directory / GENERATION).symlink_to(GENERATION)


def replace_by_a_pipe(name, directory):
    (directory / name).unlink()
    os.mkfifo(directory / name)


def change(name, **changes):
    def make(directory):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


config, tokenizer, pipe = (
    partial(change, CONFIG),
    partial(change, "tokenizer_config.json"),
    partial(partial, replace_by_a_pipe),
)

ABSURD = {  # what is done to a good checkpoint, how it is loaded, and what the refusal says, or None where it is fine
    "layers": (config(num_hidden_layers=10**12), "auto", "num_hidden_layers must be an integer from 1 to 1024"),
    "many layers": (config(num_hidden_layers=1024), "auto", "model.layers.2.*is missing"),
    "vocabulary": (config(vocab_size=10**15), "auto", "vocab_size must be an integer from 1 to 16777216"),
    "large vocabulary": (config(vocab_size=2**24), "auto", r"config.json asks for \(16777216, 48\)"),
    "large head": (config(head_dim=2**24), "auto", "config.json asks for"),
    "random layers": (config(num_hidden_layers=10**12), "dummy", "num_hidden_layers must be an integer"),
    "random weights": (config(vocab_size=2**24, hidden_size=2**24), "dummy", "GiB of random weights, more than this"),
    "labels that the model has not": (config(num_labels=10**12), "auto", None),
    "tokens of another class": (tokenizer(tokenizer_class="T5Tokenizer", extra_ids=10**12), "auto", "tokenizer_class="),
    "token without end": (tokenizer(added_tokens_decoder={str(10**12): {"content": "a"}}), "auto", None),
    "weights from a pipe": (pipe("model.safetensors"), "auto", "holds neither"),
    "config from a pipe": (pipe(CONFIG), "auto", "it has no config.json"),
    "tokenizer from a pipe": (pipe("tokenizer.json"), "auto", "has no tokenizer.json"),
    "a link to itself": (link_to_itself, "auto", None),
}


def open_absurd_checkpoints(root):
    """For a process of its own, which may take only a little more memory than it has."""
    open_checkpoint(write_checkpoint(root / "good"))  # imports and compiles what there is
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case, (spoil, load_format, message) in ABSURD.items():
        print(case, flush=True)
        directory = write_checkpoint(root / case)
        spoil(directory)
        _, refusal = attempt(open_checkpoint, directory, load_format)
        assert (refusal is None) == (message is None), refusal
        assert refusal is None or re.search(message, refusal), refusal
        assert refusal is None or str(directory) in refusal or CONFIG in refusal, refusal


def test_absurd_requests_cost_nothing(tmp_path):
    """Neither time nor memory; seen from outside, since a process that hangs or is killed reports nothing."""
    code = f"import pathlib, test_hostile_files as t; t.open_absurd_checkpoints(pathlib.Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = dict(capture_output=True, text=True, timeout=120, check=False, env=environment)
    child = subprocess.run([sys.executable, "-c", code], **options)
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.split("\n")[:-1] == list(ABSURD)
