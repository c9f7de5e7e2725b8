"""paged_decode_attention: oracle and interpreted kernel against float64 attention, unused slots full of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import decode, paged_decode_attention
from paged_cases import decode_expected, paged

CONTEXTS = [5, 0, 64, 130, 17]
SHAPES = [  # K, G, H, block_size, block_k: tiles inside a block, a block each, across several
    (2, 1, 16, 64, 32),
    (1, 5, 32, 32, 32),
    (3, 2, 16, 16, 64),
]


def case(contexts, kv_heads, group, head_dim, block_size):
    rng = np.random.default_rng(len(contexts) + block_size)
    width = -(-max(contexts) // block_size) + 1
    cache = paged(rng, contexts, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, width=width)
    q = rng.standard_normal((len(contexts), kv_heads * group, head_dim)).astype(np.float32)
    q[np.array(contexts) == 0] = np.nan  # what a padded row holds is nobody's business
    return q, cache, head_dim**-0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_oracle_equals_float64_attention(shape):
    q, cache, scale = case(CONTEXTS, *shape[:4])
    out = paged_decode_attention(jnp.asarray(q), *map(jnp.asarray, cache), scale=scale)
    np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "splits", "min_tiles"),
    [(SHAPES[0], 1, 1), (SHAPES[0], 4, 2), (SHAPES[1], 1, 1), (SHAPES[1], 3, 1), (SHAPES[2], 1, 1), (SHAPES[2], 8, 1)],
)
def test_kernel_equals_float64_attention(shape, splits, min_tiles):
    q, cache, scale = case(CONTEXTS, *shape[:4])
    tiles = decode.Tiles(block_k=shape[4], splits=splits, min_tiles=min_tiles, num_warps=4, num_stages=2)
    out = decode.paged_decode_attention(q, *cache, scale=scale, tiles=tiles, interpret=True)
    np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


def test_two_batch_sizes_in_one_process():
    tiles = decode.Tiles(block_k=16, splits=2, min_tiles=1, num_warps=4, num_stages=2)
    for contexts in ([40, 3], [7, 33, 16, 0]):
        q, cache, scale = case(contexts, 1, 2, 16, 16)
        out = decode.paged_decode_attention(q, *cache, scale=scale, tiles=tiles, interpret=True)
        np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, cache, scale = case(CONTEXTS, 2, 2, 16, 16)
    q, k_cache, v_cache = (jnp.asarray(x, dtype) for x in (q, cache.k_cache, cache.v_cache))
    out = paged_decode_attention(q, k_cache, v_cache, *map(jnp.asarray, cache[2:]), scale=scale)
    rounded = cache._replace(k_cache=np.asarray(k_cache, np.float32), v_cache=np.asarray(v_cache, np.float32))
    expected = decode_expected(np.asarray(q, np.float32), rounded, scale)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, jnp.asarray(expected, dtype))


def test_it_runs_without_jit():
    q, cache, scale = case(CONTEXTS, 2, 2, 16, 16)
    with jax.disable_jit():
        out = paged_decode_attention(jnp.asarray(q), *map(jnp.asarray, cache), scale=scale)
    np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 8), (64, 8), (256, 8), (512, 8)])
def test_default_splits_fill_the_gpu_and_no_more(batch, kv_heads):
    tiles = decode.default_tiles(batch, kv_heads, 128, 32768, jnp.bfloat16)
    assert 1 <= tiles.splits <= 64
    assert tiles.splits == 64 or batch * kv_heads * tiles.splits >= 132
    assert tiles.splits == 1 or batch * kv_heads * tiles.splits < 2 * decode.PROGRAMS
