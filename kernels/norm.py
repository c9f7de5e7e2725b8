"""Pallas kernel: the residual sum and the norm after it in one pass. Shapes: T tokens, D hidden."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import pallas_call


def _add_norm_kernel(x_ref, delta_ref, gain_ref, sum_ref, normed_ref, *, width, eps):
    token, features = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(width, dtype=jnp.int32)  # D rounded up to a power of two
    load = partial(plgpu.load, mask=column < features, other=0)
    store = partial(plgpu.store, mask=column < features)
    at = (token, pl.ds(0, width))
    total = (load(x_ref.at[at]).astype(jnp.float32) + load(delta_ref.at[at]).astype(jnp.float32)).astype(x_ref.dtype)
    store(sum_ref.at[at], total)
    wide = total.astype(jnp.float32)
    normed = (wide * lax.rsqrt((wide * wide).sum() / features + eps)).astype(x_ref.dtype)
    gain = load(gain_ref.at[pl.ds(0, width)]).astype(jnp.float32)
    store(normed_ref.at[at], (normed.astype(jnp.float32) * gain).astype(x_ref.dtype))


def add_norm(
    x: jax.Array, delta: jax.Array, gain: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.add_norm as one kernel, one token to a program."""
    width = pl.next_power_of_2(x.shape[1])
    total, normed = pallas_call(
        _add_norm_kernel,
        *(x, delta, gain),
        grid=(x.shape[0],),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        num_warps=min(16, max(1, width // 512)),
        interpret=interpret,
        width=width,
        eps=eps,
    )
    return total, normed
