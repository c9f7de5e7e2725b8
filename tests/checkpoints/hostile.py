"""What the tests of hostile files share: values of every kind, files rewritten for a while, refusals."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
from hypothesis import settings
from hypothesis import strategies as st

from nanovllm_jax.checkpoints.huggingface import parameter_sources
from nanovllm_jax.checkpoints.load import find_checkpoint, load_model
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer, stop_token_ids
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.parallel.sharding import make_mesh

# The same examples in every run. Each takes milliseconds, so that one which takes seconds is a hang.
fuzz = settings(derandomize=True, max_examples=200, deadline=10_000)

far = st.sampled_from([0, -1, 2**24 + 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**12, 10**15, 10**400])
numbers = st.one_of(far, st.integers(-4, 600), st.floats(), st.sampled_from([1e300, 1e-300, 5e-324]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def spoiled(draw, content):
    """Some text with a few bytes cut out and others put in."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 20)))
    return content[:start] + draw(st.binary(max_size=12)) + content[end:]


def open_checkpoint(directory, load_format="auto"):
    """What an engine does with a directory before it compiles."""
    config = ModelConfig.from_pretrained(find_checkpoint(directory))
    load_tokenizer(directory)
    stop_token_ids(directory)
    return load_model(directory, config, dtype=jnp.float32, mesh=make_mesh(1), load_format=load_format)


def shapes_of(config):
    """Of all tensors that a checkpoint of this config holds."""
    return {name: shape for source in parameter_sources(config).values() for name, shape in source.shapes.items()}


def attempt(function: Callable, *args) -> tuple[Any, str | None]:
    """(what the function returns, None), or (None, what its ValueError says). Any other exception is a failure."""
    try:
        return function(*args), None
    except ValueError as error:
        return None, str(error)


@contextmanager
def rewritten(path, content):
    """A file with another content, JSON or bytes, for a while."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def changed(path, **changes):
    """A JSON file with other settings for a while."""
    return rewritten(path, json.loads(path.read_text()) | changes)
