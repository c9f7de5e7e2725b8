"""What a training loop needs beside the modules: log probabilities in little memory, and master weights.

The trainer runs the modules that the engine runs, with `causal_attention` in place of the paged cache:

    graph, master = nnx.split(model)                          # float32 weights, which the optimizer updates

    def loss(master, tokens, learned):
        model = nnx.merge(graph, cast(master, jnp.bfloat16))  # what the products see; gradients come back in float32
        return -jnp.sum(token_logprobs(model, tokens, remat=True) * learned) / jnp.sum(learned)

    gradients = jax.grad(loss)(master, tokens, learned)

Shapes: B sequences, T tokens of each, D hidden, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nanovllm_jax.layers.attention import causal_attention
from nanovllm_jax.models.qwen3 import Attend, Qwen3ForCausalLM, run_layer

HEAD_CHUNK = 1024
"""Positions whose logits exist at a time."""


def cast(weights: Any, dtype: jnp.dtype) -> Any:
    """A pytree of weights (an nnx.State or a module) in another dtype."""
    return jax.tree.map(lambda weight: weight.astype(dtype), weights)


def token_logprobs(
    model: Qwen3ForCausalLM,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    attend: Attend = causal_attention,
    *,
    remat: bool = False,
    chunk: int = HEAD_CHUNK,
) -> jax.Array:
    """The log probability of each token after those before it: [B, T] float32, 0 for a sequence's first.

    tokens [B, T] int32: sequences padded at their ends, where what comes back is of no meaning; positions [B, T] int32:
    by default 0, 1, ...; `attend`: causal over each whole row, unless told otherwise.

    `remat`: keep only the residual stream between layers for the backward pass, and compute each layer again: a third
    more arithmetic, and memory that hardly grows with the layers. The logits are made, and made again in the backward
    pass, `chunk` positions at a time: [B, T, V] never exists.

    Raises ValueError for tokens of another rank, for none, and for a chunk below 1. That they are in the vocabulary is
    not checked.
    """
    if tokens.ndim != 2 or not tokens.size or chunk < 1:
        raise ValueError(f"tokens must be [B, T], not {tokens.shape}, and chunk at least 1, not {chunk}")
    length = tokens.shape[-1]
    positions = jnp.arange(length) if positions is None else positions
    run = forgetful_layer if remat else run_layer
    hidden, _ = model(tokens, positions, None, attend, run)  # (B, T, D)
    logprobs = _logprobs_of(model, hidden[:, :-1], tokens[:, 1:], chunk)
    return jnp.pad(logprobs, ((0, 0), (1, 0)))


def forgetful_layer(number: int, layer, *args):
    """`run_layer` that keeps a layer's inputs alone, for the backward pass to compute it again."""
    return jax.checkpoint(lambda layer, *args: run_layer(number, layer, *args))(layer, *args)


def _logprobs_of(model: Qwen3ForCausalLM, hidden: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """Log probabilities of targets [...] predicted by hidden [..., D]."""
    rows, width = targets.size, hidden.shape[-1]
    chunk = max(1, min(chunk, rows))
    padded = -(-rows // chunk) * chunk
    hidden = jnp.pad(hidden.reshape(rows, width), ((0, padded - rows), (0, 0))).reshape(-1, chunk, width)
    wanted = jnp.pad(targets.reshape(rows), (0, padded - rows)).reshape(-1, chunk)

    @jax.checkpoint
    def part(hidden, wanted):
        logits = model.logits(hidden)  # (chunk, V)
        return jnp.take_along_axis(logits, wanted[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(lambda args: part(*args), (hidden, wanted)).reshape(padded)[:rows].reshape(targets.shape)
