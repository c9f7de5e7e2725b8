"""split: the oracle and the interpreted kernel cut an array where its sizes say."""

import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import pieces, split

SIZES = [(1024, 1024, 128, 128) * 28 + (1024,), (5120, 128) * 9, (5, 300, 7), (48,), (1,) * 33]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=["0.6B", "14B", "odd", "one", "many"])
def test_both_cut_where_the_sizes_say(sizes, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(sum(sizes)), dtype)
    expected = np.split(np.asarray(x), np.cumsum(sizes)[:-1])
    for parts in (split(x, sizes), pieces.split(x, sizes, interpret=True)):
        assert [part.dtype for part in parts] == [dtype] * len(sizes)
        for part, want in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(part), want)
