"""Pallas kernel: a linear layer of one row, alone or with the residual sum and norm before it and SwiGLU after it.

One row takes as long as the weights take to be read, a few microseconds, and a small kernel before or after it nearly
as long. It is multiplied straight from registers, as tensor cores would be fed with fifteen rows of padding.
Shapes: D depth, F features, W = 2 weights for SwiGLU, or 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import gated, named_pallas_call, rounded

# Each program normalises the row anew: on an H200 that gains at a depth of 1,024 and loses at 4,096, where a plain
# layer still gains; at 12,288 XLA's matmuls are as fast.
MOST_DEPTH, MOST_NORMED_DEPTH = 4096, 2048


class Tiles(NamedTuple):
    """How the work is cut: features to a program, and its warps."""

    features: int
    num_warps: int


def default_tiles(depth: int) -> Tiles:
    """Settings for an H200: 16 weights to a thread."""
    width = pl.next_power_of_2(depth)
    return Tiles(features=max(1, 2048 // width), num_warps=4 if width <= 2048 else 8)


def fits(x: jax.Array, weight: jax.Array, *, normed: bool) -> bool:
    """Whether x [T, D] is for these kernels, with weights [*F, D]: one row of 16 bits, neither short nor too long."""
    if x.ndim != 2 or x.shape[0] != 1 or x.dtype.itemsize != 2 or weight.dtype != x.dtype:
        return False
    depth = x.shape[1]
    most = MOST_NORMED_DEPTH if normed else MOST_DEPTH
    return 512 <= depth <= most and weight.shape[-2] % default_tiles(depth).features == 0


def _row_kernel(ref, *, features: int, width: int, eps: float):
    weights, _, depth = ref["weight"].shape
    dtype, program, row = ref["x"].dtype, pl.program_id(0), jnp.zeros((), jnp.int32)
    whole, own = pl.ds(0, width), pl.ds(program * features, features)
    used = jnp.arange(width, dtype=jnp.int32) < depth  # of D rounded up to a power of two

    def load(at, mask=used):
        return plgpu.load(at, mask=mask, other=0).astype(jnp.float32)

    x = load(ref["x"].at[row, whole])
    if "gain" in ref:  # rounded where transformers rounds
        x = rounded(x + load(ref["delta"].at[row, whole]), dtype)

        @pl.when(program == 0)
        def _():
            plgpu.store(ref["sum"].at[row, whole], x.astype(dtype), mask=used)

        scale = lax.rsqrt((x * x).sum(axis=0) / depth + eps)
        x = rounded(rounded(x * scale, dtype) * load(ref["gain"].at[whole]), dtype)

    live = jnp.broadcast_to(used[None], (features, width))
    y = [(load(ref["weight"].at[row + i, own, whole], live) * x[None]).sum(axis=1) for i in range(weights)]
    if weights == 2:
        y = [gated(*(rounded(part, dtype) for part in y), dtype)]
    plgpu.store(ref["out"].at[row, own], y[0].astype(dtype))


def _call(x, weight, delta=None, gain=None, *, eps: float = 0.0, tiles: Tiles | None = None, interpret: bool = False):
    (_, depth), (_, features, _) = x.shape, weight.shape
    tiles = tiles or default_tiles(depth)
    args, outs = {"x": x, "weight": weight}, {"out": jax.ShapeDtypeStruct((1, features), x.dtype)}
    if gain is not None:
        args |= {"delta": delta, "gain": gain}
        outs = {"sum": jax.ShapeDtypeStruct(x.shape, x.dtype)} | outs
    return named_pallas_call(
        _row_kernel,
        args,
        outs,
        grid=(features // tiles.features,),
        num_warps=tiles.num_warps,
        interpret=interpret,
        features=tiles.features,
        width=pl.next_power_of_2(depth),
        eps=eps,
    )


def row_linear(x: jax.Array, weight: jax.Array, *, tiles: Tiles | None = None, interpret: bool = False) -> jax.Array:
    """nanovllm_jax.kernels.row_linear as one kernel."""
    return _call(x, weight[None], tiles=tiles, interpret=interpret)["out"]


def row_norm_linear(
    x: jax.Array,
    delta: jax.Array,
    gain: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.row_norm_linear as one kernel."""
    results = _call(x, weight, delta, gain, eps=eps, tiles=tiles, interpret=interpret)
    return results["sum"], results["out"]
