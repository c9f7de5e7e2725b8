"""Token embedding, which is also the output head of tied models."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.layers.linear import MatMul, matmul, param


class Embedding(nnx.Module):
    """A [V, D] table with two uses: look tokens up, and score hidden states against every token."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        stddev: float = 0.02,
        matmul: MatMul = matmul,
    ):
        self.matmul = matmul
        table = stddev * jax.random.normal(rngs.params(), (vocab_size, hidden_size), dtype)
        self.weight = param(table, "vocab", "embed")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 in [0, V) -> [..., D]."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> logits [..., V] float32."""
        return self.matmul(x, self.weight[...], out_dtype=jnp.float32)
