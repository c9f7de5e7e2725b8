"""Pallas kernel: causal attention of new tokens against the paged cache, one tile of query tokens a program.

Flash attention (Dao et al. 2022) with the keys read through block tables (PagedAttention, Kwon et al. 2023). All G
query heads of a kv head share a tile: its row r is query token r // G, head r % G, so that any G fills tensor cores.
Shapes: T tokens, P sequences, N query heads, K kv heads, G = N / K, H head_dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import (
    NEG_INF,
    SMS,
    Paging,
    as_tiles,
    dot,
    load_tile,
    pallas_call,
    prefill_tiles,
    softmax_end,
    softmax_start,
    softmax_step,
    spread,
)


class Tiles(NamedTuple):
    """How the work is cut: rows (query tokens times G) and keys to a tile, a program's warps and pipeline depth."""

    rows: int
    block_k: int
    num_warps: int
    num_stages: int


def default_tiles(tokens: int, heads: int, group: int, head_dim: int, dtype: jnp.dtype) -> Tiles:
    """Settings for an H200: 128 rows to a tile, so that keys are loaded rarely, or 64 where that leaves SMs idle."""
    at_least = pl.next_power_of_2(group)
    if jnp.dtype(dtype).itemsize == 4:  # exact products run outside the tensor cores and need many registers
        return Tiles(rows=max(32, at_least), block_k=32 if head_dim <= 128 else 16, num_warps=8, num_stages=2)
    if tokens * heads < 2 * SMS * 128:
        return Tiles(rows=max(64, at_least), block_k=64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)
    return Tiles(rows=max(128, at_least), block_k=128 if head_dim <= 128 else 32, num_warps=8, num_stages=3)


def _prefill_kernel(*refs, paging: Paging, block_k: int, rows: int, scale: float, fused_exp2: bool, mask_all: bool):
    q_ref, cache_ref, layer_ref, table_ref, tile_ref, *_, o_ref = refs
    tiles, heads, head_dim = tile_ref.shape[0], q_ref.shape[1], q_ref.shape[2]
    group = heads // paging.kv_heads
    tile = tiles - 1 - pl.program_id(0)  # a sequence's last tiles see most keys: they start first
    head = pl.program_id(1)
    sequence, row0, count, position = (tile_ref[tile, i] for i in range(4))

    @pl.when(count > 0)
    def _():
        row = jnp.arange(rows, dtype=jnp.int32)
        token = lax.div(row, jnp.full_like(row, group))
        live = token < count
        shape = (rows, head_dim)
        columns = lax.broadcasted_iota(jnp.int32, shape, 1)
        at = (spread(row0 + token, shape), spread(head * group + row - token * group, shape), columns)
        q = plgpu.load(q_ref.at[at], mask=live[:, None], other=0)
        end = jnp.maximum(position + count, 0)  # keys from here on are beyond every query of the tile

        layer, load = layer_ref[0], functools.partial(load_tile, cache_ref)
        take_in = functools.partial(softmax_step, scale=scale, fused_exp2=fused_exp2)

        def step(i, state, diagonal):
            start = i * block_k
            keys = paging.tile(layer, table_ref, sequence, head, start, end, block_k=block_k)
            scores = dot(q, load(keys, block_k), trans_b=True)
            key = start + jnp.arange(block_k, dtype=jnp.int32)
            if not diagonal:
                return take_in(state, scores, load(keys + paging.values, block_k))
            scores = jnp.where(key[None, :] <= (position + token)[:, None], scores, NEG_INF)
            return take_in(state, scores, load(keys + paging.values, block_k, key < end))

        # Tiles of keys that the first query sees whole need no mask.
        whole = jnp.int32(0) if mask_all else lax.div(jnp.maximum(position + 1, 0), jnp.int32(block_k))
        last = lax.div(end + (block_k - 1), jnp.int32(block_k))
        state = lax.fori_loop(0, whole, functools.partial(step, diagonal=False), softmax_start(rows, head_dim))
        state = lax.fori_loop(whole, last, functools.partial(step, diagonal=True), state)
        plgpu.store(o_ref.at[at], softmax_end(state).astype(o_ref.dtype), mask=live[:, None])


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
    fixed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """nanovllm_jax.kernels.paged_prefill_attention as one kernel, and jnp operations that every layer shares."""
    tokens, heads, head_dim = q.shape
    paging = Paging.of(kv_cache)
    group = heads // paging.kv_heads
    tiles = tiles or default_tiles(1 if fixed else tokens, heads, group, head_dim, q.dtype)
    tile_table = jnp.stack(prefill_tiles(query_starts, context_lens, tokens, tiles.rows // group), axis=1)
    args = q, as_tiles(kv_cache, tiles.block_k), layer[None], block_tables, tile_table
    [out] = pallas_call(
        _prefill_kernel,
        *(args if out is None else (*args, out)),
        grid=(tile_table.shape[0], paging.kv_heads),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        aliases={} if out is None else {len(args): 0},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        paging=paging,
        block_k=tiles.block_k,
        rows=tiles.rows,
        scale=scale,
        fused_exp2=not interpret,
        mask_all=fixed,  # which tiles need a mask depends on the chunk: so all go through the same code
    )
    return out
