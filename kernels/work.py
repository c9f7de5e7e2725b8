"""What each program of decode attention does: contexts, parts of them, and what several sequences read together.

Shapes: B sequences, W blocks in a block table's row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .common import search

SHORT = 16  # tiles: what is read together is not cut into smaller parts
UNUSED, WHOLE, PART, SHARED = range(4)


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
    tables: jax.Array, context_lens: jax.Array, block_size: int, block_k: int, extra: int, most: int
) -> tuple[Work, int]:
    """What there is to do where at most so many sequences read together, and room for how many partial results."""
    if most == 1:
        work = cut_contexts(context_lens, block_k, extra)
        return work, len(work.items)
    shared = shared_tiles(tables, context_lens, block_size, block_k, most)
    work = cut_together(context_lens, shared, block_k, extra, most)
    return work, len(work.items) + (most - 1) * (len(context_lens) // 2 + extra)


def cut_contexts(context_lens: jax.Array, block_k: int, extra: int) -> Work:
    """Cut the contexts [B] into at most B + extra items of about one size, whole tiles of block_k keys each."""
    batch = len(context_lens)
    tiles = (context_lens + block_k - 1) // block_k
    share = jnp.maximum((tiles.sum() + extra - 1) // extra, 1)  # most tiles to an item: at most `extra` cuts
    parts = jnp.maximum((tiles + share - 1) // share, 1)
    size = jnp.maximum((tiles + parts - 1) // parts, 1)  # a context's parts are equal, but for the last
    parts = jnp.maximum((tiles + size - 1) // size, 1)
    ends, cuts = jnp.cumsum(parts), jnp.cumsum(parts > 1)
    item = jnp.arange(batch + extra)
    owner = search(ends, item)
    used, owner = owner < batch, jnp.minimum(owner, batch - 1)
    first = (item - (ends - parts)[owner]) * size[owner]
    last = jnp.minimum(first + size[owner], tiles[owner])
    kind = jnp.where(used, jnp.where(parts[owner] > 1, PART, WHOLE), UNUSED)
    cut = search(cuts, jnp.arange(min(batch, extra)))
    at = jnp.minimum(cut, batch - 1)
    return Work(
        jnp.stack((owner, first, last, kind), axis=1).astype(jnp.int32),
        jnp.stack((cut, (ends - parts)[at], parts[at]), axis=1).astype(jnp.int32),
    )


class Shared(NamedTuple):
    """Which sequences read their first tiles of keys together: each [B] int32."""

    leader: jax.Array
    """The first of the neighbours that it reads with, which reads for them too; itself, where it reads alone."""
    members: jax.Array
    """How many a leader reads for, itself included; of others 1."""
    tiles: jax.Array
    """How many tiles are read together."""


def shared_tiles(tables: jax.Array, context_lens: jax.Array, block_size: int, block_k: int, most: int) -> Shared:
    """Of sequences next to one another, at most so many together, the tiles of the blocks that their tables share.

    None of these is the newest token's block: it may be written by the kernel that reads it.
    """
    batch, width = tables.shape
    row = jnp.arange(batch)
    full = jnp.maximum(context_lens - 1, 0) // block_size
    alike = jnp.where(tables[1:] != tables[:-1], jnp.arange(width), width).min(axis=1)  # leading blocks
    common = jnp.minimum(alike, jnp.minimum(full[1:], full[:-1])) * block_size // block_k
    common = jnp.pad(common, (1, most))  # of each with the one before it; the first and those after the last have none
    # One that has much more in common with a neighbour than these two have reads with that neighbour.
    more = jnp.maximum(jnp.pad(common, (1, 0))[:batch], common[1 : batch + 1])
    begins = (common[:batch] == 0) | (2 * common[:batch] < more)
    start = jnp.where((row[None] <= row[:, None]) & begins[None], row[None], 0).max(axis=1)
    leader = row - (row - start) % most
    later = jnp.pad(leader, (0, most), constant_values=-1)
    members, tiles = jnp.ones_like(row), jnp.full(batch, 2**30)
    for i in range(1, most):
        leads = later[i : i + batch] == row  # the i-th after it
        members += leads
        tiles = jnp.where(leads, jnp.minimum(tiles, common[i : i + batch]), tiles)
    tiles = jnp.where(members > 1, tiles, 0)
    return Shared(leader, members, tiles[leader])


def cut_together(context_lens: jax.Array, shared: Shared, block_k: int, extra: int, most: int) -> Work:
    """The same where at most so many sequences read together: that is cut once, as a context of its own.

    At most B + B / 2 + extra items, of B sequences that may be cut.
    """
    batch, (leader, members, start) = len(context_lens), shared
    row, end = jnp.arange(batch), (context_lens + block_k - 1) // block_k
    # First what is read together, as contexts of the leaders, for these are the longest; then what each reads alone.
    first = jnp.concatenate((jnp.zeros_like(row), start))
    tiles = jnp.concatenate((jnp.where(leader == row, start, 0), end - start))
    least = jnp.concatenate((jnp.zeros_like(row), jnp.ones_like(row)))
    share = jnp.maximum((tiles.sum() + extra - 1) // extra, 1)  # most tiles to an item: at most `extra` cuts
    # Of what is read together they are shorter, as the others are short, where all are B + B / 2 + extra nonetheless.
    spare = jnp.maximum(batch // 2 - (tiles[:batch] > 0).sum(), 1)
    shorter = jnp.maximum((tiles[:batch].sum() + spare - 1) // spare, SHORT)
    share = jnp.concatenate((jnp.broadcast_to(jnp.minimum(share, shorter), batch), jnp.broadcast_to(share, batch)))
    parts = jnp.maximum((tiles + share - 1) // share, least)
    together = jnp.minimum(parts[:batch], extra - 1)  # of one sequence no more than `extra` parts are combined
    parts = jnp.concatenate((together, jnp.minimum(parts[batch:], extra - together[leader])))
    size = jnp.maximum((tiles + parts - 1) // jnp.maximum(parts, 1), 1)  # a context's parts are equal, but for the last
    parts = jnp.maximum((tiles + size - 1) // size, least)
    ends = running_sum(parts)
    begins, num_shared = ends - parts, ends[batch - 1]  # each one's first item, and the first that is not shared
    own, others = parts[batch:], parts[:batch][leader]
    is_cut = own + others > 1

    item = jnp.arange(batch + batch // 2 + extra)
    owner = search(ends, item)
    used, owner = owner < 2 * batch, jnp.minimum(owner, 2 * batch - 1)
    is_own, sequence = owner >= batch, owner % batch
    at = first[owner] + (item - begins[owner]) * size[owner]
    last = jnp.minimum(at + size[owner], (first + tiles)[owner])
    kind = jnp.where(is_own, jnp.where(is_cut[sequence], PART, WHOLE), SHARED)
    own_place = num_shared * (most - 1)  # partial results of shared items before, beyond one each
    place = jnp.where(is_own, item + own_place, item * most)
    items = sequence, at, last, jnp.where(used, kind, UNUSED), jnp.where(is_own, 1, members[sequence]), place

    cuts = running_sum(is_cut)
    cut = search(cuts, row)
    which = jnp.minimum(cut, batch - 1)
    places = begins[batch:] + own_place, own, begins[:batch][leader] * most + row - leader, others
    cut = cut, *(column[which] for column in places), jnp.broadcast_to(cuts[-1], batch)
    return Work(*(jnp.stack(columns, axis=1).astype(jnp.int32) for columns in (items, cut)))


def running_sum(numbers: jax.Array) -> jax.Array:
    """jnp.cumsum of few numbers, by adding up all of them for each: one kernel in place of several."""
    row = jnp.arange(len(numbers))
    return jnp.where(row[None] <= row[:, None], numbers[None], 0).sum(axis=1)
