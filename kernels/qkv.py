"""Pallas kernel: from the q/k/v projection to the query and the cache in one pass.

Normalises and rotates queries and keys, and writes keys and values into the paged cache: what would be seven small
kernels a layer. Shapes: T tokens, K kv heads, G query heads to each, N = K * G, H head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import log2, pallas_call


class Tiles(NamedTuple):
    """How the work is cut: tokens to a program, and the program's warps."""

    tokens: int
    num_warps: int


def default_tiles(tokens: int) -> Tiles:
    """One token of one kv head to a program until there are programs enough, then several."""
    if tokens <= 1024:
        return Tiles(tokens=1, num_warps=1)
    return Tiles(tokens=max(n for n in (1, 2, 4, 8) if tokens % n == 0), num_warps=4)


def _qkv_kernel(qkv_ref, q_gain_ref, k_gain_ref, cos_ref, sin_ref, slot_ref, _k_in, _v_in, q_ref, k_cache_ref, v_cache_ref,
                *, tile, group, rows, eps, block_size):  # fmt: skip
    head = pl.program_id(1)
    tokens = pl.ds(pl.program_id(0) * tile, tile)
    dtype, head_dim = q_ref.dtype, q_ref.shape[-1]
    half = head_dim // 2
    halves = pl.ds(0, half), pl.ds(half, half)
    cos, sin = cos_ref[tokens, :], sin_ref[tokens, :]  # (tile, H / 2)

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    def norm_rope(x, gain_ref, cos, sin):
        """The two halves of heads, rounded where the layers round."""
        x = [part.astype(jnp.float32) for part in x]
        scale = lax.rsqrt(sum((part * part).sum(axis=-1) for part in x) / head_dim + eps)[..., None]
        first, second = (rounded(rounded(p * scale) * gain_ref[at].astype(jnp.float32)) for p, at in zip(x, halves))
        return first * cos - second * sin, second * cos + first * sin

    live = jnp.broadcast_to((jnp.arange(rows) < group)[None, :, None], (tile, rows, half))
    q = [plgpu.load(qkv_ref.at[tokens, head, pl.ds(0, rows), at], mask=live, other=0) for at in halves]
    for part, at in zip(norm_rope(q, q_gain_ref, cos[:, None], sin[:, None]), halves):
        plgpu.store(q_ref.at[tokens, pl.ds(head * group, rows), at], part.astype(dtype), mask=live)

    k = norm_rope([qkv_ref[tokens, head, group, at] for at in halves], k_gain_ref, cos, sin)
    v = [qkv_ref[tokens, head, group + 1, at] for at in halves]
    column = lax.broadcasted_iota(jnp.int32, (tile, half), 1)
    slot = jnp.broadcast_to(slot_ref[tokens][:, None], (tile, half))
    block, offset = slot >> log2(block_size), slot & (block_size - 1)
    for ref, value in ((k_cache_ref, k), (v_cache_ref, v)):
        for part, start in zip(value, (0, half)):
            target = ref.at[block, jnp.full_like(block, head), offset, column + start]
            plgpu.store(target, part.astype(dtype), mask=slot >= 0)


def norm_rope_store(
    qkv: jax.Array,
    q_gain: jax.Array,
    k_gain: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """nanovllm_jax.kernels.norm_rope_store as one kernel, with the caches aliased to its results."""
    tokens, kv_heads, parts, head_dim = qkv.shape
    group = parts - 2
    tiles = tiles or default_tiles(tokens)
    q = jax.ShapeDtypeStruct((tokens, kv_heads * group, head_dim), qkv.dtype)
    q, k_cache, v_cache = pallas_call(
        _qkv_kernel,
        *(qkv, q_gain, k_gain, cos, sin, slot_mapping, k_cache, v_cache),
        grid=(tokens // tiles.tokens, kv_heads),
        out_shape=[q, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cache, v_cache))],
        aliases={6: 1, 7: 2},
        num_warps=tiles.num_warps,
        interpret=interpret,
        tile=tiles.tokens,
        group=group,
        rows=pl.next_power_of_2(group),
        eps=eps,
        block_size=k_cache.shape[2],
    )
    return q, k_cache, v_cache
