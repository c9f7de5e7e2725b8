"""top_k, top_p and min_p: the oracle and the interpreted kernels keep exactly what plain NumPy keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import noisy_argmax, sampling_threshold, threshold, vocabulary
from sampling_array import sampling_array
from sampling_cases import Rows, distribution, kept, random_rows, rows_of

from nanovllm_jax import SamplingParams

inf = np.inf


def interpreted(block, programs, bits):
    tiles = threshold.Tiles(vocabulary.Tiles(256, programs, 4), block=block, bits=bits, num_warps=4)
    return jax.jit(functools.partial(threshold.sampling_threshold, tiles=tiles, interpret=True))


def packed(temperature, top_k, top_p, min_p, **columns):
    cuts = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return sampling_array(len(temperature), **cuts, **columns)


def by_columns(find):
    """find, of columns that are packed for it."""
    return lambda logits, *cuts: find(logits, packed(*cuts))


IMPLEMENTATIONS = {"oracle": sampling_threshold, "kernel": interpreted(256, 1, 3), "cut": interpreted(128, 2, 2)}
IMPLEMENTATIONS = {name: by_columns(find) for name, find in IMPLEMENTATIONS.items()}
either = pytest.mark.parametrize("find", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def assert_keeps(rows: Rows, thresholds, expected):
    """The entries from the threshold on that have any probability are the expected ones."""
    for i, (row, found, keep) in enumerate(zip(rows.logits, np.asarray(thresholds), expected, strict=True)):
        np.testing.assert_array_equal((row >= found) & (row > -inf), keep, err_msg=f"row {i}: {rows.one(i)[1:]}")


# Tests of 300 entries that need few rows have 8, which are one program.
# probabilities, (temperature, top_k, top_p, min_p), what is kept
BY_HAND = [
    ([0.1, 0.2, 0.3, 0.4], (1, 0, 0.6, 0), [2, 3]),  # the one that crosses p stays
    ([0.1, 0.2, 0.3, 0.4], (1, 0, 0.3, 0), [3]),
    ([0.1, 0.2, 0.3, 0.4], (1, 0, 1e-9, 0), [3]),
    ([0.1, 0.2, 0.3, 0.4], (1, 0, SamplingParams(top_p=1e-300).top_p, 0), [3]),
    ([0.5, 0.25, 0.25], (1, 0, 0.5, 0), [0]),  # p met exactly
    ([0.5, 0.25, 0.125, 0.125], (1, 0, 0.75, 0), [0, 1]),
    ([0.5, 0.25, 0.25], (1, 0, 0.75, 0), [0, 1, 2]),  # of equal ones all or none
    ([0.5, 0.25, 0.25], (1, 2, 1, 0), [0, 1, 2]),
    ([0.25, 0.25, 0.25, 0.25], (1, 1, 0.1, 1), [0, 1, 2, 3]),
    ([0.25, 0.5, 0.125, 0.125], (1, 1, 1, 0), [1]),
    ([0.25, 0.5, 0.125, 0.125], (1, 2, 1, 0), [0, 1]),
    ([0.25, 0.5, 0.125, 0.125], (1, 99, 1, 0), [0, 1, 2, 3]),
    ([0.25, 0.5, 0.125, 0.125], (1, 0, 1, 0.5), [0, 1]),  # min_p met exactly
    ([0.25, 0.5, 0.125, 0.125], (1, 0, 1, 0.25), [0, 1, 2, 3]),
    ([0.25, 0.5, 0.125, 0.125], (2, 0, 1, 0.5), [0, 1, 2, 3]),  # a temperature of 2 takes roots
    ([0.25, 0.5, 0.125, 0.125], (0.5, 0, 1, 0.5), [1]),
    ([0.25, 0.5, 0.125, 0.125], (1, 0, 1, 1), [1]),
    ([0.4, 0.3, 0.2, 0.1], (1, 2, 0.6, 0), [0, 1]),  # 0.4 is 0.57 of what top_k leaves
    ([0.4, 0.3, 0.2, 0.1], (1, 2, 0.5, 0), [0]),
    ([0.4, 0.3, 0.2, 0.1], (1, 3, 1, 0.7), [0, 1]),
    ([0.4, 0.3, 0.2, 0.1], (1, 0, 0.5, 0.7), [0]),  # and of what min_p leaves
    ([0.4, 0.3, 0.2, 0.1], (1, 0, 0.5, 0.2), [0, 1]),
    ([0, 0, 1, 0], (1, 3, 0.9, 0.1), [2]),  # all masked but one
    ([0, 0, 1, 0], (1, 0, 0.9, 0), [2]),
    ([0, 0, 1, 0], (0.01, 2, 1, 0), [2]),
    ([0.4, 0.3, 0.2, 0.1], (0.01, 0, 0.99, 0), [0]),
    ([0.4, 0.3, 0.2, 0.1], (1e6, 0, 0.7, 0), [0, 1, 2]),  # all but equally likely
    ([0.4, 0.3, 0.2, 0.1], (1e6, 0, 1, 0.99), [0, 1, 2, 3]),
    ([0.4, 0.3, 0.2, 0.1], (1e-30, 3, 0.99, 1e-9), [0]),
    ([0.5, 0.5, 0, 0], (1e-30, 0, 0.5, 0), [0, 1]),
]


@either
def test_cases_by_hand(find):
    probs, settings, expected = zip(*BY_HAND, strict=True)
    probs = np.array([list(p) + [0] * (4 - len(p)) for p in probs])
    with np.errstate(divide="ignore"):
        rows = rows_of(np.log(probs), settings)
    keep = [np.isin(np.arange(4), indices) for indices in expected]
    assert_keeps(rows, find(*rows), keep)
    for i, mine in enumerate(keep):  # and NumPy's definition is the one that was meant
        np.testing.assert_array_equal(kept(*rows.one(i)), mine, err_msg=str(BY_HAND[i]))


@either
@pytest.mark.parametrize(("rows", "vocab"), [(400, 300), (120, 512), (20, 1)])
def test_random_rows(find, rows, vocab):
    rows = random_rows(7, rows, vocab)
    sampling = rows.temperature > 0
    expected = [kept(*rows.one(i)) if sampling[i] else rows.logits[i] > -inf for i in range(len(sampling))]
    assert_keeps(rows, find(*rows), expected)


@either
def test_rows_that_leave_nothing_out_have_no_threshold(find):
    settings = [(0, 5, 0.5, 0.5), (1, 0, 1, 0), (1, 300, 1, 0), (1, 301, 1, 0)] * 2
    rows = random_rows(3, len(settings), 300)
    thresholds = np.asarray(find(*rows_of(rows.logits, settings)))
    assert (thresholds == -inf).all()
    mixed = np.asarray(find(*rows_of(rows.logits, [*settings[:4], *[(1, 5, 1, 0)] * 4])))
    assert (mixed[:4] == -inf).all()
    assert (mixed[4:] > -inf).any()


@either
@pytest.mark.parametrize("value", [-inf, np.nan, inf, 0.0, -0.0, 1e-45, 3.4e38])
def test_rows_of_one_strange_value_end(find, value):
    """Rows that no model should produce: any threshold, but one there is; equal numbers are all kept."""
    logits = np.full((8, 300), value, np.float32)
    settings = [(1, 5, 1, 0), (1, 0, 0.5, 0), (1, 5, 0.5, 0.1), (1, 0, 1, 0.1)] * 2
    thresholds = np.asarray(find(*rows_of(logits, settings)))
    if np.isfinite(value):
        assert (logits >= thresholds[:, None]).all()


@either
def test_mixed_signs_of_zero_and_one_strange_entry(find):
    logits = np.tile(np.float32([0.0, -0.0, -1.0, 0.0] * 75), (8, 1))
    rows = rows_of(logits, [(1, 1, 1, 0), (1, 225, 1, 0), (1, 0, 0.5, 0), (1, 1, 0.5, 0)] * 2)
    assert_keeps(rows, find(*rows), [logits[0] == 0] * 8)
    logits[:, 5] = np.nan
    find(*rows_of(logits, [(1, 5, 0.5, 0.1), (1, 0, 0.5, 0), (1, 3, 1, 0), (1, 0, 1, 0.1)] * 2))


DRAWS = 20_000
LOGITS = np.array([2, 1, 0, -1, 0.5, -inf, 1.5, -3, 1, 0.25, -0.5, 1.75], np.float32)
SETTINGS = [(1, 0, 1, 0), (0.8, 0, 1, 0), (1, 4, 1, 0), (1, 0, 0.7, 0), (1, 0, 1, 0.3), (1.5, 5, 0.8, 0.1)]
SETTINGS += [(3, 20, 0.95, 0), (0.3, 3, 0.5, 0.2), (1, 1, 1, 0), (0, 4, 0.5, 0.5)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_distribution(setting):
    """Chi-square over many seeds, at 1 in 100,000; and nothing that is left out is ever drawn."""
    rows = rows_of([LOGITS], [setting])
    threshold = np.repeat(sampling_threshold(rows.logits, packed(*rows[1:])), DRAWS)
    seeds = np.stack([np.arange(DRAWS), np.full(DRAWS, 11)], axis=1).astype(np.uint32)
    logits, sampling = np.tile(LOGITS, (DRAWS, 1)), sampling_array(DRAWS, temperature=rows.temperature, seeds=seeds)
    tokens, _ = jax.jit(noisy_argmax)(logits, sampling, np.zeros(DRAWS, np.int32), threshold)
    counts, expected = np.bincount(tokens, minlength=LOGITS.size), DRAWS * distribution(*rows.one(0))
    assert counts[expected == 0].sum() == 0
    drawn = expected > 0
    assert expected[drawn].min() >= 5  # so that chi-square holds
    freedom = drawn.sum() - 1
    chi2 = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is normal
    assert freedom == 0 or chi2 < freedom * (1 - 2 / (9 * freedom) + 4.27 * np.sqrt(2 / (9 * freedom))) ** 3


def test_thresholds_mask_each_row_by_its_own():
    logits = jnp.tile(jnp.arange(8.0), (3, 1))
    sampling, positions = jnp.array(sampling_array(3, temperature=1e6)), jnp.arange(3)
    tokens, _ = noisy_argmax(logits, sampling, positions, jnp.array([7.0, 6.5, -inf]))
    assert tokens[:2].tolist() == [7, 7]
    unbounded, _ = noisy_argmax(logits, sampling, positions, jnp.full(3, -inf))
    assert tokens[2] == unbounded[2]


def test_one_row_of_fixed():
    rows = random_rows(0, 12, 300)
    find = by_columns(jax.jit(functools.partial(threshold.sampling_threshold, fixed=True, interpret=True)))
    whole = np.asarray(find(*rows))
    for i in range(12):
        np.testing.assert_array_equal(np.asarray(find(*(x[i : i + 1] for x in rows))), whole[i : i + 1])
