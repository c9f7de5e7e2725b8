"""Sampling where each device has the logits of its part of the vocabulary, with the results of a whole one.

The best entry takes a gather of a pair a device and row. What needs whole rows (top-k, top-p and min-p, and log
probabilities) is done in steps in which a row asks for it: devices exchange parts, so that each has some of the rows
whole, and never all. Where the model is whole, these are the kernels themselves.

R rows, V vocabulary, N devices; a device has logits [R, V / N].
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from nanovllm_jax.kernels import sampling_threshold, token_logprobs
from nanovllm_jax.kernels.reference_sampling import CUTS, asks_threshold, settings
from nanovllm_jax.parallel.sharding import MODEL_AXIS, first_of_shard, is_split


def best_of_shards(entries: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best of the devices' best entries: its number in the whole vocabulary [R] int32, and its score [R] float32.

    entries [R] int32: the numbers in the whole vocabulary of each device's best; scores [R] float32. Of equal scores
    the first device's wins, and NaN counts as the largest.
    """
    if not is_split():
        return entries, scores
    mine = jnp.stack((entries, lax.bitcast_convert_type(scores, jnp.int32)))  # one array, so that it is one gather
    numbers, scores = jnp.moveaxis(lax.all_gather(mine, MODEL_AXIS), 1, 0)  # (N, R) each
    scores = lax.bitcast_convert_type(scores, jnp.float32)
    winner = jnp.argmax(scores, axis=0)[None]
    return tuple(jnp.take_along_axis(x, winner, axis=0)[0] for x in (numbers, scores))


def threshold(logits: jax.Array, sampling: jax.Array, *, fixed: bool = False) -> jax.Array:
    """kernels.sampling_threshold, of logits [R, V / N]."""
    of_rows = partial(sampling_threshold, fixed=fixed)
    if not is_split():
        return of_rows(logits, sampling)
    asks = asks_threshold(*settings(sampling, CUTS), logits.shape[1] * lax.axis_size(MODEL_AXIS))
    return lax.cond(
        asks.any(),
        lambda: _by_rows(of_rows, logits, sampling),
        lambda: jnp.full(len(logits), -jnp.inf),
    )


def logprobs(
    logits: jax.Array, raw: jax.Array, sampling: jax.Array, tokens: jax.Array, *, fixed: bool = False
) -> jax.Array:
    """kernels.token_logprobs, of logits and raw [R, V / N]."""
    if not is_split():
        return token_logprobs(logits, raw, sampling, tokens, fixed=fixed)
    use_raw, num_top = settings(sampling, ("adjusts", "num_top"))

    def of_rows(rows, *args):
        return token_logprobs(rows, rows, *args, fixed=fixed)

    def compute():
        return _by_rows(of_rows, jnp.where(use_raw[:, None] > 0, raw, logits), sampling, tokens)

    shape = jax.eval_shape(of_rows, logits, sampling, tokens)
    return lax.cond((num_top >= 0).any(), compute, lambda: jnp.zeros_like(shape))


def _by_rows(function: Callable, logits: jax.Array, *args: jax.Array):
    """function(logits [R, V], *args [R, ...]), each device computing R / N of the rows; its result of all rows."""
    rows, devices = len(logits), lax.axis_size(MODEL_AXIS)
    share = -(-rows // devices)

    def padded(x):  # with zeros: what asks for nothing but -1 (num_top) costs little
        return jnp.pad(x, [(0, share * devices - rows)] + [(0, 0)] * (x.ndim - 1))

    whole = lax.all_to_all(padded(logits), MODEL_AXIS, split_axis=0, concat_axis=1, tiled=True)  # (R / N, V)
    mine = [lax.dynamic_slice_in_dim(padded(x), first_of_shard(share), share) for x in args]
    return lax.all_gather(function(whole, *mine), MODEL_AXIS, tiled=True)[:rows]
