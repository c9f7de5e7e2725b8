"""From logits to tokens, inside the compiled step.

Noise is counter-based: a function of the request's seed, the token's position and the vocabulary entry, whatever else
is in the batch.
"""

import jax
import jax.numpy as jnp

from nanovllm_jax.parallel.sharding import first_of_shard
from nanovllm_jax.parallel.vocabulary import best_of_shards


def sample(
    logits: jax.Array,
    temperatures: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    thresholds: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row from softmax(logits / temperature), by the Gumbel-max trick; temperature 0 is argmax.

    logits [R, V] float32 (or a device's part of V), temperatures [R] float32, seeds [R, 2] uint32, positions [R] int32
    (of the drawn token); thresholds [R] float32: entries below a row's are never drawn. Returns the tokens [R] int32
    and their scores [R], which are logits where the temperature is 0.
    """
    # Written so that NaN stays: argmax finds it, and `draw` sees it.
    logits = jnp.where(logits < thresholds[:, None], -jnp.inf, logits)
    greedy = temperatures[:, None] == 0
    scaled = logits / jnp.where(greedy, 1, temperatures[:, None])
    noise = gumbel(seeds, positions, logits.shape[1])
    scores = jnp.where(greedy, logits, scaled + noise)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    score = jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]
    return best_of_shards(best + first_of_shard(scores.shape[-1]), score)


def gumbel(seeds: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Standard Gumbel noise [R, size] float32 for each (seed, position), of seeds [R, 2] uint32 and positions [R].

    Threefry makes one key for a row. Over a large vocabulary it would take longer than reading the logits, so the row
    itself is a keyed hash of the entry's number: two rounds of a 32-bit mixer, a word of the key before each.
    """
    keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")  # whatever JAX's default is
    keys = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, positions))
    entries = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(first_of_shard(size))
    bits = _mix(_mix(entries[None] ^ keys[:, :1]) ^ keys[:, 1:])
    # The small end of the exponential decides who wins, and log1p keeps all 32 bits there. At the large end they would
    # round to 1, whose noise is -inf: an entry that alone is above its threshold would have no score to win by.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit flips each output bit half the time (lowbias32, C. Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
