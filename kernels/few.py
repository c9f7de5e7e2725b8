"""Pallas kernel: a linear layer of a few rows on tensor cores, with SwiGLU or with its sums cut in parts.

So few rows take as long as the weights take to be read, where all of the card reads. A layer with few features has too
few tiles for that, so its depth is cut, and whoever reads the result adds the parts up (`add_norm` does): a kernel in
between would take as long as this one. Shapes: T rows, D depth, F features, S parts, W = 2 weights for SwiGLU, or 1.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import dot, gated, pallas_call, rounded

# On an H200 that gains up to 64 rows where a layer's lesser side is up to 2,048. Beyond, cuBLAS is as fast or faster.
MOST_ROWS, MOST_SIDE = 64, 2048
MANY_FEATURES = 2**15  # more have wider tiles, and one row too: a vocabulary
PARTS, MOST_FEATURES = 4, 2048  # into how many parts a depth is cut, of layers with up to so many features


class Tiles(NamedTuple):
    """How the work is cut: features and depth of a tile, which has all rows, and its warps and pipeline depth."""

    features: int
    depth: int
    num_warps: int
    num_stages: int


def default_tiles(weights: int, features: int) -> Tiles:
    """Settings for an H200: a tile to each of its SMs, or more."""
    if weights == 2:
        return Tiles(features=16, depth=128, num_warps=2, num_stages=4)
    return Tiles(features=32 if features <= MANY_FEATURES else 64, depth=128, num_warps=4, num_stages=4)


def fits(x: jax.Array, weight: jax.Array) -> bool:
    """Whether x [T, D] is for this kernel, with weights [*F, D]: a few rows of 16 bits, neither short nor for `row`."""
    if x.ndim != 2 or x.dtype.itemsize != 2 or weight.dtype != x.dtype:
        return False
    depth, features = x.shape[1], math.prod(weight.shape[:-1])
    least = 1 if features > MANY_FEATURES else 2
    return least <= x.shape[0] <= MOST_ROWS and depth >= 512 and min(depth, features) <= MOST_SIDE


def parts_of(weight: jax.Array) -> int:
    """Into how many parts the sums of a layer with weights [W, F, D] are cut."""
    products, features, _ = weight.shape
    return PARTS if products == 1 and features <= MOST_FEATURES else 1


def part_depth(depth: int, parts: int, tile: int) -> int:
    """How much of the depth a part sums up, in whole tiles: the last parts may have less, or nothing."""
    return pl.cdiv(pl.cdiv(depth, tile), parts) * tile


def _few_kernel(x_ref, weight_ref, out_ref, *, rows: int, part: int, tiles: Tiles):
    (used_rows, depth), (weights, features, _), dtype = x_ref.shape, weight_ref.shape, x_ref.dtype
    whole_depth = depth == part * out_ref.shape[0]  # else a part ends inside a tile, or is not there at all
    feature, start = pl.program_id(0) * tiles.features, pl.program_id(1) * part
    all_rows, own = pl.ds(0, rows), pl.ds(feature, tiles.features)
    live_rows = _inside(0, rows, used_rows, used_rows == rows)
    live_features = _inside(feature, tiles.features, features, features % tiles.features == 0)

    def step(i, sums):
        first = start + i * tiles.depth
        at, live_depth = pl.ds(first, tiles.depth), _inside(first, tiles.depth, depth, whole_depth)
        x = plgpu.load(x_ref.at[all_rows, at], **_masked(live_rows, live_depth, (rows, tiles.depth)))
        masked = _masked(live_features, live_depth, (tiles.features, tiles.depth))
        tile = [plgpu.load(weight_ref.at[jnp.int32(w), own, at], **masked) for w in range(weights)]
        return tuple(acc + dot(x, weight, trans_b=True) for acc, weight in zip(sums, tile))

    zeros = (jnp.zeros((rows, tiles.features), jnp.float32),) * weights
    y = lax.fori_loop(0, part // tiles.depth, step, zeros)
    y = gated(*(rounded(acc, dtype) for acc in y), dtype) if weights == 2 else y[0]
    mask = _masked(live_rows, live_features, y.shape).get("mask")
    plgpu.store(out_ref.at[pl.program_id(1), all_rows, own], y.astype(out_ref.dtype), mask=mask)


def _inside(start, size: int, end: int, whole: bool) -> jax.Array | None:
    """Which of the indices from start on are below end; None where all are known to be, as a mask costs some time."""
    return None if whole else start + jnp.arange(size, dtype=jnp.int32) < end


def _masked(first: jax.Array | None, second: jax.Array | None, shape: tuple[int, int]) -> dict:
    """How to load a tile of which these rows and columns are there."""
    masks = ([] if first is None else [first[:, None]]) + ([] if second is None else [second[None]])
    masks = [jnp.broadcast_to(mask, shape) for mask in masks]
    return {"mask": functools.reduce(jnp.logical_and, masks), "other": 0} if masks else {}


def few_linear(
    x: jax.Array,
    weight: jax.Array,
    *,
    parts: int = 1,
    dtype: jnp.dtype,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """nanovllm_jax.kernels.few_linear as one kernel."""
    (rows, depth), (weights, features, _) = x.shape, weight.shape
    tiles = tiles or default_tiles(weights, features)
    [out] = pallas_call(
        _few_kernel,
        *(x, weight),
        grid=(pl.cdiv(features, tiles.features), parts),
        out_shape=[jax.ShapeDtypeStruct((parts, rows, features), dtype)],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        rows=max(16, pl.next_power_of_2(rows)),
        part=part_depth(depth, parts, tiles.depth),
        tiles=tiles,
    )
    return out
