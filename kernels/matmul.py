"""Pallas kernel: a matrix product in which a row's result depends on that row and the weights alone, to the last bit.

cuBLAS and XLA choose an algorithm by the number of rows, so that a token's numbers change with whatever else is in its
batch. Here the tiles are the same for any number of rows, and each sum runs over the depth in one order.
Shapes: T rows, D depth, F features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import dot, pallas_call


class Tiles(NamedTuple):
    """How the work is cut: rows, features and depth of a tile, a program's warps and pipeline depth."""

    rows: int
    features: int
    depth: int
    num_warps: int
    num_stages: int


def default_tiles(features: int, dtype: jnp.dtype) -> Tiles:
    """Settings for an H200, whatever the number of rows: few features to a tile where there are few."""
    if jnp.dtype(dtype).itemsize == 4:  # exact products run outside the tensor cores and need many registers
        return Tiles(rows=32, features=64, depth=32, num_warps=8, num_stages=2)
    return Tiles(rows=64, features=64 if features <= 8192 else 128, depth=64, num_warps=4, num_stages=4)


def _matmul_kernel(x_ref, weight_ref, out_ref, *, tiles: Tiles):
    (rows, depth), features = x_ref.shape, weight_ref.shape[0]
    row, feature = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.features
    own_rows, own_features = pl.ds(row, tiles.rows), pl.ds(feature, tiles.features)
    live_row = row + jnp.arange(tiles.rows, dtype=jnp.int32) < rows
    live_feature = feature + jnp.arange(tiles.features, dtype=jnp.int32) < features

    def load(ref, own, live, start, whole: bool):
        at = ref.at[own, pl.ds(start, tiles.depth)]
        shape = (own.size, tiles.depth)
        mask = jnp.broadcast_to(live[:, None], shape)
        if depth % tiles.depth:
            mask &= (start + jnp.arange(tiles.depth, dtype=jnp.int32) < depth)[None, :]
        elif whole:
            return plgpu.load(at)
        return plgpu.load(at, mask=mask, other=0)

    def step(i, acc):
        start = i * tiles.depth
        x = load(x_ref, own_rows, live_row, start, rows % tiles.rows == 0)
        weight = load(weight_ref, own_features, live_feature, start, features % tiles.features == 0)
        return acc + dot(x, weight, trans_b=True)

    start = jnp.zeros((tiles.rows, tiles.features), jnp.float32)
    acc = lax.fori_loop(0, pl.cdiv(depth, tiles.depth), step, start)
    live = live_row[:, None] & live_feature[None, :]
    plgpu.store(out_ref.at[own_rows, own_features], acc.astype(out_ref.dtype), mask=live)


def fixed_matmul(
    x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    """nanovllm_jax.kernels.fixed_matmul as one kernel."""
    (rows, _), features = x.shape, weight.shape[0]
    tiles = tiles or default_tiles(features, x.dtype)
    [out] = pallas_call(
        _matmul_kernel,
        *(x, weight),
        grid=(pl.cdiv(rows, tiles.rows), pl.cdiv(features, tiles.features)),  # all rows while a tile of weights is near
        out_shape=[jax.ShapeDtypeStruct((rows, features), dtype)],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        tiles=tiles,
    )
    return out
