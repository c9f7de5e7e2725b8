"""Pallas kernels: attention of one token per sequence over the paged cache, long contexts cut into parts.

Flash-decoding (Dao et al. 2023). The contexts of a batch are cut into parts of about one size, so few that most stay
whole: enough to fill the GPU at a small batch, and so that one long context does not keep a large batch waiting. A
program that has a whole context writes the result; those with parts leave a normalised partial result and the log2 of
its weights' sum each, and a second kernel combines them.
Shapes: B sequences, N query heads, K kv heads, G = N / K, H head_dim, I items of work (contexts and parts of them).
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
    cache_tile,
    dot,
    load_tile,
    pallas_call,
    softmax_end,
    softmax_start,
    softmax_step,
)

LARGE_BATCH = 1024  # programs without any cut: from here on the GPU is full


class Tiles(NamedTuple):
    """How the work is cut: keys to a tile, items beyond one a context, a program's warps and pipeline depth."""

    block_k: int
    extra: int
    num_warps: int
    num_stages: int


def default_tiles(batch: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Tiles:
    """Settings for an H200: 16 KiB of keys to a tile, twice that and hardly a cut where the batch fills the GPU."""
    size, large = jnp.dtype(dtype).itemsize, batch * kv_heads >= LARGE_BATCH
    block_k = max(16, min(128, (32768 if large and size == 2 else 16384) // (head_dim * size)))
    return Tiles(block_k, extra=16 if large else 64, num_warps=8 if size == 4 else 4, num_stages=3)


class Work(NamedTuple):
    """What each program does. A context has one item (also an empty one, whose result is zeros) or several parts."""

    items: jax.Array
    """[B + extra, 4] int32: sequence, first tile of keys, last one + 1, and what it is: UNUSED, WHOLE or PART."""
    cut: jax.Array
    """[min(B, extra), 3] int32: each cut sequence (B for an unused row), its first item, how many it has."""


UNUSED, WHOLE, PART = range(3)


def cut_contexts(context_lens: jax.Array, block_k: int, extra: int) -> Work:
    """Cut the contexts [B] into at most B + extra items of about one size, whole tiles of block_k keys each."""
    batch = len(context_lens)
    tiles = (context_lens + block_k - 1) // block_k
    share = jnp.maximum((tiles.sum() + extra - 1) // extra, 1)  # most tiles to an item: at most `extra` cuts
    parts = jnp.maximum((tiles + share - 1) // share, 1)
    size = jnp.maximum((tiles + parts - 1) // parts, 1)  # a context's parts are equal, but for the last
    parts = jnp.maximum((tiles + size - 1) // size, 1)
    ends = jnp.cumsum(parts)
    item = jnp.arange(batch + extra)
    owner = (item[:, None] >= ends).sum(axis=1)  # a search, as one fused comparison
    used, owner = owner < batch, jnp.minimum(owner, batch - 1)
    first = (item - (ends - parts)[owner]) * size[owner]
    last = jnp.minimum(first + size[owner], tiles[owner])
    kind = jnp.where(used, jnp.where(parts[owner] > 1, PART, WHOLE), UNUSED)
    [cut] = jnp.nonzero(parts > 1, size=min(batch, extra), fill_value=batch)
    at = jnp.minimum(cut, batch - 1)
    return Work(
        jnp.stack((owner, first, last, kind), axis=1).astype(jnp.int32),
        jnp.stack((cut, (ends - parts)[at], parts[at]), axis=1).astype(jnp.int32),
    )


def _decode_kernel(*refs, block_size: int, rows: int, scale: float, block_k: int, fused_exp2: bool):
    q_ref, k_ref, v_ref, table_ref, context_ref, item_ref, o_ref, part_ref, lse_ref = refs
    head, item = pl.program_id(0), pl.program_id(1)
    heads, head_dim = q_ref.shape[1:]
    group = heads // k_ref.shape[1]
    b, first, last, kind = (item_ref[item, i] for i in range(4))
    row = jnp.arange(rows, dtype=jnp.int32)  # the G query heads of this kv head, padded to what tensor cores take
    live = row < group
    own = pl.ds(head * group, rows)

    @pl.when(kind != UNUSED)
    def _():
        context = context_ref[b]
        q = plgpu.load(q_ref.at[b, own, :], mask=live[:, None], other=0)

        def step(i, state):
            start = i * block_k
            valid = start + jnp.arange(block_k, dtype=jnp.int32) < context
            blocks, offsets = cache_tile(table_ref, b, start, context, block_size=block_size, block_k=block_k)
            scores = dot(q, load_tile(k_ref, blocks, head, offsets, valid), trans_b=True)
            scores = jnp.where(valid[None, :], scores, NEG_INF)
            v = load_tile(v_ref, blocks, head, offsets, valid)
            return softmax_step(state, scores, v, scale=scale, fused_exp2=fused_exp2)

        state = lax.fori_loop(first, last, step, softmax_start(rows, head_dim))
        result, (_, m, l) = softmax_end(state), state

        @pl.when(kind == WHOLE)
        def _():
            plgpu.store(o_ref.at[b, own, :], result.astype(o_ref.dtype), mask=live[:, None])

        @pl.when(kind == PART)
        def _():
            plgpu.store(part_ref.at[item, own, :], result, mask=live[:, None])
            plgpu.store(lse_ref.at[item, own], m * (scale * LOG2E) + jnp.log2(l), mask=live)


def _combine_kernel(part_ref, lse_ref, cut_ref, _, o_ref, *, batch: int, rows: int):
    """Sum a query head's partial results, weighted by their share of the softmax's denominator."""
    head, cut = pl.program_id(0), pl.program_id(1)
    b, first, count = (cut_ref[cut, i] for i in range(3))

    @pl.when(b < batch)
    def _():
        live = jnp.arange(rows, dtype=jnp.int32) < count
        lse = plgpu.load(lse_ref.at[pl.ds(first, rows), head], mask=live, other=NEG_INF)
        part = plgpu.load(part_ref.at[pl.ds(first, rows), head, :], mask=live[:, None], other=0)
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
    """nanovllm_jax.kernels.paged_decode_attention as two kernels, and jnp operations that every layer shares."""
    batch, (_, heads, head_dim) = len(context_lens), q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    tiles = tiles or default_tiles(batch, kv_heads, head_dim, q.dtype)
    items, cut = cut_contexts(context_lens, tiles.block_k, tiles.extra)
    part = jax.ShapeDtypeStruct((len(items), heads, head_dim), jnp.float32)
    out, part, lse = pallas_call(
        _decode_kernel,
        *(q, k_cache, v_cache, block_tables, context_lens, items),
        grid=(kv_heads, len(items)),  # programs start in this order, the first index fastest
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), part, jax.ShapeDtypeStruct(part.shape[:-1], jnp.float32)],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        block_size=block_size,
        block_k=tiles.block_k,
        rows=max(16, pl.next_power_of_2(heads // kv_heads)),
        scale=scale,
        fused_exp2=not interpret,
    )
    [out] = pallas_call(
        _combine_kernel,
        *(part, lse, cut, out),
        grid=(heads, len(cut)),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        aliases={3: 0},
        num_warps=4,
        interpret=interpret,
        batch=batch,
        rows=pl.next_power_of_2(tiles.extra),
    )
    return out
