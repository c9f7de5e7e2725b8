"""add_norm: the oracle and the interpreted kernel against numpy, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import add_norm, norm
from nanovllm_jax.kernels.common import kernel

EPS = 1e-6
FEATURES = [1024, 2560, 4096, 5120, 48]  # of Qwen3 0.6B, 4B, 8B and 14B, and a small one


def inputs(tokens, features, dtype, parts=1):
    """Parts of 16-bit numbers are float32: what adds them up rounds once."""
    rng = np.random.default_rng(features)
    x, *delta = rng.standard_normal((1 + parts, tokens, features)) * 3
    delta = jnp.asarray(np.array(delta).astype(dtype if parts <= 1 else jnp.float32))
    return jnp.asarray(x.astype(dtype)), delta, jnp.asarray(rng.uniform(0.5, 2, features).astype(dtype))


def expected_of(x, delta, gain):
    """float32, rounded to the dtype after each step that transformers rounds."""
    delta = np.asarray(delta, np.float32).sum(axis=0).astype(x.dtype).astype(np.float32)
    total = (np.asarray(x, np.float32) + delta).astype(x.dtype)
    wide = total.astype(np.float32)
    normed = (wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + EPS)).astype(x.dtype)
    return total, normed * np.asarray(gain)


def assert_rounded_alike(got, want):
    """The sums bit-equal, the norms too but for values that lay between two."""
    np.testing.assert_array_equal(got[0], want[0])
    a, b = np.asarray(got[1]), want[1]
    assert a.dtype == b.dtype
    if a.dtype == np.float32:
        np.testing.assert_allclose(a, b, rtol=1e-6)
    else:
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.07)
        assert np.mean(a != b) < 0.002


@pytest.mark.parametrize("parts", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_oracle_equals_numpy(dtype, parts):
    args = inputs(5, 2560, dtype, parts)
    assert_rounded_alike(add_norm(*args, EPS), expected_of(*args))


TILED = [(5, 1, jnp.bfloat16, 4), (7, 4, jnp.float16, 1), (1, 1, jnp.float32, 1), (3, 2, jnp.float32, 3)]
TILED += [(5, 2, jnp.bfloat16, 0), (1, 1, jnp.float32, 0)]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("tokens", "tile", "dtype", "parts"), TILED)
def test_kernel_equals_numpy(tokens, tile, dtype, parts, features):
    args = inputs(tokens, features, dtype, parts)
    got = norm.add_norm(*args, eps=EPS, tiles=norm.Tiles(tile, num_warps=4), interpret=True)
    assert_rounded_alike(got, expected_of(*args))


@pytest.mark.parametrize("features", [*FEATURES, 64, 256])
def test_fixed_does_not_depend_on_the_other_rows(features):
    """Without it XLA adds some of these up in another order, where there are more rows."""
    x, delta, gain = inputs(70, features, jnp.float32)
    few, many = (add_norm(x[:rows], delta[:, :rows], gain, EPS, fixed=True) for rows in (3, 70))
    for got, want in zip(few, many):
        np.testing.assert_array_equal(got, want[:3])


def test_gradient_equals_that_of_plain_jnp():
    args, weights = inputs(3, 48, jnp.float32, parts=2), np.random.default_rng(1).standard_normal((2, 3, 48))

    def plain(x, delta, gain):
        total = x + delta.sum(axis=0)
        return total, total / jnp.sqrt(jnp.mean(total * total, axis=-1, keepdims=True) + EPS) * gain[None]

    def gradients(f):
        def loss(*args):
            return sum((weight * out).sum() for weight, out in zip(weights, f(*args), strict=True))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    for got, want in zip(gradients(lambda *args: add_norm(*args, EPS)), gradients(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_kernel_runs_without_jit():
    """enforce_eager's mode: the model is un-jitted, the kernels in it are not."""
    x = jnp.ones((2, 48))
    compiled = kernel(functools.partial(norm.add_norm, interpret=True), static_argnames="eps")
    with jax.disable_jit():
        total, _ = compiled(x, x[None], x[0], eps=1e-6)
    assert (total == 2).all()
