"""Pallas kernel: a list of what decode attention's programs do: contexts, parts of them, what several read together.

A single program makes it, with vectors of all sequences: XLA's dozen small kernels take longer.
Shapes: B sequences, W blocks in a block table's row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import log2, pallas_call, spread

SHORT = 16  # tiles: what is read together is not cut into smaller parts
UNUSED, WHOLE, PART, SHARED = range(4)
MANY = 2**30
COMPARED = 4096  # entries of the block tables at a time, with those of the rows before


class Work(NamedTuple):
    """What each program does. A context has one item (also an empty one, whose result is zeros) or several parts.

    In brackets what there is only where sequences read together, of which at most R do.
    """

    items: jax.Array
    """[I, 4 or 6] int32: sequence, first tile of keys, last one + 1, and what it is: UNUSED, WHOLE or PART. (Or SHARED,
    with the first of the sequences; then how many these are, 1 of any other; and where the partial result goes, those
    of several one after another, where else it goes to the item's own number.)
    """
    cut: jax.Array
    """[C, 3 or 6] int32: each cut sequence (B for an unused row), its first partial result, how many it has of its own.
    (Then the first of those that it shares, which are R apart; how many; and how many sequences are cut.)
    """


def list_work(
    tables: jax.Array,
    context_lens: jax.Array,
    *,
    block_size: int,
    block_k: int,
    extra: int,
    most: int,
    interpret: bool = False,
) -> tuple[Work, int]:
    """Cut contexts [B] into items of about one size, whole tiles of block_k keys each; and how many results these have.

    At most B + extra items, and of a sequence no more than `extra`. Where up to `most` (a power of two) may read
    together what their tables [B, W] have in common, that is cut once, as a context of its own, and there may be B / 2
    items more. An item that is not WHOLE leaves a partial result for each that it is for: there is to be room for as
    many as is returned.
    """
    batch = len(context_lens)
    if most == 1:
        shapes = (batch + extra, 4), (min(batch, extra), 3)
    else:  # the last two are what the kernel's threads tell one another
        shapes = (batch + batch // 2 + extra, 6), (batch, 6), (batch,), (batch + 2,)
    items, cut, *_ = pallas_call(
        _work_kernel,
        *(tables, context_lens),
        grid=(1,),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        num_warps=4 if batch <= 128 else 8,
        interpret=interpret,
        block_size=block_size,
        block_k=block_k,
        extra=extra,
        most=most,
        on_gpu=not interpret,
    )
    return Work(items, cut), len(items) + (most - 1) * (batch // 2 + extra)


def _work_kernel(
    table_ref, context_ref, items_ref, cut_ref, *scratch_refs, block_size, block_k, extra, most, on_gpu: bool
):
    batch = context_ref.shape[0]
    row = _numbers(batch)
    live = row < batch
    context = plgpu.load(context_ref.at[row], mask=live, other=0)
    leader, members, start = row, jnp.ones_like(row), jnp.zeros_like(row)
    if most > 1:
        sizes = {"block_size": block_size, "block_k": block_k, "most": most, "on_gpu": on_gpu}
        leader, members, start = _shared_tiles(table_ref, context_ref, *scratch_refs, row, context, **sizes)
    leads, end = live & (leader == row), pl.cdiv(context, block_k)
    together, alone = jnp.where(leads, start, 0), end - start

    share = jnp.maximum(pl.cdiv(together.sum() + alone.sum(), extra), 1)  # most tiles to an item: `extra` cuts at most
    # Of what is read together they are shorter, as the others are short, where all are B + B / 2 + extra nonetheless.
    spare = jnp.maximum(batch // 2 - (together > 0).astype(jnp.int32).sum(), 1)
    shorter = jnp.maximum(pl.cdiv(together.sum(), spare), SHORT)
    others, size = _equal_parts(start, jnp.minimum(share, shorter), 0, extra - 1)
    own, own_size = _equal_parts(alone, share, jnp.where(live, 1, 0), extra - others)
    is_cut = own + others > 1

    # What is shared comes first, for it is the longest.
    leading = jnp.where(leads, others, 0)
    num_shared = leading.sum()
    first, own_first = jnp.cumsum(leading) - others, num_shared + jnp.cumsum(own) - own
    more_places = num_shared * (most - 1)  # for shared items have several results

    def list_shared(i, _):
        last = jnp.minimum((i + 1) * size, start)
        _put(items_ref, first + i, leads & (i < others), row, i * size, last, SHARED, members, (first + i) * most)

    def list_own(i, _):
        at = start + i * own_size
        item = row, at, jnp.minimum(at + own_size, end), jnp.where(is_cut, PART, WHOLE), 1, own_first + i + more_places
        _put(items_ref, own_first + i, i < own, *item)

    lax.fori_loop(0, leading.max(), list_shared, None)
    lax.fori_loop(0, own.max(), list_own, None)
    _fill(items_ref, num_shared + own.sum(), 0, 0, 0, UNUSED, 1, 0)
    cuts = jnp.cumsum(is_cut.astype(jnp.int32))
    results = own_first + more_places, own, first * most + row - leader, others
    num_cuts = cuts.max()
    _put(cut_ref, cuts - 1, is_cut, row, *results, num_cuts)
    _fill(cut_ref, num_cuts, batch, 0, 0, 0, 0, num_cuts)


def _shared_tiles(table_ref, context_ref, common_ref, start_ref, row, context, *, block_size, block_k, most, on_gpu):
    """Of each sequence, with neighbours of which at most so many read together: the first of those that it reads with,
    which is itself where it reads alone; how many they are; and how many tiles they read together.

    These are of blocks that their tables share. None is the newest token's block: it may be written by the kernel that
    reads it.
    """
    batch = context_ref.shape[0]
    live = row < batch
    before = plgpu.load(context_ref.at[row - 1], mask=live & (row > 0), other=0)
    alike = _alike(table_ref, row, jnp.maximum(jnp.minimum(context, before) - 1, 0) >> log2(block_size))
    common = alike * block_size >> log2(block_k)  # of each with the one before it, in tiles

    def load(ref, at, mask=live, other=0):
        return plgpu.load(ref.at[at], mask=mask, other=other)

    def wait():
        if on_gpu:  # a program's threads are to see what others of them have stored
            plgpu.debug_barrier()

    _store_where(live, common_ref, (row,), common)
    wait()
    # One that has much more in common with a neighbour than these two have reads with that neighbour.
    neighbours = jnp.maximum(load(common_ref, row - 1, live & (row > 0)), load(common_ref, row + 1, row + 1 < batch))
    begins = live & ((common == 0) | (2 * common < neighbours))
    family = jnp.cumsum(begins.astype(jnp.int32))
    _store_where(begins, start_ref, (family,), row)
    _store_where(row == batch - 1, start_ref, (family + 1,), jnp.full_like(row, batch))
    wait()
    leader = row - ((row - load(start_ref, family)) & (most - 1))
    members = jnp.minimum(load(start_ref, family + 1) - leader, most)
    others = [load(common_ref, leader + i, live & (i < members), MANY) for i in range(1, most)]
    tiles = functools.reduce(jnp.minimum, others)
    return leader, members, jnp.where(live & (members > 1), tiles, 0)


def _alike(table_ref, row, most) -> jax.Array:
    """How many leading blocks each sequence has in common with the one before it, of at most so many."""
    columns = max(1, min(pl.next_power_of_2(table_ref.shape[1]), COMPARED // len(row)))
    shape = len(row), columns

    def still(state):
        i, alike = state
        return ((alike == i * columns) & (alike < most)).astype(jnp.int32).max() > 0

    def compare(state):
        i, alike = state
        column = i * columns + lax.broadcasted_iota(jnp.int32, shape, 1)
        line, known = spread(row, shape), column < spread(most, shape)
        one, other = (plgpu.load(table_ref.at[line - back, column], mask=known, other=0) for back in (0, 1))
        first = jnp.where(known & (one == other), (i + 1) * columns, column).min(axis=1)  # where they differ
        return i + 1, jnp.where(alike == i * columns, jnp.minimum(first, most), alike)

    return lax.while_loop(still, compare, (jnp.int32(0), jnp.zeros_like(row)))[1]


def _equal_parts(tiles, share, least, most) -> tuple[jax.Array, jax.Array]:
    """Into how many parts of at most `share` tiles, or else `most` parts, and how large each is but for the last."""
    parts = jnp.clip(pl.cdiv(tiles, share), least, most)
    size = jnp.maximum(pl.cdiv(tiles, jnp.maximum(parts, 1)), 1)
    return jnp.maximum(pl.cdiv(tiles, size), least), size


def _numbers(size: int) -> jax.Array:
    """0, 1, ... for so many at least: as many as Triton has vectors of."""
    return jnp.arange(max(16, pl.next_power_of_2(size)), dtype=jnp.int32)


def _store_where(mask, ref, at, values) -> None:
    """values at these places of ref, an array of indices a dimension, where mask."""
    # Interpreted, what is not to be stored is stored as it was, and must not be where something else is.
    first = jnp.where(mask, at[0], ref.shape[0])
    plgpu.store(ref.at[first, *at[1:]], values, mask=mask)


def _put(ref, at, mask, *columns) -> None:
    """Lines `at` of ref, where mask, with as many of the columns as it has."""
    shape = len(at), pl.next_power_of_2(ref.shape[1])
    number, values = lax.broadcasted_iota(jnp.int32, shape, 1), jnp.zeros(shape, jnp.int32)
    for i, column in zip(range(ref.shape[1]), columns):
        column = jnp.broadcast_to(jnp.asarray(column, jnp.int32), at.shape)
        values = jnp.where(number == i, spread(column, shape), values)
    _store_where(spread(mask, shape) & (number < ref.shape[1]), ref, (spread(at, shape), number), values)


def _fill(ref, start, *columns) -> None:
    """All lines of ref from start on."""
    size = ref.shape[0]
    at = _numbers(size)
    _put(ref, at, (at >= start) & (at < size), *columns)
