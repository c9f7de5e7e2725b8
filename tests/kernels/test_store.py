"""store_kv: the oracle against a loop in numpy, the interpreted kernel against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import reference, store, store_kv

BLOCKS, BLOCK_SIZE, HEAD_DIM = 4, 16, 16


def inputs(kv_heads, slots, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(len(slots)), 4)
    k, v = (jax.random.normal(key, (len(slots), kv_heads, HEAD_DIM), dtype) for key in keys[:2])
    caches = (jax.random.normal(key, (BLOCKS, kv_heads, BLOCK_SIZE, HEAD_DIM), dtype) for key in keys[2:])
    return k, v, jnp.array(slots, jnp.int32), *caches


SLOTS = [[5], [-1], [0, 63, 17, 16, 15], [-1, 3, -1, 40, 41, -1, 62]]


@pytest.mark.parametrize("slots", SLOTS)
def test_oracle_writes_each_token_to_its_slot_and_nothing_else(slots):
    k, v, mapping, *caches = inputs(3, slots)
    expected = [np.array(cache) for cache in caches]
    for i, slot in enumerate(slots):
        if slot >= 0:
            expected[0][slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = k[i]
            expected[1][slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = v[i]
    for got, want in zip(store_kv(k, v, mapping, *caches), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("slots", SLOTS[-2:])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "dtype"), [(1, 3, jnp.float32), (4, 1, jnp.bfloat16), (4, 3, jnp.float16)]
)
def test_kernel_equals_oracle(slots, tokens, kv_heads, dtype):
    args = inputs(kv_heads, slots, dtype)
    tiles = store.Tiles(tokens=tokens, num_warps=4)
    for got, want in zip(store.store_kv(*args, tiles=tiles, interpret=True), reference.store_kv(*args), strict=True):
        np.testing.assert_array_equal(got, want)


def test_donated_caches_are_updated_in_place_over_several_layers():
    k, v, mapping, *caches = inputs(2, [1, 2, -1])

    def layers(caches):
        return [store_kv(k, v, mapping, *layer) for layer in caches]

    memory = jax.jit(layers, donate_argnums=0).lower([tuple(caches)] * 3).compile().memory_analysis()
    cache_bytes = caches[0].nbytes
    assert memory.temp_size_in_bytes < cache_bytes
    assert memory.alias_size_in_bytes >= 6 * cache_bytes
