"""From logits to tokens, inside the compiled step.

Noise is counter-based: a function of the request's seed, the token's position and the vocabulary entry, whatever else
is in the batch.
"""

import jax
import jax.numpy as jnp

from nanovllm_jax.kernels import noisy_argmax
from nanovllm_jax.parallel.sharding import first_of_shard
from nanovllm_jax.parallel.vocabulary import best_of_shards


def sample(
    logits: jax.Array, sampling: jax.Array, positions: jax.Array, thresholds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row from softmax(logits / temperature), by the Gumbel-max trick; temperature 0 is argmax.

    logits [R, V] float32 (or a device's part of V), sampling [R, 12] int32 (SamplingRows), positions [R] int32 (of the
    drawn token); thresholds [R] float32: entries below a row's are never drawn. Returns the tokens [R] int32 and their
    scores [R], which are logits where the temperature is 0.
    """
    first = jnp.full(1, first_of_shard(logits.shape[1]), jnp.int32)
    best, scores = noisy_argmax(logits, sampling, positions, thresholds, first)
    return best_of_shards(best + first, scores)
