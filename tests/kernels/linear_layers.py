"""What the tests of linear layers of one row and of a few have in common."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanovllm_jax.layers.linear import Linear, Parts
from nanovllm_jax.layers.norm import RMSNorm


def assert_close(got, want, dtype):
    """Equal to float64's but for what numbers of this dtype round."""
    assert got.dtype == dtype
    tolerance = {2: 0.03, 4: 1e-5}[jnp.dtype(dtype).itemsize]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def assert_layer_gives_the_same(kind: type[Linear], out: tuple[int, ...], few: int, many: int, kernel: str):
    """A layer gives `few` rows, by this kernel, what it gives them among `many`, which go another way; in its shape."""
    options = dict(axes=(*[None] * len(out), "embed"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer, norm = kind(1024, out, **options), RMSNorm(1024, 1e-6, dtype=jnp.bfloat16)
    x, delta = jnp.asarray(np.random.default_rng(0).standard_normal((2, many, 1024)), jnp.bfloat16)
    everything, some = layer.of_sum(norm, x, Parts(delta[None])), layer.of_sum(norm, x[:few], Parts(delta[None, :few]))
    assert some[1].shape == (few, *everything[1].shape[1:])
    np.testing.assert_array_equal(some[0], everything[0][:few])
    assert_close(some[1], np.asarray(everything[1][:few], np.float64), jnp.bfloat16)
    assert kernel in str(jax.make_jaxpr(lambda x: layer.of_sum(norm, x, Parts(x[None])))(x[:few]))
    assert kernel not in str(jax.make_jaxpr(lambda x: layer.of_sum(norm, x, Parts(x[None])))(x))
