"""The sampling kernels' oracles in plain jnp: same signatures. They are what a CPU runs.

A step in which no row asks skips all but the draw. Shapes: R rows, V vocabulary, S slots.
"""

import jax.numpy as jnp
from jax import lax
from jax.nn import log_softmax

from .common import LOG2E

MAX_LOGPROBS = 20
COUNT = (1 << 24) - 1  # the bits of a token's entry in token_counts that count how often it was generated
PROMPT = 1 << 24  # the bit of a token that is in the prompt
ENDS = 1 << 25  # and of one that would end the text


def adjust_logits(logits, slots, asks, suppress_ends, repetition, frequency, presence, token_counts, logit_bias):
    """See nanovllm_jax.kernels.adjust_logits."""
    rows = (suppress_ends, repetition, frequency, presence)

    def adjust():
        new = adjusted(logits, token_counts[slots], logit_bias[slots], *(x[:, None] for x in rows))
        return jnp.where(asks[:, None] > 0, new, logits)

    return lax.cond((asks > 0).any(), adjust, lambda: logits), logits


def adjusted(logits, counts, bias, suppress_ends, repetition, frequency, presence):
    """The arithmetic, for arrays that broadcast; counts as in token_counts."""
    x = jnp.where((suppress_ends > 0) & ((counts & ENDS) != 0), -jnp.inf, logits + bias)
    generated = counts & COUNT
    seen = (generated > 0) | ((counts & PROMPT) != 0)
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    return x - frequency * generated.astype(jnp.float32) - jnp.where(generated > 0, presence, 0.0)


def noisy_argmax(logits, temperature, keys, threshold, first):
    """See nanovllm_jax.kernels.noisy_argmax."""
    # Written so that NaN stays: argmax finds it.
    logits = jnp.where(logits < threshold[:, None], -jnp.inf, logits)
    greedy = temperature[:, None] == 0
    entries = jnp.arange(logits.shape[1], dtype=jnp.uint32) + first.astype(jnp.uint32)
    scaled = logits / jnp.where(greedy, 1, temperature[:, None])
    scores = jnp.where(greedy, logits, scaled + gumbel(keys, entries))
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return best, jnp.take_along_axis(scores, best[:, None], axis=-1)[:, 0]


def gumbel(keys, entries):
    """Standard Gumbel noise [R, N] float32 of rows' keys [R, 2] uint32 and entries [N] uint32 of a vocabulary."""
    bits = noise_bits((keys[:, :1], keys[:, 1:]), entries[None])
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


def sampling_threshold(logits, temperature, top_k, top_p, min_p):
    """See nanovllm_jax.kernels.sampling_threshold."""
    vocab = logits.shape[1]
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


def token_logprobs(logits, raw, use_raw, tokens, num_top):
    """See nanovllm_jax.kernels.token_logprobs."""
    rows, vocab = logits.shape
    most = min(MAX_LOGPROBS, vocab)

    def compute():
        x = jnp.where(use_raw[:, None] > 0, raw, logits)
        logprobs = lax.map(log_softmax, x)  # one by one: a sum's order must not depend on the other rows
        own = jnp.take_along_axis(x, tokens[:, None], axis=1)
        _, ids = lax.top_k(x, most)  # of equal ones the lower id first
        wide = [(0, 0), (0, MAX_LOGPROBS - most)]
        rank = 1 + (x > own).sum(axis=1, dtype=jnp.int32)
        logprob, best = (jnp.take_along_axis(logprobs, at, axis=1) for at in (tokens[:, None], ids))
        return logprob[:, 0], rank, jnp.pad(ids, wide), jnp.pad(best, wide)

    def skip():
        top = rows, MAX_LOGPROBS
        return jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.zeros(top, jnp.int32), jnp.zeros(top)

    return lax.cond((num_top >= 0).any(), compute, skip)
