"""Linear layers of a row: oracle and interpreted kernel against numpy, gradients, and which arrays they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_layers import assert_close, assert_layer_gives_the_same
from nanovllm_jax.kernels import add_norm, is_row, row, row_linear, row_norm_linear

from nanovllm_jax.layers.linear import GatedLinear, Linear

EPS = 1e-6
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
SHAPES = [(1, 64, 1024), (2, 48, 1024), (1, 40, 768), (2, 24, 2560)]  # weights, features, depth


def inputs(weights, features, depth, dtype):
    rng = np.random.default_rng(depth)
    x, delta = rng.standard_normal((2, 1, depth)) * 2
    arrays = x, delta, rng.uniform(0.5, 2, depth), rng.standard_normal((weights, features, depth)) / 30
    return [jnp.asarray(array.astype(dtype)) for array in arrays]


def expected_of(x, delta, gain, weight):
    """In float64 from the norm as it is rounded."""
    total, normed = (np.asarray(part, np.float64) for part in add_norm(x, delta[None], gain, EPS))
    y = [normed @ part.T for part in np.asarray(weight, np.float64)]
    return total, y[0] if len(y) == 1 else y[0] / (1 + np.exp(-y[0])) * y[1]


oracle = functools.partial(row_norm_linear, eps=EPS)
interpreted = functools.partial(row.row_norm_linear, eps=EPS, interpret=True)


@pytest.mark.parametrize("function", [oracle, interpreted], ids=["oracle", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_linear(function, shape, dtype):
    args = inputs(*shape, dtype)
    total, y = function(*args)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(args[0] + args[1]))
    assert_close(y, expected_of(*args)[1], dtype)


@pytest.mark.parametrize("tiles", [row.Tiles(1, 4), row.Tiles(8, 8)], ids=str)
def test_tiles(tiles):
    args = inputs(2, 48, 1024, jnp.float32)
    _, y = interpreted(*args, tiles=tiles)
    assert_close(y, expected_of(*args)[1], jnp.float32)


@pytest.mark.parametrize("function", [row_linear, functools.partial(row.row_linear, interpret=True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(function, dtype):
    x, _, _, weight = inputs(1, 40, 3072, dtype)
    want = np.asarray(x, np.float64) @ np.asarray(weight[0], np.float64).T
    assert_close(function(x, weight[0]), want, dtype)


@pytest.mark.parametrize(
    ("x", "weight", "plain", "normed"),
    [
        ((1, 1024), (8, 4, 128, 1024), True, True),
        ((1, 1024), (2, 3072, 1024), True, True),
        ((1, 2048), (1024, 2048), True, True),
        ((1, 4096), (4096, 4096), True, False),
        ((1, 12288), (4096, 12288), False, False),
        ((2, 1024), (3072, 1024), False, False),
        ((1, 1, 1024), (3072, 1024), False, False),  # training's
        ((1, 64), (128, 64), False, False),
        ((1, 1024), (3071, 1024), False, False),  # no whole number of tiles
    ],
)
def test_which_arrays(x, weight, plain, normed):
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, weight))
    assert (is_row(x, weight, normed=False), is_row(x, weight, normed=True)) == (plain, normed)
    wide = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in (x, weight)]
    assert not is_row(*wide, normed=False)


def test_gradients_are_those_of_the_parts():
    args = inputs(2, 48, 1024, jnp.float32)

    def parts(x, delta, gain, weight):
        total, normed = add_norm(x, delta[None], gain, EPS)
        gate, up = (row_linear(normed, part) for part in weight)
        return total, jax.nn.silu(gate) * up

    def gradients(function):
        return jax.grad(lambda *args: sum((part**2).sum() for part in function(*args)), range(4))(*args)

    for got, want in zip(gradients(oracle), gradients(parts), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("kind", "out"), [(Linear, (4, 3, 8)), (GatedLinear, (2, 32))])
def test_a_layer_of_one_row(kind, out):
    assert_layer_gives_the_same(kind, out, few=1, many=2, kernel="row_norm_linear")
