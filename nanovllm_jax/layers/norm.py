"""RMS normalisation (Zhang and Sennrich, 2019), rounded where transformers rounds."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.kernels import add_norm, all_reduce_norm
from nanovllm_jax.kernels.reference import rms_norm
from nanovllm_jax.layers.linear import Parts, param
from nanovllm_jax.parallel.sharding import MODEL_AXIS


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; the statistics are float32."""

    def __init__(self, features: int, eps: float, *, dtype: jnp.dtype):
        self.weight = param(jnp.ones((features,), dtype), None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., features] -> the same shape and dtype."""
        return rms_norm(x, self.weight[...], self.eps)

    def add(self, x: jax.Array, delta: Parts, *, fixed: bool = False) -> tuple[jax.Array, jax.Array]:
        """x [..., features], and parts of what is added to it -> their sum, and its norm, in one pass over memory."""
        rows, gain = x.reshape(-1, x.shape[-1]), self.weight[...]
        here = delta.here.reshape(-1, *rows.shape)
        if delta.peers is None:
            total, normed = add_norm(rows, here, gain, self.eps, fixed=fixed)
        else:
            total, normed = all_reduce_norm(rows, here, gain, delta.peers, self.eps, axis=MODEL_AXIS)
        return total.reshape(x.shape), normed.reshape(x.shape)
