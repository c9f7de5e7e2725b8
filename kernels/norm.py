"""Pallas kernel: the residual sum and the RMS norm after it in one pass. Shapes: T tokens, D hidden, S parts."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import pallas_call, rounded


class Tiles(NamedTuple):
    """How the work is cut: tokens to a program, at most T, and the program's warps."""

    tokens: int
    num_warps: int


def default_tiles(features: int) -> Tiles:
    """Settings for an H200: 16 values or more to a thread."""
    return Tiles(tokens=1, num_warps=min(16, max(1, pl.next_power_of_2(features) // 512)))


def _add_norm_kernel(x_ref, delta_ref, gain_ref, sum_ref, normed_ref, *, tile: int, width: int, eps: float):
    (tokens, features), parts = x_ref.shape, delta_ref.shape[0]
    # The last tile is moved back to end with the last token: what two programs both write is the same.
    at = pl.ds(jnp.minimum(pl.program_id(0) * tile, tokens - tile), tile), pl.ds(0, width)
    used = jnp.arange(width) < features  # of D rounded up to a power of two
    live = jnp.broadcast_to(used[None], (tile, width))
    load, store = partial(plgpu.load, mask=live, other=0), partial(plgpu.store, mask=live)
    delta = sum(load(delta_ref.at[jnp.int32(part), *at]).astype(jnp.float32) for part in range(parts))
    total = (load(x_ref.at[at]).astype(jnp.float32) + rounded(delta, x_ref.dtype)).astype(x_ref.dtype)
    store(sum_ref.at[at], total)
    wide = total.astype(jnp.float32)
    scale = lax.rsqrt((wide * wide).sum(axis=1) / features + eps)
    normed = rounded(wide * scale[:, None], x_ref.dtype)  # where transformers rounds
    gain = plgpu.load(gain_ref.at[pl.ds(0, width)], mask=used, other=0)
    store(normed_ref.at[at], (normed * gain.astype(jnp.float32)[None]).astype(x_ref.dtype))


def add_norm(
    x: jax.Array,
    delta: jax.Array,
    gain: jax.Array,
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.add_norm as one kernel."""
    tokens, features = x.shape
    tiles = tiles or default_tiles(features)
    total, normed = pallas_call(
        _add_norm_kernel,
        *(x, delta, gain),
        grid=(pl.cdiv(tokens, tiles.tokens),),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        num_warps=tiles.num_warps,
        interpret=interpret,
        tile=tiles.tokens,
        width=pl.next_power_of_2(features),
        eps=eps,
    )
    return total, normed
