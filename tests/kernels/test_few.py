"""Linear layers of a few rows: oracle and interpreted kernel against numpy, gradients, and which arrays they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linear_layers import assert_close, assert_layer_gives_the_same
from nanovllm_jax.kernels import add_norm, few, few_linear, is_few_rows, reference, whole

from nanovllm_jax.layers.linear import GatedLinear, Linear, matmul

EPS, PARTS = 1e-6, few.PARTS
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
# rows, weights, features, depth, parts: whole tiles, and rows, features and depths that end inside one
CASES = [
    (2, 1, 64, 512, 1),
    (16, 1, 96, 1024, PARTS),
    (64, 2, 48, 640, 1),
    (5, 2, 40, 600, 1),
    (33, 1, 72, 1160, PARTS),
    (1, 1, 96, 512, 1),
]
CASES += [(7, 1, 33, 520, 3), (3, 1, 32, 513, 8)]  # parts of which the last have little, or nothing
CASES += [(5, 1, 48, 768, PARTS), (5, 1, 48, 1152, PARTS)]  # depths that are whole parts, but fewer than there are


def inputs(rows, weights, features, depth, dtype):
    rng = np.random.default_rng(depth)
    arrays = rng.standard_normal((rows, depth)), rng.standard_normal((weights, features, depth)) / 10
    return [jnp.asarray(array.astype(dtype)) for array in arrays]


def expected_of(x, weight):
    y = [np.asarray(x, np.float64) @ part.T for part in np.asarray(weight, np.float64)]
    return y[0] if len(y) == 1 else y[0] / (1 + np.exp(-y[0])) * y[1]


# One program each: outside of one, each operation would be compiled on its own.
oracle = jax.jit(reference.few_linear, static_argnames=("parts", "dtype"))
interpreted = jax.jit(functools.partial(few.few_linear, interpret=True), static_argnames=("parts", "dtype", "tiles"))


@pytest.mark.parametrize("function", [oracle, interpreted], ids=["oracle", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(function, case, dtype):
    *sizes, parts = case
    x, weight = inputs(*sizes, dtype)
    kind = dtype if parts == 1 else jnp.float32
    y = function(x, weight, parts=parts, dtype=kind)
    assert y.dtype == kind
    assert y.shape == (parts, sizes[0], sizes[2])
    # Products of 16-bit numbers and sums of float32 ones: parts are not rounded.
    assert_close(np.asarray(y).sum(axis=0), expected_of(x, weight), kind)


def test_logits_are_not_rounded():
    x, weight = inputs(9, 1, 300, 512, jnp.bfloat16)
    for function in (oracle, interpreted):
        assert_close(function(x, weight, dtype=jnp.dtype(jnp.float32))[0], expected_of(x, weight), jnp.float32)


@pytest.mark.parametrize("tiles", [few.Tiles(16, 64, 2, 2), few.Tiles(64, 256, 8, 3)], ids=str)
def test_tiles(tiles):
    x, weight = inputs(20, 2, 100, 700, jnp.float32)
    [y] = interpreted(x, weight, dtype=x.dtype, tiles=tiles)
    assert_close(y, expected_of(x, weight), jnp.float32)


@pytest.mark.parametrize("tile", [32, 64, 128, 256])
@pytest.mark.parametrize("depth", range(512, 1537, 64))
def test_depths(depth, tile):
    """Nothing is left out and nothing read twice or past the end, where interpreted kernels have NaN."""
    x, weight = inputs(3, 1, 32, depth, jnp.float32)
    y = interpreted(x, weight, parts=PARTS, dtype=x.dtype, tiles=few.Tiles(32, tile, 4, 2))
    assert_close(np.asarray(y).sum(axis=0), expected_of(x, weight), jnp.float32)


def test_swiglu_rounds_where_transformers_does():
    """The same numbers as the oracle's but for sums that lay between two."""
    x, weight = inputs(32, 2, 200, 512, jnp.bfloat16)
    got, want = (np.asarray(function(x, weight, dtype=x.dtype)) for function in (interpreted, oracle))
    assert np.mean(got != want) < 0.01


@pytest.mark.parametrize(
    ("rows", "weight", "is_few"),
    [
        ((2, 1024), (8, 4, 128, 1024), True),
        ((64, 1024), (2, 3072, 1024), True),
        ((64, 3072), (1024, 3072), True),
        ((8, 1024), (151936, 1024), True),
        ((65, 1024), (3072, 1024), False),
        ((1, 1024), (3072, 1024), False),
        ((1, 1024), (151936, 1024), True),
        ((1, 4096), (151936, 4096), False),
        ((64, 6144), (2048, 6144), True),
        ((32, 4096), (8, 6, 128, 4096), False),
        ((2, 2560), (2, 9728, 2560), False),
        ((2, 8, 1024), (3072, 1024), False),  # training's
        ((2, 64), (128, 64), False),
    ],
)
def test_which_arrays(rows, weight, is_few):
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (rows, weight))
    assert is_few_rows(x, weight) == is_few
    assert ("few_linear" in str(jax.make_jaxpr(matmul)(x, weight))) == is_few
    wide = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in (x, weight)]
    assert not is_few_rows(*wide)


@pytest.mark.parametrize("features", [64, 2100])
def test_a_product_that_is_not_rounded(features):
    """As logits are, in parts or not."""
    x, [weight] = inputs(5, 1, features, 512, jnp.bfloat16)
    y = matmul(x, weight, jnp.float32)
    assert y.dtype == jnp.float32
    assert_close(y, expected_of(x, weight[None]), jnp.float32)


@pytest.mark.parametrize(("weights", "features", "parts"), [(2, 48, 1), (1, 2100, 1), (1, 48, PARTS)])
def test_gradients_are_those_of_plain_jnp(weights, features, parts):
    args = inputs(4, weights, features, 520, jnp.float32)
    assert few_linear(*args).shape == (parts, 4, features)

    def plain(x, weight):
        y = jnp.einsum("td,wfd->wtf", x, weight, precision="highest")
        return jax.nn.silu(y[0]) * y[1] if weights == 2 else y[0]

    def gradients(function):
        return jax.grad(lambda *args: (function(*args) ** 2).sum(), (0, 1))(*args)

    by_kernel = gradients(lambda *args: few_linear(*args).sum(axis=0))
    for got, want in zip(by_kernel, gradients(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("kind", "out"), [(Linear, (4, 3, 8)), (GatedLinear, (2, 32))])
def test_a_layer_of_few_rows(kind, out):
    assert_layer_gives_the_same(kind, out, few=5, many=70, kernel="few_linear")


def test_a_layer_in_parts():
    """Its parts add up to what it gives, and the next norm adds them up; a biased layer has one part."""
    options = dict(axes=(None, "embed"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer, biased = Linear(1024, (512,), **options), Linear(1024, (512,), use_bias=True, **options)
    biased.bias[...] = jnp.arange(512, dtype=jnp.bfloat16)
    x, residual = (
        jnp.asarray(np.random.default_rng(size).standard_normal((6, size)), jnp.bfloat16) for size in (1024, 512)
    )
    parts = layer.parts(x).here
    assert parts.shape == layer.no_parts((6,)).shape == (PARTS, 6, 512)
    assert parts.dtype == layer.no_parts((6,)).dtype == jnp.float32
    assert_close(whole(parts, x.dtype), np.asarray(layer(x), np.float64), x.dtype)
    gain = jnp.ones((512,), jnp.bfloat16)
    summed = whole(parts, x.dtype)[None]
    for got, want in zip(add_norm(residual, parts, gain, EPS), add_norm(residual, summed, gain, EPS)):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(biased.parts(x).here, biased(x)[None])
    gated = GatedLinear(1024, (2, 512), axes=(None, None, "embed"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(gated.parts(x).here, gated(x)[None])
    assert biased.no_parts((6,)).shape == (1, 6, 512)
