"""What the sampling kernels and their oracles share: a row's settings, its random bits, and some arithmetic.

Functions are of arrays that broadcast, or of a kernel's tiles.
"""

import jax.numpy as jnp
from jax import lax

from .common import LOG2E

# The columns of `sampling`. nanovllm_jax/sampling_rows.py has the same, and says what they are; a test compares them.
SEED, PENALTIES = ("seed_low", "seed_high"), ("repetition", "frequency", "presence")
CUTS = ("temperature", "top_k", "top_p", "min_p")
COLUMNS = (*SEED, *CUTS, *PENALTIES, "min_len", "adjusts", "num_top")
FLOAT_COLUMNS = ("temperature", "top_p", "min_p", *PENALTIES)  # there as their bits
MAX_LOGPROBS = 20
COUNT = (1 << 24) - 1  # the bits of a token's entry in token_counts that count how often it was generated
PROMPT = 1 << 24  # the bit of a token that is in the prompt
ENDS = 1 << 25  # and of one that would end the text


def settings(sampling, names, row=slice(None)):
    """Columns by name, each of its type: of all rows [R], or of one; `sampling` may be a ref."""

    def column(name):
        bits = sampling[row, COLUMNS.index(name)]
        return lax.bitcast_convert_type(bits, jnp.float32) if name in FLOAT_COLUMNS else bits

    return [column(name) for name in names]


def adjusted(logits, counts, bias, suppress_ends, repetition, frequency, presence):
    """The arithmetic, for arrays that broadcast; counts as in token_counts."""
    x = jnp.where(suppress_ends & ((counts & ENDS) != 0), -jnp.inf, logits + bias)
    generated = counts & COUNT
    seen = (generated > 0) | ((counts & PROMPT) != 0)
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    return x - frequency * generated.astype(jnp.float32) - jnp.where(generated > 0, presence, 0.0)


def row_key(sampling, positions, row=slice(None)):
    """The two uint32 words of a row's noise, of all rows or one: jax.random.fold_in of its seed and position.

    Over a large vocabulary Threefry would take longer than reading the logits. So it makes one key for a row, whose
    noise is a keyed hash of the entry's number.
    """
    low, high = (word.astype(jnp.uint32) for word in settings(sampling, SEED, row))
    return threefry((low, high), positions[row].astype(jnp.uint32))


def threefry(key, number):
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011) of (0, number): two words uint32, for two of a key's."""
    words = *key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    a, b = words[0], words[1] + number
    for step in range(1, 6):
        for turn in (13, 15, 26, 6) if step % 2 else (17, 29, 16, 24):
            a += b
            b = a ^ ((b << turn) | (b >> (32 - turn)))
        a, b = a + words[step % 3], b + words[(step + 1) % 3] + jnp.uint32(step)
    return a, b


def noise_bits(key, entries):
    """32 random bits an entry: a keyed hash of its number, two rounds of a mixer with a word of the key before each."""
    return _mix(_mix(entries ^ key[0]) ^ key[1])


def _mix(x):
    """A bijection of uint32 in which every input bit flips each output bit half the time (lowbias32, C. Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def uniform(bits):
    """Bits as float32 numbers between 0 and 1, for -log1p(-x).

    The small end of that exponential decides who wins, and there all 32 bits count. At the large end they would round
    to 1, whose noise is -inf: an entry that alone is above its threshold would have no score to win by.
    """
    return jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)


def asks_threshold(temperature, top_k, top_p, min_p, vocab: int):
    """Whether a row's settings leave anything out: a temperature of 0 takes the best whatever they are."""
    return (temperature > 0) & (((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0))


def inverse_temperature(temperature):
    """log2(e) / temperature, finite: the exponent of 2 for a difference of two logits, which may be 0."""
    return jnp.minimum(LOG2E / temperature, 1e37)
