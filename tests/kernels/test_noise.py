"""Noise and the best entry of each row: the oracle against float64, the interpreted kernel against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import noise, noisy_argmax, reference_sampling, sampling, vocabulary
from sampling_array import sampling_array

IMPL = "threefry2x32"  # whatever JAX's default is


def interpreted(block, programs):
    tiles = vocabulary.Tiles(block, programs, num_warps=4)
    return jax.jit(functools.partial(noise.noisy_argmax, tiles=tiles, interpret=True))


def by_columns(draw):
    """draw, of columns that are packed for it."""

    def call(logits, temperature, seeds, positions, *rest):
        return draw(logits, sampling_array(len(logits), temperature=temperature, seeds=seeds), positions, *rest)

    return call


ORACLE = by_columns(noisy_argmax)
KERNELS = {"kernel": interpreted(128, 1), "cut": interpreted(64, 3), "one tile": interpreted(1024, 1)}
KERNELS = {name: by_columns(draw) for name, draw in KERNELS.items()}
either = pytest.mark.parametrize("draw", [ORACLE, *KERNELS.values()], ids=["oracle", *KERNELS])


def inputs(rows=6, vocab=300, seed=0):
    """Rows of many temperatures, of which the third is 0, and of thresholds that leave something out in every other.

    Tests to which its size does not matter have one in common, and its programs.
    """
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((rows, vocab))).astype(np.float32)
    temperatures = np.where(np.arange(rows) % 3 == 2, 0, rng.uniform(0.01, 3, rows)).astype(np.float32)
    seeds, positions = rng.integers(0, 2**32, (rows, 2), np.uint32), rng.integers(0, 2**20, rows, np.int32)
    thresholds = np.where(np.arange(rows) % 2, np.median(logits, axis=1), -np.inf).astype(np.float32)
    return logits, temperatures, seeds, positions, thresholds


def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@jax.jit
def keys_of(seeds, positions):
    """Rows' keys [R, 2], as JAX makes them."""
    fold_in = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.wrap_key_data(seed, impl=IMPL), position))
    return jax.random.key_data(fold_in(seeds, positions))


def exact(logits, temperatures, seeds, positions, thresholds):
    """Scores in float64, of Python's integers."""
    keys = np.asarray(keys_of(seeds, positions))
    a, b = keys.astype(object).T[..., None]
    entries = mix(mix(np.arange(logits.shape[1], dtype=object) ^ a) ^ b)
    uniform = np.minimum((entries.astype(np.float64) + 0.5) / 2**32, 1 - 2.0**-24)
    divisor = np.where(temperatures > 0, temperatures, 1).astype(np.float64)[:, None]
    scores = np.where(temperatures[:, None] > 0, logits / divisor - np.log(-np.log1p(-uniform)), logits)
    return np.where(logits < thresholds[:, None], -np.inf, scores)


@either
@pytest.mark.parametrize(("rows", "vocab"), [(1, 300), (7, 131), (5, 2000), (3, 1), (4, 64)])
def test_the_best_of_float64_scores(draw, rows, vocab):
    args = inputs(rows, vocab)
    scores = exact(*args)
    entries, found = draw(*args)
    np.testing.assert_array_equal(entries, scores.argmax(axis=1))
    np.testing.assert_allclose(found, scores.max(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", KERNELS.values(), ids=KERNELS)
def test_the_kernel_draws_what_the_oracle_draws(draw):
    for seed in range(20):
        args = inputs(9, 700, seed)
        for got, want in zip(draw(*args), ORACLE(*args)):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@either
def test_of_equal_ones_the_lowest(draw):
    logits, temperatures, *rest = inputs()
    logits[:] = -1
    for row, places in enumerate(((299, 7), (130, 66, 65), (0, 299), (200, 72), (64, 128), (298, 299))):
        logits[row, list(places)] = 2
    entries, scores = draw(logits, 0 * temperatures, *rest)
    np.testing.assert_array_equal(entries, [7, 65, 0, 72, 64, 298])
    np.testing.assert_array_equal(scores, np.full(6, 2, np.float32))


@either
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_no_number(draw, temperature):
    """It is found, wherever it is, and its score tells; nobody else notices."""
    logits, temperatures, *rest = inputs()
    good = draw(logits, np.full_like(temperatures, temperature), *rest)
    logits[0, 17], logits[1, 299], logits[2, 0] = np.nan, np.inf, np.nan
    logits[3] = -np.inf
    entries, scores = draw(logits, np.full_like(temperatures, temperature), *rest)
    np.testing.assert_array_equal(entries[:3], [17, 299, 0])
    assert not np.isfinite(scores[:4]).any()
    assert 0 <= entries[3] < 300
    for got, want in zip((entries, scores), good):
        np.testing.assert_array_equal(got[4:], want[4:])


@either
def test_two_that_are_no_numbers(draw):
    logits, *rest = inputs()
    logits[:, 3], logits[:, 7] = [np.inf, np.nan] * 3, [np.nan, np.inf] * 3
    entries, scores = draw(logits, *rest)
    assert np.isin(entries, (3, 7)).all()
    assert not np.isfinite(scores).any()


def test_noise_of_all_sizes():
    """The kernel's series and logarithm, against float64: from the smallest number there is to the largest."""
    rng = np.random.default_rng(0)
    bits = np.concatenate((
        np.arange(100),
        2**32 - 1 - np.arange(300),
        2**28 + np.arange(-200, 200),  # where the series ends
        rng.integers(0, 2**32, 5000),
        2 ** rng.uniform(0, 32, 5000),
    )).astype(np.uint32)  # fmt: skip
    got = noise._gumbel(jnp.asarray(bits), on_gpu=False)
    uniform = np.asarray(sampling.uniform(bits), np.float64)
    np.testing.assert_allclose(uniform, (bits + 0.5) / 2**32, atol=2.0**-24)
    np.testing.assert_allclose(got, -np.log(-np.log1p(-uniform)), atol=1e-5)
    assert np.isfinite(got).all()
    seed, position = np.zeros((1, 2), np.uint32), np.zeros(1, np.int32)
    want = exact(np.zeros((1, 9), np.float32), np.ones(1), seed, position, np.full(1, -np.inf))
    key = keys_of(seed, position).T
    np.testing.assert_allclose(reference_sampling.gumbel(key, jnp.arange(9, dtype=jnp.uint32)), want, atol=1e-5)


def test_keys_are_those_of_fold_in():
    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(0, 2**32, (1000, 2), np.uint32), rng.integers(0, 2**31 - 1, 1000, np.int32)
    seeds[:3], positions[:3] = 0, (0, 1, 2**31 - 1)
    seeds[3:6] = 2**32 - 1
    key = sampling.row_key(jnp.asarray(sampling_array(1000, seeds=seeds)), jnp.asarray(positions))
    np.testing.assert_array_equal(np.stack(key, axis=1), keys_of(seeds, positions))
