"""Pallas kernel: the residual sum and the RMS norm after it in one pass. Shapes: T tokens, D hidden, S parts."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import named_pallas_call, rounded


class Tiles(NamedTuple):
    """How the work is cut: tokens to a program, at most T, and the program's warps."""

    tokens: int
    num_warps: int


def default_tiles(features: int) -> Tiles:
    """Settings for an H200: 16 values or more to a thread."""
    return Tiles(tokens=1, num_warps=min(16, max(1, pl.next_power_of_2(features) // 512)))


def _add_norm_kernel(ref, *, tile: int, width: int, eps: float):
    tokens, features = ref["x"].shape
    # The last tile is moved back to end with the last token: what two programs both write is the same.
    at = pl.ds(jnp.minimum(pl.program_id(0) * tile, tokens - tile), tile), pl.ds(0, width)
    used = jnp.arange(width) < features  # of D rounded up to a power of two
    live = jnp.broadcast_to(used[None], (tile, width))
    load, store = partial(plgpu.load, mask=live, other=0), partial(plgpu.store, mask=live)
    total = load(ref["x"].at[at])
    dtype, wide = total.dtype, total.astype(jnp.float32)
    if "delta" in ref:
        parts = (ref["delta"].at[jnp.int32(part), *at] for part in range(ref["delta"].shape[0]))
        wide = rounded(wide + rounded(sum(load(part).astype(jnp.float32) for part in parts), dtype), dtype)
        store(ref["sum"].at[at], wide.astype(dtype))
    scale = lax.rsqrt((wide * wide).sum(axis=1) / features + eps)
    normed = rounded(wide * scale[:, None], dtype)  # where transformers rounds
    gain = plgpu.load(ref["gain"].at[pl.ds(0, width)], mask=used, other=0)
    store(ref["normed"].at[at], (normed * gain.astype(jnp.float32)[None]).astype(dtype))


def add_norm(
    x: jax.Array,
    delta: jax.Array,
    gain: jax.Array,
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.add_norm as one kernel: without parts to add, of the norm alone."""
    tokens, features = x.shape
    tiles = tiles or default_tiles(features)
    args, outs = {"x": x, "gain": gain}, ["normed"]
    if len(delta):
        args, outs = args | {"delta": delta}, ["sum", *outs]
    results = named_pallas_call(
        _add_norm_kernel,
        args,
        dict.fromkeys(outs, jax.ShapeDtypeStruct(x.shape, x.dtype)),
        grid=(pl.cdiv(tokens, tiles.tokens),),
        num_warps=tiles.num_warps,
        interpret=interpret,
        tile=tiles.tokens,
        width=pl.next_power_of_2(features),
        eps=eps,
    )
    return results.get("sum", x), results["normed"]
