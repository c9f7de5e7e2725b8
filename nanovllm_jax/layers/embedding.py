"""Token embedding, which is also the output head of tied models."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.layers.linear import STDDEV, fixed_matmul, matmul, param
from nanovllm_jax.parallel.sharding import is_split, local_index, sum_over


class Embedding(nnx.Module):
    """A [V, D] table with two uses: look tokens up, and score hidden states against every token."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        fixed: bool = False,
    ):
        self.fixed = fixed
        table = STDDEV * jax.random.normal(rngs.params(), (vocab_size, hidden_size), dtype)
        self.weight = param(table, "vocab", "embed")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 in [0, V) -> [..., D]."""
        return sum_over("vocab", self.own(tokens)) if is_split() else _look_up(self.weight[...], tokens)

    def own(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] of those in this device's part of the table, and zeros for the others."""
        table = self.weight[...]
        return jnp.take(table, local_index(tokens, len(table)), axis=0, mode="fill", fill_value=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> logits [..., V] float32, or a device's part of V."""
        return (fixed_matmul if self.fixed else matmul)(x, self.weight[...], out_dtype=jnp.float32)


@jax.custom_jvp
def _look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(table, tokens, axis=0, mode="clip")


@_look_up.defjvp
def _(primals, tangents):
    """In float32, or a frequent token's gradient would stand still: in bfloat16 256 + 1 is 256."""
    (table, tokens), (change, _) = primals, tangents
    return _look_up(table, tokens), _look_up(change.astype(jnp.float32), tokens).astype(table.dtype)
