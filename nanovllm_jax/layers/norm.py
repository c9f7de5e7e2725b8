"""RMS normalisation (Zhang and Sennrich, 2019), rounded where transformers rounds."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nanovllm_jax.layers.linear import param


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; the statistics are float32."""

    def __init__(self, features: int, eps: float, *, dtype: jnp.dtype):
        self.weight = param(jnp.ones((features,), dtype), None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., features] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...]
