"""Pallas kernel: from the q/k/v projection to the query and the cache in one pass.

Normalises and rotates queries and keys, and writes keys and values into the paged cache, in place: what would be seven
small kernels a layer. Shapes: T tokens, K kv heads, G query heads to each, N = K * G, H head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import Paging, as_rows, norm_rope, pallas_call


class Tiles(NamedTuple):
    """How the work is cut: tokens of one kv head to a program, at most T, and the program's warps."""

    tokens: int
    num_warps: int


def default_tiles(tokens: int) -> Tiles:
    """Settings for an H200: one token to a program until there are programs enough, then several."""
    if tokens <= 128:
        return Tiles(tokens=1, num_warps=1)
    return Tiles(tokens=4 if tokens <= 1024 else 8, num_warps=4)


def _norm_rope_store_kernel(*refs, tile: int, rows: int, eps: float, paging: Paging):
    qkv_ref, q_gain_ref, k_gain_ref, cos_ref, sin_ref, slot_ref, _, layer_ref, q_ref, cache_ref = refs
    tokens, _, parts, head_dim = qkv_ref.shape
    group, dtype, half = parts - 2, q_ref.dtype, head_dim // 2
    head = pl.program_id(1)
    # The last tile is moved back to end with the last token: what two programs both write is the same.
    own = pl.ds(jnp.minimum(pl.program_id(0) * tile, tokens - tile), tile)
    halves = pl.ds(0, half), pl.ds(half, half)
    cos, sin = cos_ref[own, :], sin_ref[own, :]  # (tile, H / 2)

    def rotated(x, gain_ref, cos, sin):
        return norm_rope(x, [gain_ref[at] for at in halves], cos, sin, eps=eps, dtype=dtype)

    # Rows: G rounded up to a power of two.
    live = jnp.broadcast_to((jnp.arange(rows) < group)[None, :, None], (tile, rows, half))
    q = [plgpu.load(qkv_ref.at[own, head, pl.ds(0, rows), at], mask=live, other=0) for at in halves]
    for part, at in zip(rotated(q, q_gain_ref, cos[:, None], sin[:, None]), halves):
        plgpu.store(q_ref.at[own, pl.ds(head * group, rows), at], part.astype(dtype), mask=live)

    k = rotated([qkv_ref[own, head, group, at] for at in halves], k_gain_ref, cos, sin)
    v = [qkv_ref[own, head, group + 1, at] for at in halves]
    shape = (tile, half)
    slot, column = jnp.broadcast_to(slot_ref[own][:, None], shape), lax.broadcasted_iota(jnp.int32, shape, 1)
    key = paging.row_of_slot(layer_ref[0], slot, head)
    for row, new in ((key, k), (key + paging.values, v)):
        for part, start in zip(new, (0, half)):
            plgpu.store(cache_ref.at[row, column + start], part.astype(dtype), mask=slot >= 0)


def norm_rope_store(
    qkv: jax.Array,
    q_gain: jax.Array,
    k_gain: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    fixed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.norm_rope_store as one kernel, with the cache aliased to its result."""
    tokens, kv_heads, parts, head_dim = qkv.shape
    group = parts - 2
    tiles = tiles or default_tiles(1 if fixed else tokens)
    q = jax.ShapeDtypeStruct((tokens, kv_heads * group, head_dim), qkv.dtype)
    rows = as_rows(kv_cache)
    q, written = pallas_call(
        _norm_rope_store_kernel,
        *(qkv, q_gain, k_gain, cos, sin, slot_mapping, rows, layer[None]),
        grid=(pl.cdiv(tokens, tiles.tokens), kv_heads),
        out_shape=[q, jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        aliases={6: 1},
        num_warps=tiles.num_warps,
        interpret=interpret,
        tile=tiles.tokens,
        rows=pl.next_power_of_2(group),
        eps=eps,
        paging=Paging.of(kv_cache),
    )
    return q, written.reshape(kv_cache.shape)
