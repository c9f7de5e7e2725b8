"""Log-probabilities, ranks and the most likely tokens: the oracle and the interpreted kernels against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import MAX_LOGPROBS, logprobs, token_logprobs, vocabulary
from sampling_array import sampling_array
from sampling_cases import logprobs as expected_of

from nanovllm_jax.sampling_rows import ADJUSTS, NUM_TOP


def interpreted(block, programs):
    tiles = logprobs.Tiles(vocabulary.Tiles(block, programs, num_warps=4), num_warps=4)
    return jax.jit(functools.partial(logprobs.token_logprobs, tiles=tiles, interpret=True))


IMPLEMENTATIONS = {"oracle": token_logprobs, "kernel": interpreted(256, 2), "cut": interpreted(128, 3)}
either = pytest.mark.parametrize("find", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def inputs(rows, vocab, logits=None):
    rng = np.random.default_rng(vocab)
    if logits is None:
        logits = 5 * rng.standard_normal((rows, vocab))
        logits[::2] = np.round(logits[::2])  # many are equal
    logits = np.array(logits, np.float32)
    raw = logits[::-1] * np.float32(0.5)
    use_raw = rng.integers(0, 2, rows)
    logits[use_raw == 1] = np.nan  # what is not to be read
    raw[use_raw == 0] = np.nan
    tokens = rng.integers(0, vocab, rows).astype(np.int32)
    num_top = np.resize([MAX_LOGPROBS, -1, 0, 1, 5], rows)
    return logits, raw, sampling_array(rows, adjusts=use_raw, num_top=num_top), tokens


def assert_right(numbers, logits, raw, sampling, tokens):
    use_raw, num_top = sampling[:, [ADJUSTS, NUM_TOP]].T
    for i in np.flatnonzero(num_top >= 0):
        (rank, *ids), (logprob, *top) = np.asarray(numbers)[i, 0], np.asarray(numbers)[i, 1].view(np.float32)
        own, place, best, values = expected_of((raw if use_raw[i] else logits)[i], tokens[i], num_top[i])
        np.testing.assert_allclose(logprob, own, atol=1e-5, rtol=1e-6)
        assert rank == place
        np.testing.assert_array_equal(ids[: len(best)], best)
        np.testing.assert_allclose(top[: len(best)], values, atol=1e-5, rtol=1e-6)


@either
@pytest.mark.parametrize(("rows", "vocab"), [(30, 300), (10, 512), (10, 21), (10, 7), (5, 1)])
def test_equal_to_numpy(find, rows, vocab):
    args = inputs(rows, vocab)
    assert_right(find(*args), *args)


@either
def test_corner_rows(find):
    logits = np.zeros((5, 300))  # all are equal: the lowest ids are the best
    logits[1, 5:] = -np.inf  # fewer than are asked for have any probability
    logits[2] = np.arange(300) * 1e4
    logits[3] = -1e30
    logits[4, :290] = -np.inf  # and the best of these are at the end
    logits = logits.astype(np.float32)
    args = logits, logits, sampling_array(5, num_top=MAX_LOGPROBS), np.zeros(5, np.int32)
    assert_right(find(*args), *args)


@either
def test_nobody_asks(find):
    logits, raw, _, tokens = inputs(5, 300)
    numbers = find(logits, raw, sampling_array(5), tokens)
    assert (numbers.shape, numbers.dtype) == ((5, 2, 1 + MAX_LOGPROBS), jnp.int32)


@pytest.mark.parametrize("fixed", [False, True])
def test_one_row(fixed):
    """Alone, a row has what it has beside others: to the last bit, where that is asked for."""
    args = inputs(10, 300)
    find = functools.partial(logprobs.token_logprobs, fixed=fixed, interpret=True)
    whole, alone = find(*args), find(*(x[5:6] for x in args))
    assert_right(alone, *(x[5:6] for x in args))
    if fixed:
        asked = np.s_[:, : 1 + args[2][5, NUM_TOP]]
        assert alone[0][asked].size
        np.testing.assert_array_equal(alone[0][asked], whole[5][asked])
