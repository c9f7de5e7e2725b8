"""Pallas kernels: log-probabilities of a token and of the most likely ones, without sorting the vocabulary.

The first kernel reads the rows once and leaves of each group its maximum, its sum of exponentials and how many of its
entries are above the token's. The second adds up, and takes the best entries one after another: each from the group
whose maximum is the largest, and that becomes the maximum of what the group has left.

Shapes: R rows, V vocabulary, C groups.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from . import vocabulary
from .common import pallas_call
from .sampling import MAX_LOGPROBS, settings
from .vocabulary import GROUP, as_two_rows, for_each_tile, grouped, groups_of

LOWEST = -3.4e38  # stands for minus infinity, which is the maximum of a group that has no entry left


class Tiles(NamedTuple):
    """How the work is cut: the pass over the rows, and the warps of a program that takes a row's best entries."""

    groups: vocabulary.Tiles
    num_warps: int


def default_tiles(rows: int, vocab: int) -> Tiles:
    """Settings for an H200."""
    return Tiles(vocabulary.default_tiles(rows, vocab), num_warps=4)


def _load(logits_ref, raw_ref, use_raw, row, at, vocab: int):
    """Entries of a row from where it is; minus infinity past the vocabulary alone."""
    live, raw = at < vocab, use_raw > 0
    x = plgpu.load(logits_ref.at[row, at], mask=live & ~raw, other=-jnp.inf)
    x = jnp.maximum(x, plgpu.load(raw_ref.at[row, at], mask=live & raw, other=-jnp.inf))
    return jnp.where(live, jnp.maximum(x, LOWEST), -jnp.inf)


def _groups_kernel(*refs, tiles: vocabulary.Tiles):
    logits_ref, raw_ref, sampling_ref, token_ref, maxima_ref, sums_ref, above_ref = refs
    row, program, (vocab, groups) = pl.program_id(0), pl.program_id(1), (logits_ref.shape[1], maxima_ref.shape[1])
    use_raw, num_top = settings(sampling_ref, ("adjusts", "num_top"), row)

    @pl.when(num_top >= 0)
    def _():
        own = _load(logits_ref, raw_ref, use_raw, row, token_ref[row], vocab)

        def take_in(tile):
            group, entries = grouped(tile, tiles.block)
            x = _load(logits_ref, raw_ref, use_raw, row, entries, vocab)
            largest = x.max(axis=1)
            live = group < groups
            plgpu.store(maxima_ref.at[row, group], largest, mask=live)
            plgpu.store(sums_ref.at[row, group], jnp.exp(x - largest[:, None]).sum(axis=1), mask=live)
            plgpu.store(above_ref.at[row, group], (x > own).astype(jnp.int32).sum(axis=1), mask=live)

        for_each_tile(program, vocab, tiles, take_in)


def _logprobs_kernel(*refs, width: int):
    logits_ref, raw_ref, sampling_ref, token_ref, maxima_ref, sums_ref, above_ref, out_ref = refs
    row, (vocab, groups) = pl.program_id(0), (logits_ref.shape[1], maxima_ref.shape[1])
    use_raw, num_top = settings(sampling_ref, ("adjusts", "num_top"), row)

    @pl.when(num_top >= 0)
    def _():
        group, lane = jnp.arange(width), jnp.arange(GROUP)
        live = group < groups
        maxima = plgpu.load(maxima_ref.at[row, group], mask=live, other=-jnp.inf)
        sums = plgpu.load(sums_ref.at[row, group], mask=live, other=0)
        above = plgpu.load(above_ref.at[row, group], mask=live, other=0)
        largest = maxima.max()
        log_sum = jnp.log((sums * jnp.exp(maxima - largest)).sum())

        def put(place, number, x):
            """At a place of the result a rank or an id, and the log probability of the logit x."""
            value = jnp.where(x > LOWEST, x - largest - log_sum, -jnp.inf)
            out_ref[row, 0, place] = number
            out_ref[row, 1, place] = lax.bitcast_convert_type(value, jnp.int32)

        put(0, above.sum() + 1, _load(logits_ref, raw_ref, use_raw, row, token_ref[row], vocab))

        def take_best(i, state):
            """Entries are in order of value, those of one value in order of id: what is left comes after the last."""
            maxima, last_value, last_id = state
            value = maxima.max()
            own = jnp.minimum(jnp.where(maxima == value, group, width).min(), groups - 1)
            at = own * GROUP + lane
            x = _load(logits_ref, raw_ref, use_raw, row, at, vocab)
            best = jnp.where((x == value) & ((value < last_value) | (at > last_id)), at, vocab).min()
            put(1 + i, best, value)
            left = jnp.where((x < value) | ((x == value) & (at > best)), x, -jnp.inf).max()
            return jnp.where(group == own, left, maxima), value, best

        start = maxima, jnp.float32(jnp.inf), jnp.int32(-1)
        lax.fori_loop(0, jnp.minimum(num_top, min(MAX_LOGPROBS, vocab)), take_best, start)


def token_logprobs(
    logits: jax.Array,
    raw: jax.Array,
    sampling: jax.Array,
    tokens: jax.Array,
    *,
    fixed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """nanovllm_jax.kernels.token_logprobs as two kernels."""
    (rows, vocab), args = logits.shape, (logits, raw, sampling, tokens)
    if fixed and rows == 1:
        return as_two_rows(partial(token_logprobs, fixed=True, tiles=tiles, interpret=interpret), *args)
    tiles, groups = tiles or default_tiles(1 if fixed else rows, vocab), groups_of(vocab)
    of_groups = pallas_call(
        _groups_kernel,
        *args,
        grid=(rows, tiles.groups.programs),
        out_shape=[jax.ShapeDtypeStruct((rows, groups), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)],
        num_warps=tiles.groups.num_warps,
        interpret=interpret,
        tiles=tiles.groups,
    )
    [numbers] = pallas_call(
        _logprobs_kernel,
        *(*args, *of_groups),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows, 2, 1 + MAX_LOGPROBS), jnp.int32)],
        num_warps=tiles.num_warps,
        interpret=interpret,
        width=pl.next_power_of_2(groups),
    )
    return numbers
