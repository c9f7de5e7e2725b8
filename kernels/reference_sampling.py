"""The sampling kernels' oracles in plain jnp: same signatures, but for `fixed`. They are what a CPU runs.

A step in which no row asks skips all but the draw. Shapes: R rows, V vocabulary, S slots.
"""

import jax.numpy as jnp
from jax import lax
from jax.nn import log_softmax

from .sampling import (
    CUTS,
    MAX_LOGPROBS,
    PENALTIES,
    adjusted,
    asks_threshold,
    inverse_temperature,
    noise_bits,
    row_key,
    settings,
    uniform,
)


def adjust_logits(logits, sampling, slots, positions, token_counts, logit_bias):
    """See nanovllm_jax.kernels.adjust_logits."""
    asks, min_len, *penalties = settings(sampling, ("adjusts", "min_len", *PENALTIES))

    def adjust():
        columns = (x[:, None] for x in (positions < min_len, *penalties))
        new = adjusted(logits, token_counts[slots], logit_bias[slots], *columns)
        return jnp.where(asks[:, None] > 0, new, logits)

    return lax.cond((asks > 0).any(), adjust, lambda: logits), logits


def noisy_argmax(logits, sampling, positions, threshold):
    """See nanovllm_jax.kernels.noisy_argmax."""
    # Written so that NaN stays: argmax finds it.
    logits = jnp.where(logits < threshold[:, None], -jnp.inf, logits)
    [temperature] = settings(sampling, ["temperature"])
    greedy = temperature[:, None] == 0
    entries = jnp.arange(logits.shape[1], dtype=jnp.uint32)
    scaled = logits / jnp.where(greedy, 1, temperature[:, None])
    scores = jnp.where(greedy, logits, scaled + gumbel(row_key(sampling, positions), entries))
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return best, jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]


def gumbel(key, entries):
    """Standard Gumbel noise [R, N] float32 of rows' keys, two words [R] each, and entries [N] of a vocabulary."""
    bits = noise_bits([word[:, None] for word in key], entries[None])
    return -jnp.log(-jnp.log1p(-uniform(bits)))


def sampling_threshold(logits, sampling):
    """See nanovllm_jax.kernels.sampling_threshold."""
    vocab = logits.shape[1]
    temperature, top_k, top_p, min_p = settings(sampling, CUTS)
    asks = asks_threshold(temperature, top_k, top_p, min_p, vocab)

    def find():
        x = -jnp.sort(-logits, axis=1)
        top = x[:, :1]
        floor = top + (temperature * jnp.log(min_p))[:, None]
        kth = jnp.take_along_axis(x, jnp.clip(top_k, 1, vocab)[:, None] - 1, axis=1)
        floor = jnp.where((top_k > 0)[:, None], jnp.maximum(floor, kth), floor)
        weight = jnp.exp2((x - top) * inverse_temperature(temperature)[:, None])
        mass = jnp.cumsum(jnp.where(x >= floor, weight, 0), axis=1)  # of an entry and those before it
        crossing = jnp.argmax(mass >= top_p[:, None] * mass[:, -1:], axis=1)
        nucleus = jnp.take_along_axis(x, crossing[:, None], axis=1)
        threshold = jnp.where((top_p < 1)[:, None], jnp.maximum(floor, nucleus), floor)
        return jnp.where(asks, threshold[:, 0], -jnp.inf)

    return lax.cond(asks.any(), find, lambda: jnp.full(len(logits), -jnp.inf))


def token_logprobs(logits, raw, sampling, tokens):
    """See nanovllm_jax.kernels.token_logprobs."""
    rows, vocab = logits.shape
    most = min(MAX_LOGPROBS, vocab)
    use_raw, num_top = settings(sampling, ("adjusts", "num_top"))

    def compute():
        x = jnp.where(use_raw[:, None] > 0, raw, logits)
        logprobs = lax.map(log_softmax, x)  # one by one: a sum's order must not depend on the other rows
        own = jnp.take_along_axis(x, tokens[:, None], axis=1)
        _, ids = lax.top_k(x, most)  # of equal ones the lower id first
        rank = 1 + (x > own).sum(axis=1, keepdims=True, dtype=jnp.int32)
        values = jnp.take_along_axis(logprobs, jnp.concatenate((tokens[:, None], ids), axis=1), axis=1)
        numbers = jnp.concatenate((rank, ids), axis=1), lax.bitcast_convert_type(values, jnp.int32)
        return jnp.pad(jnp.stack(numbers, axis=1), [(0, 0), (0, 0), (0, MAX_LOGPROBS - most)])

    return lax.cond((num_top >= 0).any(), compute, lambda: jnp.zeros((rows, 2, 1 + MAX_LOGPROBS), jnp.int32))
