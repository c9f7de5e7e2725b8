"""Drawing tokens: the right distribution, the same draw for the same request whatever runs beside it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import noisy_argmax, reference_sampling
from sampling_array import sampling_array

from nanovllm_jax import SamplingParams, kernels
from nanovllm_jax.sampling_rows import FLOAT_COLUMNS, SamplingRows

DRAWS = 20_000
LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 0.5, -np.inf, 1.5, -3.0], np.float32)
compiled = jax.jit(noisy_argmax)


def test_the_kernels_know_the_columns():
    assert SamplingRows._fields == kernels.sampling.COLUMNS
    assert sorted(kernels.sampling.FLOAT_COLUMNS) == sorted(FLOAT_COLUMNS)


def draw_scored(logits, temperature, seeds, positions, thresholds=-np.inf):
    """`noisy_argmax`, of columns that are packed for it."""
    sampling = sampling_array(len(logits), temperature=temperature, seeds=seeds)
    return compiled(logits, sampling, positions, np.full(len(logits), thresholds, np.float32))


def draw(*args):
    return draw_scored(*args)[0]


def rows(count, logits=LOGITS, temperature=1.0, seeds=None, positions=None):
    """Arguments of `draw` for `count` rows of one distribution."""
    seeds = np.zeros((count, 2), np.uint32) if seeds is None else seeds
    positions = np.zeros(count, np.int32) if positions is None else positions
    return np.tile(logits, (count, 1)), np.full(count, temperature, np.float32), seeds, positions


@partial(jax.jit, static_argnums=2)
def noise_of(sampling, positions, size):
    return reference_sampling.gumbel(kernels.sampling.row_key(sampling, positions), jnp.arange(size, dtype=jnp.uint32))


def gumbel(seeds, positions, size):
    """The noise of rows, over a vocabulary of this size."""
    return noise_of(sampling_array(len(seeds), seeds=seeds), positions, size)


def seeds_of(count):
    return np.stack([np.arange(count), np.full(count, 7)], axis=1).astype(np.uint32)


def softmax(logits):
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_draws_follow_the_softmax(temperature, varied):
    """Over many seeds at one position, and over one seed's many positions: chi-square at 1 in 100,000."""
    vary = dict(seeds=seeds_of(DRAWS)) if varied == "seeds" else dict(positions=np.arange(DRAWS, dtype=np.int32))
    counts = np.bincount(draw(*rows(DRAWS, temperature=temperature, **vary)), minlength=LOGITS.size)
    expected = DRAWS * softmax(LOGITS / temperature)
    assert counts[expected == 0].sum() == 0
    kept = expected >= 5
    rest = counts[~kept].sum() - expected[~kept].sum()
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum() + rest**2 / max(expected[~kept].sum(), 1)
    assert chi2 < 36  # 7 degrees of freedom


def test_neighbouring_seeds_and_positions_are_independent():
    """Pairs of draws, of seed s and s + 1 and of position p and p + 1, are alike as often as chance has it."""
    chance = (softmax(LOGITS) ** 2).sum()
    for vary in (dict(seeds=seeds_of(DRAWS)), dict(positions=np.arange(DRAWS, dtype=np.int32))):
        tokens = np.asarray(draw(*rows(DRAWS, **vary)))
        alike = (tokens[1:] == tokens[:-1]).mean()
        assert abs(alike - chance) < 4 * np.sqrt(chance / DRAWS)


def test_both_halves_of_a_seed_count():
    seeds = np.random.default_rng(0).integers(0, 2**32, (64, 2), np.uint32)
    flat = np.zeros(1000, np.float32)
    drawn = {
        half: np.asarray(draw(*rows(64, flat, seeds=seeds * np.uint32(half)))) for half in ((1, 1), (1, 0), (0, 1))
    }
    assert (drawn[1, 1] != drawn[1, 0]).sum() > 56
    assert (drawn[1, 1] != drawn[0, 1]).sum() > 56


@pytest.fixture(scope="module")
def noise():
    """The noise of 16 (seed, position) pairs, neighbours all, over Qwen3's vocabulary, brought back to [0, 1]."""
    seeds = np.repeat(seeds_of(4), 4, axis=0)
    positions = np.tile(np.arange(4, dtype=np.int32), 4)
    values = np.asarray(gumbel(seeds, positions, 151_936), np.float64)
    return np.exp(-np.exp(-values))


def test_noise_is_gumbels(noise):
    """Kolmogorov and Smirnov's distance of each row, at 1 in 100,000."""
    steps = np.arange(1, noise.shape[1] + 1) / noise.shape[1]
    assert np.abs(np.sort(noise) - steps).max() < 2.5 / np.sqrt(noise.shape[1])


def test_noise_of_rows_and_entries_is_uncorrelated(noise):
    limit = 5 / np.sqrt(noise.shape[1])
    rows_alike = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(rows_alike).max() < limit
    for lag in (1, 2, 3, 4, 16, 256, 4096, 65536):
        for row in noise:
            assert abs(np.corrcoef(row[lag:], row[:-lag])[0, 1]) < 5 / np.sqrt(row.size - lag), lag


def test_the_noise_is_one_whatever_jax_draws_by():
    arguments = seeds_of(4), np.arange(4, dtype=np.int32), 100
    expected = gumbel(*arguments)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(gumbel(*arguments), expected)


def test_no_two_rows_share_their_noise():
    """Both words of the key count: of 300,000 keys of 32 bits, ten pairs would be equal."""
    rows = np.arange(300_000, dtype=np.int32)
    found = np.asarray(gumbel(np.full((rows.size, 2), 5, np.uint32), rows, 4))
    assert len(np.unique(found, axis=0)) == rows.size


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((9, 33), np.float32)
    temperatures = rng.uniform(0.5, 2, 9).astype(np.float32)
    seeds, positions = seeds_of(9), rng.integers(0, 4096, 9, np.int32)
    together = np.asarray(draw(logits, temperatures, seeds, positions))
    order = rng.permutation(9)
    np.testing.assert_array_equal(
        draw(logits[order], temperatures[order], seeds[order], positions[order]), together[order]
    )
    for i in range(9):
        alone = draw(logits[i : i + 1], temperatures[i : i + 1], seeds[i : i + 1], positions[i : i + 1])
        assert alone == together[i]


def test_greedy_and_sampling_rows_in_one_batch():
    logits, _, seeds, positions = rows(64, seeds=seeds_of(64))
    temperatures = np.tile([0, 2], 32).astype(np.float32)
    tokens = np.asarray(draw(logits, temperatures, seeds, positions))
    assert (tokens[::2] == LOGITS.argmax()).all()
    assert len(set(tokens[1::2].tolist())) > 3


@pytest.mark.parametrize("temperature", [0, 0.01])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_low_temperatures_take_the_best(temperature, scale):
    tokens = draw(*rows(100, scale * LOGITS, temperature, seeds_of(100)))
    assert (np.asarray(tokens) == LOGITS.argmax()).all()


def test_the_first_of_equal_logits_is_greedy():
    assert draw(*rows(1, jnp.zeros(5), 0)) == 0


def test_whoever_is_alone_is_drawn():
    """Bits that are all but 2**32 are a number below 1 as well: its noise is low, and finite."""
    seeds, position, entry = np.array([[34, 0]], np.uint32), np.array([5], np.int32), 25_645
    assert -3 < gumbel(seeds, position, entry + 1)[0, entry] < -2.5, "the lowest that there is"
    logits = np.full((1, entry + 1), -5, np.float32)
    logits[0, entry] = 20
    token, score = draw_scored(logits, 1, seeds, position, 20)
    assert token == entry
    assert np.isfinite(score)


def test_the_highest_temperature():
    """What is accepted divides what it likes, infinity too: no NaN."""
    temperature = np.full(4, SamplingParams(temperature=3e38).temperature, np.float32)
    logits = np.array([[1.0, -np.inf, 2.0, -np.inf]] * 4, np.float32)
    tokens, scores = draw_scored(logits, temperature, seeds_of(4), np.arange(4))
    assert np.isfinite(scores).all()
    assert set(tokens.tolist()) <= {0, 2}
