"""fixed_matmul: oracle and interpreted kernel against numpy, and rows that do not know of each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nanovllm_jax.kernels import fixed_matmul, matmul

from nanovllm_jax.layers import linear

SMALL = matmul.Tiles(rows=16, features=32, depth=16, num_warps=4, num_stages=2)
kernel = functools.partial(matmul.fixed_matmul, tiles=SMALL, interpret=True)


def inputs(rows, features, depth, dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal((n, depth)), dtype) for n in (rows, features))


@pytest.mark.parametrize("function", [fixed_matmul, kernel], ids=["oracle", "kernel"])
@pytest.mark.parametrize(("rows", "features", "depth"), [(1, 32, 16), (17, 40, 50), (33, 31, 64)])
@pytest.mark.parametrize(("dtype", "out"), [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16)])
def test_product(function, rows, features, depth, dtype, out):
    x, weight = inputs(rows, features, depth, dtype)
    got = function(x, weight, dtype=out)
    assert (got.shape, got.dtype) == ((rows, features), out)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-2 if out == jnp.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [fixed_matmul, kernel], ids=["oracle", "kernel"])
def test_a_row_depends_on_itself_alone(function):
    """In whatever place, among however many, and whatever is in the others: NaN too."""
    x, weight = inputs(70, 40, 50, jnp.float32)
    whole = np.asarray(function(x, weight, dtype=jnp.float32))
    for start, stop in ((0, 1), (3, 4), (5, 38), (69, 70), (0, 69)):
        others = jnp.full((3, 50), jnp.nan)
        part = jnp.concatenate((others, x[start:stop], others))
        np.testing.assert_array_equal(function(part, weight, dtype=jnp.float32)[3:-3], whole[start:stop])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_the_oracle_in_a_program_does_not_depend_on_the_number_of_rows(dtype):
    """One tile is no loop, and XLA may join the product with what is around it."""
    options = dict(dtype=dtype, rngs=nnx.Rngs(0), fixed=True)
    layers = linear.GatedLinear(256, (2, 96), axes=(None, None, "embed"), **options)
    layers = layers, linear.Linear(96, (64,), axes=(None, "embed"), **options)
    x = jax.random.normal(jax.random.key(2), (100, 256)).astype(dtype)
    two_layers = jax.jit(lambda layers, x: layers[1](layers[0](x)))
    np.testing.assert_array_equal(two_layers(layers, x[:20]), two_layers(layers, x)[:20])
