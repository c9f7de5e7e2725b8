"""Mosaic GPU kernel: paged prefill attention on Hopper's tensor cores.

As in FlashAttention-3 (Shah et al. 2024): a tile is 128 query tokens of one head, 64 to each of two warpgroups, of
which one does its softmax while the other multiplies; a third loads what they need ahead of time. Each program goes
through its share of the tiles without a stop between them. Shapes as in prefill.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .common import LOG2E, NEG_INF, Paging, as_rows, prefill_tiles
from .hopper import COMPUTE, ROWS, SMS, SWIZZLED, hopper_call, in_roles, program, slot_of, warpgroup

MANY = 1024  # query tokens: with fewer it is no faster, and lowering takes a program half a second longer
TILE = COMPUTE * ROWS  # query tokens
BLOCK_K = 128  # keys that are loaded at a time
STAGES = 2  # and how many of these loads there is room for


def fits(q: jax.Array, kv_cache: jax.Array) -> bool:
    """Whether the kernel is for q [T, N, H]: many tokens of 16 bits and 128 numbers, blocks of whole tiles."""
    return q.shape[0] >= MANY and q.dtype.itemsize == 2 and q.shape[-1] == 128 and kv_cache.shape[4] % BLOCK_K == 0


class Barriers(NamedTuple):
    """What warpgroups wait for."""

    q_full: jax.Array
    k_full: jax.Array
    v_full: jax.Array
    q_free: jax.Array
    k_free: jax.Array
    v_free: jax.Array
    turn: jax.Array

    @classmethod
    def types(cls) -> "Barriers":
        """What to allocate."""

        def barriers(number, arrivals=1):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        full = barriers(COMPUTE), barriers(STAGES), barriers(STAGES)
        free = barriers(COMPUTE), barriers(STAGES, COMPUTE), barriers(STAGES, COMPUTE)
        return cls(*full, *free, turn=plgpu.Barrier(num_arrivals=COMPUTE))


class Memory(NamedTuple):
    """Shared memory: queries as they come and as tensor cores read them, keys, values, and what goes out."""

    q_raw: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array

    @classmethod
    def types(cls, head_dim: int, dtype: jnp.dtype) -> "Memory":
        """What to allocate: 224 KiB."""
        # Rows that begin anywhere in q and in the output cannot be copied from and to a swizzled array.
        own, keys = (COMPUTE, ROWS, head_dim), (STAGES, BLOCK_K, head_dim)
        swizzled = functools.partial(plgpu.SMEM, dtype=dtype, transforms=SWIZZLED)
        return cls(plgpu.SMEM(own, dtype), swizzled(own), swizzled(keys), swizzled(keys), plgpu.SMEM(own, dtype))


class Item(NamedTuple):
    """A tile of one head: a line of the tile table, and how many steps over keys it takes."""

    head: jax.Array
    sequence: jax.Array
    row0: jax.Array
    count: jax.Array
    position: jax.Array

    @property
    def end(self) -> jax.Array:
        """Keys from here on are beyond every query."""
        return jnp.maximum(self.position + self.count, 0)

    @property
    def steps(self) -> jax.Array:
        """Loads of keys that the tile needs."""
        return steps_to(self.end)


def steps_to(end: jax.Array) -> jax.Array:
    """Loads of keys up to position `end`."""
    return lax.div(end + (BLOCK_K - 1), jnp.int32(BLOCK_K))


def for_each_item(tile_ref, used_ref, heads: int, take) -> jax.Array:
    """take(n, item) of this program's items, one after the other; n and its result: the steps taken before.

    The tiles are sorted, those with most keys first, and dealt out to and fro, so that each program gets as much.
    """
    items = used_ref[0] * heads

    def place(turn):
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, program(), SMS - 1 - program())

    def look(turn):
        number = jnp.minimum(turn * SMS + place(turn), items - 1)
        tile, head = lax.div(number, jnp.int32(heads)), lax.rem(number, jnp.int32(heads))
        return Item(head, *(tile_ref[tile, i] for i in range(4)))

    def turn(number, state):
        n, item = state
        following = look(number + 1)  # long before it is needed
        return take(n, item), following

    full = lax.div(items, jnp.int32(SMS))
    turns = full + jnp.where(place(full) < items - full * SMS, 1, 0)
    return lax.fori_loop(0, turns, turn, (jnp.int32(0), look(jnp.int32(0))))[0]


def load_items(
    q_ref, cache_ref, layer_ref, table_ref, for_each, memory: Memory, barriers: Barriers, paging: Paging
) -> None:
    """The loading warpgroup: queries, keys and values into shared memory as soon as there is room."""
    block_size, group, layer = paging.block_size, q_ref.shape[1] // paging.kv_heads, layer_ref[0]

    def take(n, item):
        for w in range(COMPUTE):
            rows = pl.ds(item.row0 + w * ROWS, ROWS)
            plgpu.barrier_wait(barriers.q_free.at[w])
            plgpu.copy_gmem_to_smem(q_ref.at[rows, item.head], memory.q_raw.at[w], barriers.q_full.at[w])

        def step(i, n):
            slot, start = slot_of(n, STAGES), i * BLOCK_K
            block = table_ref[item.sequence, lax.div(start, jnp.int32(block_size))]
            head, offset = lax.div(item.head, jnp.int32(group)), lax.rem(start, jnp.int32(block_size))
            row = paging.row(layer, block, head, offset)
            keys, values = (pl.ds(pl.multiple_of(at, BLOCK_K), BLOCK_K) for at in (row, row + paging.values))
            plgpu.barrier_wait(barriers.k_free.at[slot])
            plgpu.copy_gmem_to_smem(cache_ref.at[keys], memory.k.at[slot], barriers.k_full.at[slot])
            plgpu.barrier_wait(barriers.v_free.at[slot])
            plgpu.copy_gmem_to_smem(cache_ref.at[values], memory.v.at[slot], barriers.v_full.at[slot])
            return n + 1

        return lax.fori_loop(0, item.steps, step, n)

    for_each(take)
    for w in range(COMPUTE):
        plgpu.barrier_wait(barriers.q_free.at[w])
    for slot in range(STAGES):
        plgpu.barrier_wait(barriers.k_free.at[slot])
        plgpu.barrier_wait(barriers.v_free.at[slot])


class Part(NamedTuple):
    """A warpgroup's 64 rows of a tile."""

    first: jax.Array
    """Position of the first query."""
    live: jax.Array
    """Rows that are queries."""
    end: jax.Array
    """Keys from here on are beyond every query of the tile."""
    loads: jax.Array
    """Loads of keys that the tile needs."""
    steps: jax.Array
    """Those that this part needs."""
    whole: jax.Array
    """Those that every query sees whole."""

    @classmethod
    def of(cls, item: Item, wg: jax.Array) -> "Part":
        """Warpgroup wg's."""
        first, live = item.position + wg * ROWS, jnp.clip(item.count - wg * ROWS, 0, ROWS)
        steps = jnp.where(live > 0, steps_to(jnp.maximum(first + live, 0)), 0)
        whole = jnp.minimum(lax.div(jnp.maximum(first + 1, 0), jnp.int32(BLOCK_K)), steps)
        return cls(first, live, item.end, item.steps, steps, whole)


class Attention:
    """A computing warpgroup: its part of each tile. n counts the loads of keys before the tile, i those of the tile."""

    def __init__(self, memory: Memory, barriers: Barriers, *, scale: float, dtype: jnp.dtype, interpret: bool):
        self.wg, self.memory, self.barriers = warpgroup(), memory, barriers
        self.to_exponent, self.dtype, self.interpret = scale * LOG2E, dtype, interpret

    def run(self, for_each, o_ref) -> None:
        """Attend with the queries of every tile, and write the results to o_ref."""
        plgpu.barrier_arrive(self.barriers.q_free.at[self.wg])
        for slot in range(STAGES):
            plgpu.barrier_arrive(self.barriers.k_free.at[slot])
            plgpu.barrier_arrive(self.barriers.v_free.at[slot])
        total = for_each(functools.partial(self.take, o_ref))
        plgpu.wait_smem_to_gmem(0)
        pl.when((self.wg == 0) & (total > 0))(self.take_turn)

    def take(self, o_ref, n, item: Item) -> jax.Array:
        """One tile; returns the loads of keys before the next."""
        part = Part.of(item, self.wg)
        self.take_queries()

        @pl.when(part.loads > 0)
        def _():
            plgpu.barrier_wait(self.barriers.k_full.at[slot_of(n, STAGES)])
            # One's softmax beside the other's products: once half a step behind, the second one stays there.
            pl.when((self.wg == 1) & (n == 0))(self.take_turn)

        step = functools.partial(self.step, n, part)
        state = jnp.zeros((ROWS, o_ref.shape[2]), jnp.float32), jnp.full((ROWS,), NEG_INF, jnp.float32)
        state = (*state, jnp.zeros((ROWS,), jnp.float32))
        state = lax.fori_loop(0, part.whole, functools.partial(step, diagonal=False), state)
        acc, _, l = lax.fori_loop(part.whole, part.steps, functools.partial(step, diagonal=True), state)
        pl.loop(part.steps, part.loads)(functools.partial(self.skip, n, part))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.memory.out[self.wg] = (acc / _spread(jnp.maximum(l, 1e-30), acc.shape)).astype(self.dtype)
        plgpu.commit_smem()
        _copy_rows(self.memory.out.at[self.wg], o_ref, item.row0 + self.wg * ROWS, item.head, part.live)
        return n + part.loads

    def take_queries(self) -> None:
        """From where they were loaded to where tensor cores read them."""
        plgpu.barrier_wait(self.barriers.q_full.at[self.wg])
        self.memory.q[self.wg] = self.memory.q_raw[self.wg]
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers.q_free.at[self.wg])

    def take_turn(self) -> None:
        """Let the other warpgroup multiply, and wait until it lets this one."""
        plgpu.barrier_arrive(self.barriers.turn)
        plgpu.barrier_wait(self.barriers.turn)

    def await_keys(self, n, i, part: Part) -> None:
        """Wait for a load of keys, if the tile has it."""

        @pl.when(i < part.loads)
        def _():
            plgpu.barrier_wait(self.barriers.k_full.at[slot_of(n + i, STAGES)])

    def step(self, n, part: Part, i, state, *, diagonal: bool):
        """Take in 128 keys and values; diagonal: not all queries see all of them."""
        acc, m, l = state
        slot, start, barriers = slot_of(n + i, STAGES), i * BLOCK_K, self.barriers
        ragged = start + BLOCK_K > part.end
        v = self.memory.v.at[slot]
        if diagonal:
            pl.when(ragged)(lambda: _clear_values(v, part.end - start, barriers.v_full.at[slot]))
        scores = _product(self.memory.q.at[self.wg], self.memory.k.at[slot], self.take_turn, self.interpret)
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        if diagonal:
            query, key = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(2))
            scores = jnp.where(key + start <= query + part.first, scores, NEG_INF)
        m_new = jnp.maximum(m, scores.max(axis=1) * self.to_exponent)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(scores * self.to_exponent - _spread(m_new, scores.shape))
        acc *= _spread(alpha, acc.shape)
        l = l * alpha + p.sum(axis=1)
        # All of it before the turn is given back.
        acc, l, m, p = lax.optimization_barrier((acc, l, m_new, p.astype(self.dtype)))
        plgpu.barrier_arrive(barriers.turn)
        if diagonal:
            pl.when(~ragged)(lambda: plgpu.barrier_wait(barriers.v_full.at[slot]))
        else:
            plgpu.barrier_wait(barriers.v_full.at[slot])
        plgpu.barrier_wait(barriers.turn)
        acc = _add_product(acc, p, v, lambda: self.await_keys(n, i + 1, part), self.interpret)
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        return acc, m, l

    def skip(self, n, part: Part, i) -> None:
        """Let keys and values go that the other warpgroup alone has use for."""
        slot = slot_of(n + i, STAGES)
        plgpu.barrier_arrive(self.barriers.k_free.at[slot])
        self.take_turn()
        plgpu.barrier_wait(self.barriers.v_full.at[slot])
        plgpu.barrier_arrive(self.barriers.v_free.at[slot])
        self.await_keys(n, i + 1, part)
        self.take_turn()


def _spread(column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(column, shape, [0])


def _product(a, b, meanwhile, interpret: bool) -> jax.Array:
    """a [M, D] @ b [N, D].T in float32, both in shared memory, while meanwhile() runs."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
        meanwhile()
        return accumulator[...]

    if not interpret:
        return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))
    meanwhile()
    return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32).T)


def _add_product(acc: jax.Array, a: jax.Array, b, meanwhile, interpret: bool) -> jax.Array:
    """acc [M, N] + a [M, D] @ b [D, N], a in registers and b in shared memory, while meanwhile() runs."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        meanwhile()

    if not interpret:
        return pl.run_state(run)(plgpu.ACC.init(acc))
    meanwhile()
    return acc + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))


def _clear_values(v, count: jax.Array, full) -> None:
    """Zeros in place of the values [BLOCK_K, H] from `count` on: they may be NaN, of which no weight makes a zero.

    Both warpgroups write the same, so that neither waits for the other.
    """
    plgpu.barrier_wait(full)
    for start in range(0, BLOCK_K, ROWS):
        at = v.at[pl.ds(start, ROWS)]
        values = at[...]
        key = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        at[...] = jnp.where(key < count, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _copy_rows(source, o_ref, row: jax.Array, head: jax.Array, count: jax.Array) -> None:
    """The first count of 64 rows to o_ref [T, N, H] from `row` on: a copy's size is fixed, so by count's bits."""
    done, size = 0, ROWS
    while size:
        whole = count & size

        def copy(done=done, size=size):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(done, size)], o_ref.at[pl.ds(row + done, size), head])

        pl.when(whole != 0)(copy)
        done, size = done + whole, size // 2


def _sorted_tiles(query_starts: jax.Array, context_lens: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """prefill_tiles as one table [tiles, 4], those with most keys first, and how many there are [1].

    Before them come those without keys, of padding. After them a program could wait forever: its loader for both
    warpgroups to go on to the next tile, the second for its turn, the first, which leaves it that at the end, for
    queries.
    """
    table = jnp.stack(prefill_tiles(query_starts, context_lens, tokens, TILE), axis=1)
    _, _, count, position = table.T
    used, keys = count > 0, position + count
    order = jnp.where(used, jnp.where(keys > 0, -keys, jnp.iinfo(jnp.int32).min), 0)
    return table[jnp.argsort(order)], used.sum(dtype=jnp.int32)[None]


def paged_prefill_attention(
    q: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array,
    block_tables: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    out: jax.Array | None = None,
    *,
    scale: float,
    interpret: object = None,
) -> jax.Array:
    """nanovllm_jax.kernels.paged_prefill_attention for what `fits`, and jnp operations that every layer shares."""
    (tokens, heads, head_dim), paging = q.shape, Paging.of(kv_cache)
    # A slice of the batch's numbers would come where it lies, and these kernels want arrays that begin at 256 bytes.
    block_tables = jnp.maximum(block_tables, 0)
    tiles = _sorted_tiles(query_starts, context_lens, tokens)
    args = q, as_rows(kv_cache), layer[None], block_tables, *tiles

    def hopper_prefill(*refs):
        *load_refs, tile_ref, used_ref, o_ref = refs
        for_each = functools.partial(for_each_item, tile_ref, used_ref, heads)

        def run(memory, barriers):
            def attend():
                options = dict(scale=scale, dtype=q.dtype, interpret=interpret is not None)
                Attention(memory, barriers, **options).run(for_each, o_ref)

            in_roles(lambda: load_items(*load_refs, for_each, memory, barriers, paging), attend)

        pl.run_scoped(run, Memory.types(head_dim, q.dtype), Barriers.types(), collective_axes="wg")

    if out is None:
        [out] = hopper_call(
            hopper_prefill, *args, out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),), interpret=interpret
        )
        return out
    written = jax.new_ref(out)
    hopper_call(hopper_prefill, *args, written, out_type=(), interpret=interpret)
    return jax.freeze(written)
