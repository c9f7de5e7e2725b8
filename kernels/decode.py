"""Pallas kernels: attention of one token per sequence over the paged cache, split over long contexts.

Flash-decoding (Dao et al. 2023): where batch times kv heads is too little to fill the GPU, several programs share a
context, each leaving a normalised partial result and the log2 of its weights' sum; a second kernel combines them.
Shapes: B sequences, N query heads, K kv heads, G = N / K, H head_dim, S splits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import (
    LOG2E,
    NEG_INF,
    SMS,
    cache_tile,
    dot,
    load_tile,
    pallas_call,
    softmax_end,
    softmax_start,
    softmax_step,
)

PROGRAMS = 2048  # to have in flight or waiting: enough to fill the GPU evenly with contexts of unequal length


class Tiles(NamedTuple):
    """How the work is cut: keys to a tile, programs to a context, tiles to each at least, warps, pipeline depth."""

    block_k: int
    splits: int
    min_tiles: int
    num_warps: int
    num_stages: int


def default_tiles(batch: int, kv_heads: int, head_dim: int, max_context: int, dtype: jnp.dtype) -> Tiles:
    """Settings for an H200: 16 KiB of keys to a tile, and splits where the batch leaves SMs idle."""
    size = jnp.dtype(dtype).itemsize
    block_k = max(16, min(128, 16384 // (head_dim * size)))
    programs = batch * kv_heads
    splits = min(pl.next_power_of_2(pl.cdiv(PROGRAMS, programs)), 64, pl.next_power_of_2(pl.cdiv(max_context, block_k)))
    return Tiles(block_k, splits, min_tiles=1 if programs < SMS else 4, num_warps=8 if size == 4 else 4, num_stages=3)


def _tiles_per_split(context, *, block_k, splits, min_tiles):
    """(tiles of keys in a context, tiles that each split takes): short contexts leave the last splits empty."""
    tiles = lax.div(context + (block_k - 1), jnp.int32(block_k))
    return tiles, jnp.maximum(lax.div(tiles + (splits - 1), jnp.int32(splits)), min_tiles)


def _decode_kernel(
    *refs, block_size: int, rows: int, scale: float, block_k: int, splits: int, min_tiles: int, fused_exp2: bool
):
    q_ref, k_ref, v_ref, table_ref, context_ref, o_ref, *lse_ref = refs
    b, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, head_dim = q_ref.shape[1:]
    group = heads // k_ref.shape[1]
    context = context_ref[b]
    tiles, per_split = _tiles_per_split(context, block_k=block_k, splits=splits, min_tiles=min_tiles)
    first, last = split * per_split, jnp.minimum((split + 1) * per_split, tiles)

    row = jnp.arange(rows, dtype=jnp.int32)  # the G query heads of this kv head, padded to what tensor cores take
    live = row < group
    at = (b, pl.ds(head * group, rows), slice(None))

    def attend():
        q = plgpu.load(q_ref.at[at], mask=live[:, None], other=0)

        def step(i, state):
            start = i * block_k
            valid = start + jnp.arange(block_k, dtype=jnp.int32) < context
            blocks, offsets = cache_tile(table_ref, b, start, context, block_size=block_size, block_k=block_k)
            scores = dot(q, load_tile(k_ref, blocks, head, offsets, valid), trans_b=True)
            scores = jnp.where(valid[None, :], scores, NEG_INF)
            v = load_tile(v_ref, blocks, head, offsets, valid)
            return softmax_step(state, scores, v, scale=scale, fused_exp2=fused_exp2)

        return lax.fori_loop(first, last, step, softmax_start(rows, head_dim))

    if splits == 1:
        plgpu.store(o_ref.at[at], softmax_end(attend()).astype(o_ref.dtype), mask=live[:, None])
        return

    @pl.when(first < last)  # the combine kernel does not read an empty split's result
    def _():
        state = attend()
        _, m, l = state
        at = (b, split, pl.ds(head * group, rows))
        plgpu.store(o_ref.at[*at, :], softmax_end(state), mask=live[:, None])
        plgpu.store(lse_ref[0].at[at], m * (scale * LOG2E) + jnp.log2(l), mask=live)


def _combine_kernel(part_ref, lse_ref, context_ref, o_ref, *, rows, **cut):
    """Sum a query head's S partial results, weighted by their share of the softmax's denominator."""
    b, head = pl.program_id(0), pl.program_id(1)
    tiles, per_split = _tiles_per_split(context_ref[b], **cut)
    live = jnp.arange(rows, dtype=jnp.int32) < lax.div(tiles + per_split - 1, per_split)
    lse = plgpu.load(lse_ref.at[b, pl.ds(0, rows), head], mask=live, other=NEG_INF)
    part = plgpu.load(part_ref.at[b, pl.ds(0, rows), head, :], mask=live[:, None], other=0)
    weight = jnp.exp2(lse - lse.max(axis=0))
    o_ref[b, head, :] = ((part * weight[:, None]).sum(axis=0) / weight.sum(axis=0)).astype(o_ref.dtype)


def paged_decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """nanovllm_jax.kernels.paged_decode_attention as one kernel, or two where contexts are split."""
    batch, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    tiles = tiles or default_tiles(batch, kv_heads, head_dim, block_tables.shape[1] * block_size, q.dtype)
    cut = {"block_k": tiles.block_k, "splits": tiles.splits, "min_tiles": tiles.min_tiles}
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    part = jax.ShapeDtypeStruct((batch, tiles.splits, heads, head_dim), jnp.float32)
    results = pallas_call(
        _decode_kernel,
        *(q, k_cache, v_cache, block_tables, context_lens),
        grid=(batch, kv_heads, tiles.splits),
        out_shape=[out] if tiles.splits == 1 else [part, jax.ShapeDtypeStruct(part.shape[:-1], jnp.float32)],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        block_size=block_size,
        rows=max(16, pl.next_power_of_2(heads // kv_heads)),
        scale=scale,
        fused_exp2=not interpret,
        **cut,
    )
    if tiles.splits > 1:
        results = pallas_call(
            _combine_kernel,
            *(*results, context_lens),
            grid=(batch, heads),
            out_shape=[out],
            num_warps=1 if tiles.splits <= 8 else 4,
            interpret=interpret,
            rows=pl.next_power_of_2(tiles.splits),
            **cut,
        )
    return results[0]
