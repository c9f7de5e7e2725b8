"""From logits to tokens, inside the compiled step.

Noise is counter-based: it depends on a request's seed and the position of the token alone, never on the batch.
"""

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, temperatures: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """Draw one token a row from softmax(logits / temperature), by the Gumbel-max trick; temperature 0 is argmax.

    logits [R, V] float32, temperatures [R] float32, seeds [R, 2] uint32, positions [R] int32 (of the drawn token)
    -> [R] int32.
    """
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds), positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)  # (R, V)
    greedy = temperatures[:, None] == 0
    scaled = logits / jnp.where(greedy, 1, temperatures[:, None])
    return jnp.argmax(jnp.where(greedy, logits, scaled + noise), axis=-1).astype(jnp.int32)
