"""What the sampling functions become: lowered for CUDA on a machine without a GPU, and lowered for the CPU."""

import jax
import jax.numpy as jnp
import pytest
from nanovllm_jax.kernels import adjust_logits, noisy_argmax, sampling_threshold, token_logprobs
from test_lowering import PALLAS, aliased, custom_calls, ints, lowered_for_cuda

QWEN3 = 151_936


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def adjust_case(rows, vocab):
    settings = ints(rows, 12), ints(rows), ints(rows)
    return adjust_logits, (floats(rows, vocab), *settings, ints(257, vocab), floats(257, vocab))


def threshold_case(rows, vocab):
    return sampling_threshold, (floats(rows, vocab), ints(rows, 12))


def logprobs_case(rows, vocab):
    return token_logprobs, (floats(rows, vocab), floats(rows, vocab), ints(rows, 12), ints(rows))


def noise_case(rows, vocab):
    return noisy_argmax, (floats(rows, vocab), ints(rows, 12), ints(rows), floats(rows))


CASES = {adjust_case: 1, threshold_case: 2, logprobs_case: 2}  # and how many kernels they take
ALL = CASES | {noise_case: 1}
SHAPES = [(1, QWEN3), (8, QWEN3), (256, QWEN3), (1024, QWEN3), (3, 500), (5, 1)]
SHAPES += [(256, QWEN3 // 8), (32, QWEN3)]  # over 8 devices: a part of the vocabulary, and a part of the rows


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_each_lowers_to_its_kernels(make, rows, vocab):
    f, args = make(rows, vocab)
    assert custom_calls(lowered_for_cuda(f, *args)) == [PALLAS] * ALL[make]


def test_adjust_aliases_the_logits():
    f, args = adjust_case(8, 500)
    assert aliased(lowered_for_cuda(f, *args)) == [("0", "0")]


@pytest.mark.parametrize("make", CASES)
def test_a_cpu_gets_the_oracle_alone_and_skips_it_where_nobody_asks(make):
    f, args = make(4, 300)
    lowered = jax.jit(f).lower(*args)
    assert PALLAS not in lowered.as_text()
    assert "conditional" in lowered.compile().as_text()


def test_a_cpu_draws_by_the_oracle():
    f, args = noise_case(4, 300)
    assert PALLAS not in jax.jit(f).lower(*args).as_text()
