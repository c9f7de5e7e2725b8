"""Sampling kernels over logits that are out to break them, against float64: oracles and interpreted kernels on a CPU,
the compiled ones over Qwen3's vocabulary on a GPU. Every other row is NaN or infinite, and nobody else may notice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import (
    adjust,
    adjust_logits,
    noise,
    noisy_argmax,
    reference_sampling,
    sampling_threshold,
    threshold,
    token_logprobs,
    vocabulary,
)
from nanovllm_jax.kernels import logprobs as logprobs_kernel
from sampling_array import sampling_array
from sampling_cases import ENDS, PROMPT, adjusted, kept, logprobs

SETTINGS = [  # temperature, top_k, top_p, min_p
    (1, 5, 1, 0),
    (0.01, 3, 1, 0.01),
    (1, 0, 1, 0.5),
    (100, 1, 1, 0),
    (1, 0, 1e-6, 0),
    (0, 7, 0.5, 0.5),
]


def random(rng, vocab):
    return 3 * rng.standard_normal(vocab)


def huge(rng, vocab):
    return 1e37 * rng.standard_normal(vocab)


def tiny(rng, vocab):
    return np.ldexp(1 + rng.random(vocab), -120)


def all_equal(rng, vocab):
    return np.full(vocab, 7.25)


def one_dominant(rng, vocab):
    row = rng.standard_normal(vocab)
    row[rng.integers(vocab)] = 1e4
    return row


def nearly_all_masked(rng, vocab):
    row = np.full(vocab, -np.inf)
    at = rng.choice(vocab, 9, replace=False)
    row[at] = rng.standard_normal(9)
    return row


VALUES = [random, huge, tiny, all_equal, one_dominant, nearly_all_masked]
BAD = [np.nan, np.inf, -np.inf]


def stressed(rows, vocab):
    """(logits [R, V], which rows are good)."""
    rng = np.random.default_rng(rows)
    logits = np.array([VALUES[i // 2 % len(VALUES)](rng, vocab) for i in range(rows)], np.float32)
    good = np.arange(rows) % 2 == 0
    for i in np.flatnonzero(~good):
        logits[i, rng.integers(vocab)] = BAD[i // 2 % 3]
        if i % 8 == 7:
            logits[i] = BAD[i // 8 % 3]
    return logits, good


def check_threshold(find, rows, vocab):
    logits, good = stressed(rows, vocab)
    settings = [SETTINGS[i // 2 // len(VALUES) % len(SETTINGS)] for i in range(rows)]
    seeds, positions = np.stack([np.arange(rows)] * 2, axis=1), np.arange(rows, dtype=np.int32)
    columns = dict(zip(("temperature", "top_k", "top_p", "min_p"), zip(*settings)))
    sampling = jnp.asarray(sampling_array(rows, seeds=seeds, **columns))
    found = np.asarray(find(jnp.asarray(logits), sampling))
    for i in np.flatnonzero(good & (np.array(columns["temperature"]) > 0)):
        keep = (logits[i] >= found[i]) & (logits[i] > -np.inf)
        np.testing.assert_array_equal(keep, kept(logits[i], *settings[i]), err_msg=f"row {i}: {settings[i]}")
    tokens = np.asarray(jax.jit(noisy_argmax)(logits, sampling, positions, found)[0])
    assert ((tokens >= 0) & (tokens < vocab)).all()
    for i in np.flatnonzero(good):
        assert kept(logits[i], *settings[i])[tokens[i]], f"row {i}: {settings[i]}"


def check_adjust(change, rows, vocab):
    logits, good = stressed(rows, vocab)
    rng = np.random.default_rng(0)
    counts = rng.choice([0, 0, 1, 2**24 - 1, PROMPT, PROMPT + 3, ENDS], (rows, vocab)).astype(np.int32)
    bias = rng.choice([0, 0, 100, -100], (rows, vocab)).astype(np.float32)
    columns = [rng.choice(x, rows).astype(np.float32) for x in ([1, 1e-6, 1e6, 1.3], [0, 2, -2], [0, 2, -2])]
    suppress, asks = (rng.integers(0, 2, rows) for _ in range(2))
    penalties = dict(zip(("repetition", "frequency", "presence"), columns))
    sampling = sampling_array(rows, adjusts=asks, min_len=suppress + 5, **penalties)
    args = jnp.asarray(sampling), jnp.arange(rows), jnp.full(rows, 5)
    out, _ = change(jnp.asarray(logits), *args, jnp.asarray(counts), jnp.asarray(bias))
    out = np.asarray(out)
    for i in np.flatnonzero(good):
        expected = logits[i]
        if asks[i]:
            with np.errstate(over="ignore"):
                expected = adjusted(logits[i], counts[i], bias[i], suppress[i], *(c[i] for c in columns))
                expected = expected.astype(np.float32)
        np.testing.assert_allclose(out[i], expected, rtol=1e-6, atol=1e-4)


def check_logprobs(find, rows, vocab):
    logits, good = stressed(rows, vocab)
    tokens = np.where(good, logits.argmax(axis=1), 0).astype(np.int32)
    num_top = np.resize([9, 0, -1, 5], rows)
    args = jnp.asarray(sampling_array(rows, num_top=num_top)), jnp.asarray(tokens)
    numbers = np.asarray(find(jnp.asarray(logits), jnp.asarray(logits), *args))
    found, values = numbers[:, 0], numbers[:, 1].view(np.float32)
    for i in np.flatnonzero(good & (num_top >= 0)):
        n = num_top[i]
        own, rank, ids, best = logprobs(logits[i], tokens[i], n)
        np.testing.assert_array_equal(found[i, : 1 + n], [rank, *ids])
        np.testing.assert_allclose(values[i, : 1 + n], [own, *best], rtol=1e-5, atol=1e-5)


def check_draw(draw, rows, vocab):
    logits, good = stressed(rows, vocab)
    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(0, 2**32, (rows, 2), np.uint32), rng.integers(0, 2**20, rows, np.int32)
    sampling = sampling_array(rows, temperature=rng.choice([0, 0.01, 1, 1e37], rows), seeds=seeds)
    thresholds = rng.choice([-np.inf, 0], rows).astype(np.float32)
    args = [jnp.asarray(x) for x in (logits, sampling, positions, thresholds)]
    (entries, scores), (expected, highest) = draw(*args), jax.jit(reference_sampling.noisy_argmax)(*args)
    np.testing.assert_array_equal(np.isfinite(scores), np.isfinite(highest))
    np.testing.assert_array_equal(entries[good], expected[good])
    np.testing.assert_allclose(scores[good], highest[good], rtol=1e-5, atol=2e-5)


TILES = vocabulary.Tiles(256, 2, 4)
INTERPRETED = {
    check_threshold: partial(
        threshold.sampling_threshold, tiles=threshold.Tiles(TILES, block=256, bits=3, num_warps=4), interpret=True
    ),
    check_adjust: partial(adjust.adjust_logits, tiles=TILES, interpret=True),
    check_logprobs: partial(
        logprobs_kernel.token_logprobs, tiles=logprobs_kernel.Tiles(TILES, num_warps=4), interpret=True
    ),
    check_draw: partial(noise.noisy_argmax, tiles=TILES, interpret=True),
}
PUBLIC = {check_threshold: sampling_threshold, check_adjust: adjust_logits}
PUBLIC |= {check_logprobs: token_logprobs, check_draw: noisy_argmax}
CHECKS = pytest.mark.parametrize("check", PUBLIC, ids=lambda check: check.__name__.removeprefix("check_"))


@CHECKS
@pytest.mark.parametrize("kernels", [PUBLIC, INTERPRETED], ids=["oracle", "interpreted"])
def test_on_a_cpu(check, kernels):
    check(jax.jit(kernels[check]), rows=72, vocab=700)


@pytest.mark.gpu
@CHECKS
@pytest.mark.parametrize(("rows", "vocab"), [(2, 151_936), (64, 151_936), (512, 32_001)])
def test_on_a_gpu(check, rows, vocab):
    check(jax.jit(PUBLIC[check]), rows, vocab)
