"""RMS normalisation (Zhang and Sennrich, 2019), rounded where transformers rounds."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.kernels import add_norm
from nanovllm_jax.kernels.reference import rms_norm
from nanovllm_jax.layers.linear import param


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; the statistics are float32."""

    def __init__(self, features: int, eps: float, *, dtype: jnp.dtype):
        self.weight = param(jnp.ones((features,), dtype), None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., features] -> the same shape and dtype."""
        return rms_norm(x, self.weight[...], self.eps)

    def add(self, x: jax.Array, delta: jax.Array, *, fixed: bool = False) -> tuple[jax.Array, jax.Array]:
        """x [..., features], delta [S, ..., features] in parts -> their sum, and its norm, in one pass over memory."""
        rows = x.reshape(-1, x.shape[-1])
        total, normed = add_norm(rows, delta.reshape(len(delta), *rows.shape), self.weight[...], self.eps, fixed=fixed)
        return total.reshape(x.shape), normed.reshape(x.shape)
