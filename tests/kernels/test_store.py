"""norm_rope_store: the oracle against numpy, the interpreted kernel too, with NaN in padded rows and old slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import norm_rope_store, store

BLOCKS, BLOCK_SIZE, EPS = 4, 16, 1e-6
SLOTS = [int(slot) for slot in np.random.default_rng(0).permutation(BLOCKS * BLOCK_SIZE)[:43]]
SLOTS[::5] = [-1] * 9


def inputs(slots, kv_heads=2, group=2, head_dim=16, dtype=jnp.float32):
    """A padded row's projection and angles are NaN, and so is a cache slot here and there."""
    rng = np.random.default_rng(len(slots))
    tokens, half, live = len(slots), head_dim // 2, np.array(slots) >= 0
    qkv = rng.standard_normal((tokens, kv_heads, group + 2, head_dim)) * 3
    angles = np.where(live[:, None], rng.uniform(0, 100, (tokens, half)), np.nan)
    qkv[~live] = np.nan
    caches = rng.standard_normal((2, BLOCKS, kv_heads, BLOCK_SIZE, head_dim))
    caches[:, :, :, 1::3] = np.nan
    qkv, q_gain, k_gain, *caches = (jnp.asarray(x, dtype) for x in (qkv, *rng.uniform(0.5, 2, (2, head_dim)), *caches))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return qkv, q_gain, k_gain, cos, sin, jnp.array(slots, jnp.int32), *caches


def norm_rope(x, gain, cos, sin):
    """Heads x [T, n, H] in numpy, float32, rounded to x's dtype after each step that transformers rounds."""
    dtype, x = x.dtype, np.asarray(x, np.float32)
    normed = (x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)).astype(dtype)
    first, second = np.split((normed * np.asarray(gain)).astype(np.float32), 2, axis=-1)
    cos, sin = (np.asarray(angle)[:, None] for angle in (cos, sin))
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(dtype)


def expected_of(qkv, q_gain, k_gain, cos, sin, slots, *caches):
    qkv, caches = np.asarray(qkv), [np.array(cache) for cache in caches]
    tokens, kv_heads, parts, head_dim = qkv.shape
    q = norm_rope(qkv[:, :, :-2].reshape(tokens, kv_heads * (parts - 2), head_dim), q_gain, cos, sin)
    for cache, new in zip(caches, (norm_rope(qkv[:, :, -2], k_gain, cos, sin), qkv[:, :, -1]), strict=True):
        for i, slot in enumerate(np.asarray(slots)):
            if slot >= 0:
                cache[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = new[i]
    return q, *caches


def assert_same(got, want, slots):
    """Untouched slots bit-equal, NaN too; the rest rounded alike but for values that lay between two."""
    live, touched = np.array(slots) >= 0, np.zeros((BLOCKS, BLOCK_SIZE), bool)
    touched.flat[np.array(slots)[live]] = True
    (q, *caches), (want_q, *want_caches) = ([np.asarray(x) for x in result] for result in (got, want))
    pairs = [(q[live], want_q[live])]
    for cache, want_cache in zip(caches, want_caches, strict=True):
        cache, want_cache = (np.swapaxes(x, 1, 2) for x in (cache, want_cache))
        assert cache[~touched].tobytes() == want_cache[~touched].tobytes()
        pairs.append((cache[touched], want_cache[touched]))
    for a, b in pairs:
        assert a.dtype == b.dtype
        exact = a.dtype == np.float32
        np.testing.assert_allclose(*(x.astype(np.float32) for x in (a, b)), atol=3e-6 if exact else 0.07)
        assert exact or a.size == 0 or np.mean(a != b) < 0.002


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_oracle_equals_numpy(dtype):
    args = inputs(SLOTS, dtype=dtype, head_dim=64)
    assert_same(norm_rope_store(*args, eps=EPS), expected_of(*args), SLOTS)


@pytest.mark.parametrize(
    ("slots", "tile", "shape"),
    [
        (SLOTS, 1, {"kv_heads": 3}),
        (SLOTS, 8, {"group": 5, "head_dim": 64, "dtype": jnp.bfloat16}),  # 43 tokens: the last tile overlaps
        (SLOTS, 4, {"kv_heads": 1, "group": 8, "head_dim": 64, "dtype": jnp.float16}),
        (SLOTS, 16, {"group": 1}),
        ([5], 1, {}),
        ([-1, -1], 2, {}),
    ],
)
def test_kernel_equals_numpy(slots, tile, shape):
    args = inputs(slots, **shape)
    got = store.norm_rope_store(*args, eps=EPS, tiles=store.Tiles(tile, num_warps=4), interpret=True)
    assert_same(got, expected_of(*args), slots)


@pytest.mark.parametrize("tokens", [1, 3, 128, 129, 1024, 1025, 16385])
def test_default_tiles_fit_in_the_tokens(tokens):
    assert store.default_tiles(tokens).tokens <= tokens


def test_donated_caches_are_updated_in_place_over_several_layers():
    *args, k_cache, v_cache = inputs([1, 2, -1], head_dim=64)

    def layers(caches):
        return [norm_rope_store(*args, *layer, eps=EPS)[1:] for layer in caches]

    memory = jax.jit(layers, donate_argnums=0).lower([(k_cache, v_cache)] * 3).compile().memory_analysis()
    assert memory.temp_size_in_bytes < k_cache.nbytes
    assert memory.alias_size_in_bytes >= 6 * k_cache.nbytes
