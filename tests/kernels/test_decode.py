"""paged_decode_attention: oracle and interpreted kernel against float64 attention, unused slots full of NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import decode, norm_rope_store, paged_decode_attention, store_and_decode
from paged_cases import decode_expected, new_tokens, paged, with_shared_blocks

CONTEXTS = [5, 0, 64, 130, 17]
EDGES = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129]  # of blocks, tiles and parts
SHAPES = [  # K, G, H, block_size, block_k: tiles inside a block, a block each, across several
    (2, 1, 16, 64, 32),
    (1, 5, 32, 32, 32),
    (3, 2, 16, 16, 64),
]


# One program each: outside of one, each operation would be compiled on its own.
interpreted = jax.jit(
    functools.partial(decode.paged_decode_attention, interpret=True), static_argnames=("scale", "tiles")
)
store_and_interpreted = jax.jit(
    functools.partial(decode.store_and_decode, interpret=True), static_argnames=("scale", "eps", "tiles")
)


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
    ("shape", "extra"),
    [(SHAPES[0], 1), (SHAPES[0], 4), (SHAPES[1], 2), (SHAPES[1], 3), (SHAPES[2], 1), (SHAPES[2], 64)],
)
def test_kernel_equals_float64_attention(shape, extra):
    q, cache, scale = case(CONTEXTS, *shape[:4])
    tiles = decode.Tiles(block_k=shape[4], extra=extra, num_warps=4, num_stages=2)
    out = interpreted(q, *cache, scale=scale, tiles=tiles)
    np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


@pytest.mark.parametrize(("parts", "sequences"), [(16, 2), (17, 5), (33, 1), (33, 2), (60, 3)])
def test_any_number_of_parts_is_combined(parts, sequences):
    """At once, or one after another: in how many turns depends on how many sequences share them."""
    q, cache, scale = case([16 * parts - 5, *[40] * (sequences - 1)], 1, 2, 16, 16)
    tiles = decode.Tiles(block_k=16, extra=64, num_warps=4, num_stages=2)
    out = interpreted(q, *cache, scale=scale, tiles=tiles)
    np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


# Parts of three tiles, no parts, parts of one tile, and parts of eight, of which one context has as many.
@pytest.mark.parametrize(
    ("shape", "extra"), [(SHAPES[0], 16), (SHAPES[1], 1), (SHAPES[2], 64), ((2, 16, 16, 16, 16), 8)]
)
def test_new_tokens_are_stored_and_attended_to(shape, extra):
    contexts = CONTEXTS + EDGES
    _, cache, scale = case(contexts, *shape[:4])
    new = new_tokens(np.random.default_rng(1), cache, group=shape[1])
    args = [jnp.asarray(x) for x in (*new, *cache)]
    expected = store_and_decode(*args, scale=scale, eps=1e-6)
    tiles = decode.Tiles(block_k=shape[4], extra=extra, num_warps=4, num_stages=2)
    got = store_and_interpreted(*args, scale=scale, eps=1e-6, tiles=tiles)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert not np.isnan(got[0]).any()
    stored = 2 * sum(n > 0 for n in contexts) * shape[0] * shape[2]
    assert np.isnan(cache.kv_cache).sum() - np.isnan(got[1]).sum() == stored


def test_new_tokens_are_what_the_two_functions_make_of_them():
    _, cache, scale = case(CONTEXTS, *SHAPES[1][:4])
    new = new_tokens(np.random.default_rng(2), cache, group=SHAPES[1][1])
    q, kv_cache = norm_rope_store(*map(jnp.asarray, new), *cache[:2], eps=1e-6)
    out = paged_decode_attention(q, kv_cache, *cache[1:], scale=scale)
    written = cache._replace(kv_cache=np.asarray(kv_cache))
    np.testing.assert_allclose(out, decode_expected(np.asarray(q), written, scale), atol=2e-6)
    for a, b in zip(store_and_decode(*new, *cache, scale=scale, eps=1e-6), (out, kv_cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_past_the_sequences_are_left_alone():
    q, cache, scale = case(CONTEXTS, *SHAPES[0][:4])
    more = np.concatenate((q, np.full_like(q[:3], np.nan)))
    tiles = decode.Tiles(block_k=32, extra=2, num_warps=4, num_stages=2)
    for out in (
        paged_decode_attention(jnp.asarray(more), *map(jnp.asarray, cache), scale=scale),
        interpreted(more, *cache, scale=scale, tiles=tiles),
    ):
        assert out.shape == more.shape
        np.testing.assert_allclose(out[: len(q)], decode_expected(q, cache, scale), atol=2e-6)


def test_two_batch_sizes_in_one_process():
    tiles = decode.Tiles(block_k=16, extra=2, num_warps=4, num_stages=2)
    for contexts in ([40, 3], [7, 33, 16, 0]):
        q, cache, scale = case(contexts, 1, 2, 16, 16)
        out = interpreted(q, *cache, scale=scale, tiles=tiles)
        np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, cache, scale = case(CONTEXTS, 2, 2, 16, 16)
    q, kv_cache = (jnp.asarray(x, dtype) for x in (q, cache.kv_cache))
    out = paged_decode_attention(q, kv_cache, *map(jnp.asarray, cache[1:]), scale=scale)
    rounded = cache._replace(kv_cache=np.asarray(kv_cache, np.float32))
    expected = decode_expected(np.asarray(q, np.float32), rounded, scale)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, jnp.asarray(expected, dtype))


def test_it_runs_without_jit():
    q, cache, scale = case(CONTEXTS, 2, 2, 16, 16)
    with jax.disable_jit():
        out = paged_decode_attention(jnp.asarray(q), *map(jnp.asarray, cache), scale=scale)
    np.testing.assert_allclose(out, decode_expected(q, cache, scale), atol=2e-6)


# Rows that begin alike, of contexts long enough: with 8 or 2 sequences at most to a tile, some left alone.
PREFIXES = [(1, 2, 3), (3, 11, 1), (5, 9, 4), (15, 2, 2)]
ALIKE = [0, 97, 120, *[140 + 7 * i for i in range(11)], 5, 65, 70]


@pytest.mark.parametrize(
    ("shape", "extra", "combining"),
    [
        ((1, 2, 16, 32, 16), 64, 4),
        ((2, 5, 16, 16, 32), 8, 64),
        ((1, 8, 16, 32, 32), 16, 4),
        ((1, 2, 16, 32, 64), 2, 64),
    ],
)
def test_shared_blocks_are_read_together(shape, extra, combining, monkeypatch):
    monkeypatch.setattr(decode, "COMBINING", combining)
    q, cache, scale = case(ALIKE, *shape[:4])
    cache = with_shared_blocks(cache, [(a, n, blocks * 32 // shape[3]) for a, n, blocks in PREFIXES])
    tiles = decode.Tiles(block_k=shape[4], extra=extra, num_warps=4, num_stages=2)
    options = {"scale": scale, "tiles": tiles, "interpret": True}
    attend = jax.jit(functools.partial(decode.paged_decode_attention, **options))
    np.testing.assert_allclose(attend(q, *cache), decode_expected(q, cache, scale), atol=2e-6)

    new = new_tokens(np.random.default_rng(3), cache, group=shape[1])
    args = [jnp.asarray(x) for x in (*new, *cache)]
    got = jax.jit(functools.partial(decode.store_and_decode, eps=1e-6, **options))(*args)
    for a, b in zip(got, store_and_decode(*args, scale=scale, eps=1e-6), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_one_of_several_that_read_together_may_hold_nan():
    q, cache, scale = case([100, 90, 80, 70] * 4, 1, 2, 16, 32)
    cache = with_shared_blocks(cache, [(0, 16, 2)])
    expected = decode_expected(q, cache, scale)
    q[1] = np.nan
    tiles = decode.Tiles(block_k=32, extra=64, num_warps=4, num_stages=2)
    out = interpreted(q, *cache, scale=scale, tiles=tiles)
    np.testing.assert_allclose(np.delete(out, 1, axis=0), np.delete(expected, 1, axis=0), atol=2e-6)
