"""Pallas kernel: write new keys and values into the paged cache, in place.

Shapes: T tokens, K kv heads, H head_dim.
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
    """One token to a program until there are programs enough for every SM several times over."""
    return Tiles(tokens=1, num_warps=4) if tokens <= 2048 else Tiles(tokens=4, num_warps=4)


def _store_kernel(k_ref, v_ref, slot_ref, _k_in, _v_in, k_cache_ref, v_cache_ref, *, tile, heads, block_size):
    total, kv_heads, head_dim = k_ref.shape
    shape = (tile, heads, head_dim)  # heads: kv_heads, rounded up to a power of two
    token = pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32)
    slot = plgpu.load(slot_ref.at[token], mask=token < total, other=-1)
    head, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    token, block, offset, slot = (
        jnp.broadcast_to(x[:, None, None], shape)
        for x in (token, slot >> log2(block_size), slot & (block_size - 1), slot)
    )
    live = (slot >= 0) & (head < kv_heads)
    source, target = (token, head, column), (block, head, offset, column)
    for new_ref, cache_ref in ((k_ref, k_cache_ref), (v_ref, v_cache_ref)):
        plgpu.store(cache_ref.at[target], plgpu.load(new_ref.at[source], mask=live, other=0), mask=live)


def store_kv(
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.store_kv as one kernel, with the caches aliased to its results."""
    tokens, kv_heads, _ = k.shape
    tiles = tiles or default_tiles(tokens)
    k_cache, v_cache = pallas_call(
        _store_kernel,
        *(k, v, slot_mapping, k_cache, v_cache),
        grid=(pl.cdiv(tokens, tiles.tokens),),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cache, v_cache)],
        aliases={3: 0, 4: 1},
        num_warps=tiles.num_warps,
        interpret=interpret,
        tile=tiles.tokens,
        heads=pl.next_power_of_2(kv_heads),
        block_size=k_cache.shape[2],
    )
    return k_cache, v_cache
