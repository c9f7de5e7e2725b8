"""Pallas kernels: the logit from which on a row is sampled (top-k, top-p, min-p), without sorting the vocabulary.

Floats as their bits, with those below zero turned round, are integers of the same order. So a threshold is found by a
search over integers, a few bits a pass, that counts entries or adds up their probabilities. Nearly always some 20
groups of entries hold all that matters, and a pass over them is short. Only a row whose probability mass lies in most
of its groups is read whole in each pass.

Shapes: R rows, V vocabulary, C groups, P pivots of a pass, N entries of a tile.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from . import vocabulary
from .common import SMS, exp2_of_line, pallas_call
from .sampling import CUTS, asks_threshold, inverse_temperature, settings
from .vocabulary import GROUP, as_two_rows, for_each_tile, grouped, groups_of


class Tiles(NamedTuple):
    """How the work is cut: the pass for the groups' maxima; entries to a tile, bits to a pass, warps of the search."""

    maxima: vocabulary.Tiles
    block: int
    bits: int
    num_warps: int


def default_tiles(rows: int, vocab: int) -> Tiles:
    """Settings for an H200: programs of half the size where all do not run at a time otherwise."""
    warps = 16 if rows <= SMS else 8
    return Tiles(vocabulary.default_tiles(rows, vocab), block=128 * warps, bits=3, num_warps=warps)


def _maxima_kernel(x_ref, sampling_ref, maxima_ref, *, tiles: vocabulary.Tiles):
    """Each group's largest entry, in rows that ask."""
    row, program, vocab = pl.program_id(0), pl.program_id(1), x_ref.shape[1]

    @pl.when(asks_threshold(*settings(sampling_ref, CUTS, row), vocab))
    def _():
        def take_in(tile):
            groups, entries = grouped(tile, tiles.block)
            x = plgpu.load(x_ref.at[row, entries], mask=entries < vocab, other=-jnp.inf)
            plgpu.store(maxima_ref.at[row, groups], x.max(axis=1), mask=groups < maxima_ref.shape[1])

        for_each_tile(program, vocab, tiles, take_in)


def _key(x):
    """An int32 that rises with the float32 x."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key):
    """The float32 of a key; 0 in place of a denormal, which some compare as 0 and some do not."""
    x = lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
    return jnp.where(jnp.abs(x) < jnp.finfo(jnp.float32).tiny, 0, x)


def _search(measure, goal, low, high, *, bits: int):
    """The largest key in [low, high) from which on entries measure the goal at least; low if there is none.

    measure(values [P]) -> [P]: how much the entries from each value on come to. Keys without an entry between them are
    as good as each other, so the search is over when a measure meets the goal. It takes 32 / bits passes at most.
    """

    def narrow(state):
        low, high, _ = state
        step = lax.shift_right_logical(high - low - 1, bits) + 1  # the difference may overflow: it is unsigned
        measured = measure(_value(low + step * jnp.arange(2**bits)))
        reached = (measured >= goal).astype(jnp.int32).sum()
        low = low + step * jnp.maximum(reached - 1, 0)
        return low, jnp.minimum(high, low + step), (measured == goal).astype(jnp.int32).sum()

    def searching(state):
        low, high, met = state
        return (low + 1 < high) & (met == 0)

    return lax.while_loop(searching, narrow, (low, high, jnp.int32(0)))[0]


def _threshold_kernel(*refs, width: int, block: int, bits: int, compiled: bool):
    x_ref, sampling_ref, maxima_ref, threshold_ref, chosen_ref = refs
    row, (vocab, groups) = pl.program_id(0), (x_ref.shape[1], maxima_ref.shape[1])
    temperature, top_k, top_p, min_p = settings(sampling_ref, CUTS, row)
    search = partial(_search, bits=bits)

    def find():
        group = jnp.arange(width)
        maxima = plgpu.load(maxima_ref.at[row, group], mask=group < groups, other=-jnp.inf)
        top = maxima.max()
        slope, end = inverse_temperature(temperature), _key(top) + 1

        def weight(x):
            return exp2_of_line(x - top, slope, jnp.float32(0), fused=compiled)

        def one(x):
            return jnp.ones_like(x)

        def above(x, values, weight):
            """[P, N]: the weights of the entries x from each value on."""
            return jnp.where(x[None] >= values[:, None], weight(x)[None], 0)

        def measure_maxima(values, weight):
            return above(maxima, values, weight).sum(axis=1)

        def choose(low):
            """List the groups that have entries from the key low on; returns how many they are."""
            chosen = (maxima >= _value(low)) & (group < groups)
            number = jnp.cumsum(chosen.astype(jnp.int32))
            at = jnp.where(chosen, number - 1, width)  # when interpreted, a masked store must not meet another one
            barrier()
            plgpu.store(chosen_ref.at[row, at], group, mask=chosen)
            barrier()
            return number.max()

        def barrier():
            """The program's threads write the list and read what others wrote."""
            if compiled:
                plgpu.debug_barrier()

        def measure(values, weight, count):
            """Over the listed groups, `count` of them."""

            def load(i):
                at = i * block + jnp.arange(block)
                listed = at // GROUP < count
                entry = plgpu.load(chosen_ref.at[row, at // GROUP], mask=listed, other=0) * GROUP + at % GROUP
                # NaN is in no sum: it is not from any value on.
                return plgpu.load(x_ref.at[row, entry], mask=listed & (entry < vocab), other=jnp.nan)

            def take_in(i, state):
                total, x = state
                following = load(i + 1)  # on its way while this tile is worked on
                return total + above(x, values, weight), following

            start = jnp.zeros((values.size, block), jnp.float32), load(0)
            return lax.fori_loop(0, pl.cdiv(count * GROUP, block), take_in, start)[0].sum(axis=1)

        def by_count(low):
            # The k-th largest maximum is an entry that has k - 1 before it at least.
            goal = top_k.astype(jnp.float32)
            low = search(partial(measure_maxima, weight=one), goal, low, end)
            return search(partial(measure, weight=one, count=choose(low)), goal, low, end)

        def by_mass(low):
            goal = top_p * measure(_value(low + jnp.zeros(1, jnp.int32)), weight, choose(low)).sum()
            low = search(partial(measure_maxima, weight=weight), goal, low, end)
            return search(partial(measure, weight=weight, count=choose(low)), goal, low, end)

        low = _key(top + temperature * jnp.log(min_p))
        low = lax.cond((top_k > 0) & (top_k < vocab), by_count, lambda low: low, low)
        low = lax.cond(top_p < 1, by_mass, lambda low: low, low)
        return _value(low)

    asks = asks_threshold(temperature, top_k, top_p, min_p, vocab)
    threshold_ref[row] = lax.cond(asks, find, lambda: jnp.minimum(temperature, -jnp.inf))  # a literal is not lowered


def sampling_threshold(
    logits: jax.Array,
    sampling: jax.Array,
    *,
    fixed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """nanovllm_jax.kernels.sampling_threshold as two kernels."""
    rows, vocab = logits.shape
    if fixed and rows == 1:
        return as_two_rows(partial(sampling_threshold, fixed=True, tiles=tiles, interpret=interpret), logits, sampling)
    tiles = tiles or default_tiles(1 if fixed else rows, vocab)
    groups = groups_of(vocab)
    [maxima] = pallas_call(
        _maxima_kernel,
        *(logits, sampling),
        grid=(rows, tiles.maxima.programs),
        out_shape=[jax.ShapeDtypeStruct((rows, groups), jnp.float32)],
        num_warps=tiles.maxima.num_warps,
        interpret=interpret,
        tiles=tiles.maxima,
    )
    threshold, _ = pallas_call(
        _threshold_kernel,
        *(logits, sampling, maxima),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows, groups), jnp.int32)],
        num_warps=tiles.num_warps,
        interpret=interpret,
        width=pl.next_power_of_2(groups),
        block=tiles.block,
        bits=tiles.bits,
        compiled=not interpret,
    )
    return threshold
