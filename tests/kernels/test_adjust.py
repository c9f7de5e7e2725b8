"""Bias, mask and penalties: the oracle and the interpreted kernel against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import ENDS, PROMPT, adjust, adjust_logits, vocabulary
from sampling_array import sampling_array
from sampling_cases import adjusted

SLOTS, VOCAB = 5, 300


def interpreted(block, programs):
    tiles = vocabulary.Tiles(block, programs, num_warps=4)
    return jax.jit(functools.partial(adjust.adjust_logits, tiles=tiles, interpret=True))


def by_columns(change):
    """change, of columns that are packed for it; the positions are such that ends are masked where it is said."""

    def call(logits, slots, asks, suppress_ends, repetition, frequency, presence, counts, bias):
        penalties = dict(repetition=repetition, frequency=frequency, presence=presence)
        sampling = sampling_array(len(slots), adjusts=asks, min_len=9, **penalties)
        return change(logits, sampling, slots, np.where(suppress_ends, 8, 9), counts, bias)

    return call


IMPLEMENTATIONS = {"oracle": adjust_logits, "kernel": interpreted(256, 2), "cut": interpreted(128, 1)}
IMPLEMENTATIONS = {name: by_columns(change) for name, change in IMPLEMENTATIONS.items()}
either = pytest.mark.parametrize("change", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def inputs(seed=0, **given):
    """Six rows, of which the last does not ask, over five slots."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((6, VOCAB))).astype(np.float32)
    logits[2, ::7] = -np.inf
    counts = rng.integers(0, 4, (SLOTS, VOCAB)) * (rng.random((SLOTS, VOCAB)) < 0.3)
    counts += PROMPT * (rng.random((SLOTS, VOCAB)) < 0.3) + ENDS * (rng.random((SLOTS, VOCAB)) < 0.1)
    bias = np.where(rng.random((SLOTS, VOCAB)) < 0.1, rng.uniform(-100, 100, (SLOTS, VOCAB)), 0)
    rows = dict(
        slots=[4, 0, 1, 1, 3, 2],
        asks=[1, 1, 1, 1, 1, 0],
        suppress_ends=[1, 0, 1, 0, 1, 1],
        repetition=[1, 1.5, 0.5, 1.2, 1, 2],
        frequency=[0, 0.3, 2, -2, 0.5, 1],
        presence=[0, 0.7, -2, 2, -0.1, 1],
    )
    rows |= given
    dtypes = dict(slots=np.int32, asks=np.int32, suppress_ends=np.int32)
    rows = [np.array(values, dtypes.get(name, np.float32)) for name, values in rows.items()]
    return logits, *rows, counts.astype(np.int32), bias.astype(np.float32)


@either
def test_rows_that_ask_equal_numpy(change):
    args = inputs()
    logits, slots, asks, *rows, counts, bias = args
    out, raw = change(*args)
    for i in np.flatnonzero(asks):
        expected = adjusted(logits[i], counts[slots[i]], bias[slots[i]], *(x[i] for x in rows))
        np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(raw[i], logits[i])


@either
def test_rows_that_do_not_ask_are_left_alone(change):
    args = inputs()
    out, _ = change(*args)
    np.testing.assert_array_equal(out[5], args[0][5])
    nobody = inputs(asks=[0] * 6)
    np.testing.assert_array_equal(change(*nobody)[0], nobody[0])


@either
def test_neutral_settings_change_nothing(change):
    """But for what ends the text, where that is not to be drawn yet."""
    args = inputs(repetition=[1] * 6, frequency=[0] * 6, presence=[0] * 6, asks=[1] * 6)
    logits, slots, _, suppress, *_, counts, bias = args
    bias[:] = 0
    out, _ = change(*args)
    ends = (counts[slots] & ENDS != 0) & (suppress[:, None] == 1)
    np.testing.assert_array_equal(out, np.where(ends, -np.inf, logits))


def test_penalties_are_those_of_one_token_by_hand():
    """Token 0 was generated twice, 1 is in the prompt, 2 is new."""
    counts, zero = jnp.array([[2, PROMPT, 0, 2 | PROMPT]]), jnp.zeros(1, int)
    sampling = sampling_array(1, adjusts=1, repetition=2, frequency=0.25, presence=0.5)
    out, _ = adjust_logits(jnp.array([[3.0, 3, 3, -3]]), sampling, zero, zero, counts, jnp.zeros((1, 4)))
    np.testing.assert_allclose(out, [[1.5 - 0.5 - 0.5, 1.5, 3, -6 - 0.5 - 0.5]])
