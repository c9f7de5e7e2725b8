"""norm_rope_store: the oracle against numpy, the interpreted kernel too, with NaN in padded rows and old slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import norm_rope_store, store
from paged_cases import LAYER, LAYERS

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
    kv_cache = rng.standard_normal((2, LAYERS, BLOCKS, kv_heads, BLOCK_SIZE, head_dim))
    kv_cache[..., 1::3, :] = np.nan
    floats = qkv, *rng.uniform(0.5, 2, (2, head_dim)), kv_cache
    qkv, q_gain, k_gain, kv_cache = (jnp.asarray(x, dtype) for x in floats)
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return qkv, q_gain, k_gain, cos, sin, jnp.array(slots, jnp.int32), kv_cache, jnp.int32(LAYER)


def norm_rope(x, gain, cos, sin):
    """Heads x [T, n, H] in numpy, float32, rounded to x's dtype after each step that transformers rounds."""
    dtype, x = x.dtype, np.asarray(x, np.float32)
    normed = (x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)).astype(dtype)
    first, second = np.split((normed * np.asarray(gain)).astype(np.float32), 2, axis=-1)
    cos, sin = (np.asarray(angle)[:, None] for angle in (cos, sin))
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(dtype)


def expected_of(qkv, q_gain, k_gain, cos, sin, slots, kv_cache, layer):
    qkv, kv_cache = np.asarray(qkv), np.array(kv_cache)
    tokens, kv_heads, parts, head_dim = qkv.shape
    q = norm_rope(qkv[:, :, :-2].reshape(tokens, kv_heads * (parts - 2), head_dim), q_gain, cos, sin)
    news = norm_rope(qkv[:, :, -2], k_gain, cos, sin), qkv[:, :, -1]
    for cache, new in zip(kv_cache[:, layer], news, strict=True):
        for i, slot in enumerate(np.asarray(slots)):
            if slot >= 0:
                cache[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = new[i]
    return q, kv_cache


def assert_same(got, want, slots):
    """Untouched slots bit-equal, NaN too; the rest rounded alike but for values that lay between two."""
    live, touched = np.array(slots) >= 0, np.zeros((LAYERS, BLOCKS, BLOCK_SIZE), bool)
    touched[LAYER].flat[np.array(slots)[live]] = True
    (q, kv_cache), (want_q, want_cache) = ([np.asarray(x) for x in result] for result in (got, want))
    pairs = [(q[live], want_q[live])]
    for part, want_part in zip(kv_cache, want_cache, strict=True):
        part, want_part = (np.swapaxes(x, 2, 3) for x in (part, want_part))
        assert part[~touched].tobytes() == want_part[~touched].tobytes()
        pairs.append((part[touched], want_part[touched]))
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


def test_a_donated_cache_is_updated_in_place_over_several_layers():
    *args, kv_cache, _ = inputs([1, 2, -1], head_dim=64)

    def layers(kv_cache):
        for layer in range(LAYERS):
            _, kv_cache = norm_rope_store(*args, kv_cache, layer, eps=EPS)
        return kv_cache

    memory = jax.jit(layers, donate_argnums=0).lower(kv_cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < kv_cache.nbytes / 2
    assert memory.alias_size_in_bytes >= kv_cache.nbytes


def test_op_by_op_it_takes_the_cache():
    """No program around it says so: each layer's call would copy the keys and values of all."""
    *args, kv_cache, layer = inputs(SLOTS)
    want, place = expected_of(*args, kv_cache, layer), kv_cache.unsafe_buffer_pointer()
    with jax.disable_jit():
        got = norm_rope_store(*args, kv_cache, layer, eps=EPS)
    assert kv_cache.is_deleted()
    assert not any(array.is_deleted() for array in args)
    assert got[1].unsafe_buffer_pointer() == place
    assert_same(got, want, SLOTS)
