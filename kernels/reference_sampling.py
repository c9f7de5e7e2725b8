"""The sampling kernels' oracles in plain jnp: same signatures, but for `fixed`. They are what a CPU runs.

A step in which no row asks skips all but the draw. Shapes: R rows, V vocabulary, S slots.
"""

import jax.numpy as jnp
from jax import lax
from jax.nn import log_softmax

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


def adjust_logits(logits, sampling, slots, positions, token_counts, logit_bias):
    """See nanovllm_jax.kernels.adjust_logits."""
    asks, min_len, *penalties = settings(sampling, ("adjusts", "min_len", *PENALTIES))

    def adjust():
        columns = (x[:, None] for x in (positions < min_len, *penalties))
        new = adjusted(logits, token_counts[slots], logit_bias[slots], *columns)
        return jnp.where(asks[:, None] > 0, new, logits)

    return lax.cond((asks > 0).any(), adjust, lambda: logits), logits


def adjusted(logits, counts, bias, suppress_ends, repetition, frequency, presence):
    """The arithmetic, for arrays that broadcast; counts as in token_counts."""
    x = jnp.where(suppress_ends & ((counts & ENDS) != 0), -jnp.inf, logits + bias)
    generated = counts & COUNT
    seen = (generated > 0) | ((counts & PROMPT) != 0)
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    return x - frequency * generated.astype(jnp.float32) - jnp.where(generated > 0, presence, 0.0)


def noisy_argmax(logits, sampling, positions, threshold):
    """See nanovllm_jax.kernels.noisy_argmax."""
    # Written so that NaN stays: argmax finds it.
    logits = jnp.where(logits < threshold[:, None], -jnp.inf, logits)
    [temperature] = settings(sampling, ["temperature"])
    greedy = temperature[:, None] == 0
    entries = jnp.arange(logits.shape[1], dtype=jnp.uint32)
    scaled = logits / jnp.where(greedy, 1, temperature[:, None])
    scores = jnp.where(greedy, logits, scaled + gumbel(row_key(sampling, positions), entries))
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return best, jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]


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


def gumbel(key, entries):
    """Standard Gumbel noise [R, N] float32 of rows' keys, two words [R] each, and entries [N] of a vocabulary."""
    bits = noise_bits([word[:, None] for word in key], entries[None])
    return -jnp.log(-jnp.log1p(-uniform(bits)))


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


def sampling_threshold(logits, sampling):
    """See nanovllm_jax.kernels.sampling_threshold."""
    vocab = logits.shape[1]
    temperature, top_k, top_p, min_p = settings(sampling, CUTS)
    asks = asks_threshold(temperature, top_k, top_p, min_p, vocab)

    def find():
        x = -jnp.sort(-logits, axis=1)
        top = x[:, :1]
        floor = top + (temperature * jnp.log(min_p))[:, None]
        kth = jnp.take_along_axis(x, jnp.clip(top_k, 1, vocab)[:, None] - 1, axis=1)
        floor = jnp.where((top_k > 0)[:, None], jnp.maximum(floor, kth), floor)
        weight = jnp.exp2((x - top) * inverse_temperature(temperature)[:, None])
        mass = jnp.cumsum(jnp.where(x >= floor, weight, 0), axis=1)  # of an entry and those before it
        crossing = jnp.argmax(mass >= top_p[:, None] * mass[:, -1:], axis=1)
        nucleus = jnp.take_along_axis(x, crossing[:, None], axis=1)
        threshold = jnp.where((top_p < 1)[:, None], jnp.maximum(floor, nucleus), floor)
        return jnp.where(asks, threshold[:, 0], -jnp.inf)

    return lax.cond(asks.any(), find, lambda: jnp.full(len(logits), -jnp.inf))


def token_logprobs(logits, raw, sampling, tokens):
    """See nanovllm_jax.kernels.token_logprobs."""
    rows, vocab = logits.shape
    most = min(MAX_LOGPROBS, vocab)
    use_raw, num_top = settings(sampling, ("adjusts", "num_top"))

    def compute():
        x = jnp.where(use_raw[:, None] > 0, raw, logits)
        logprobs = lax.map(log_softmax, x)  # one by one: a sum's order must not depend on the other rows
        own = jnp.take_along_axis(x, tokens[:, None], axis=1)
        _, ids = lax.top_k(x, most)  # of equal ones the lower id first
        rank = 1 + (x > own).sum(axis=1, keepdims=True, dtype=jnp.int32)
        values = jnp.take_along_axis(logprobs, jnp.concatenate((tokens[:, None], ids), axis=1), axis=1)
        numbers = jnp.concatenate((rank, ids), axis=1), lax.bitcast_convert_type(values, jnp.int32)
        return jnp.pad(jnp.stack(numbers, axis=1), [(0, 0), (0, 0), (0, MAX_LOGPROBS - most)])

    return lax.cond((num_top >= 0).any(), compute, lambda: jnp.zeros((rows, 2, 1 + MAX_LOGPROBS), jnp.int32))
