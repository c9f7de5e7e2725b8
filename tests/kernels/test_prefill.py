"""paged_prefill_attention: oracle and interpreted kernel against float64 attention, unused slots full of NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import paged_prefill_attention, prefill
from nanovllm_jax.kernels.common import prefill_tiles
from paged_cases import paged, prefill_expected

# Context and query lengths: a first prefill, a padded sequence, a chunk, a prefix hit with one new token, one more than
# a block, and behind them rows that belong to no sequence.
CONTEXTS, QUERIES, PADDING = [20, 0, 75, 33, 17], [20, 0, 30, 1, 17], 5
SHAPES = [  # K, G, H, block_size, rows, block_k
    (2, 1, 16, 64, 16, 32),
    (1, 5, 32, 32, 32, 32),
    (3, 2, 16, 16, 16, 64),
]


# One program: outside of one, each operation would be compiled on its own.
interpreted = jax.jit(
    functools.partial(prefill.paged_prefill_attention, interpret=True), static_argnames=("scale", "fixed", "tiles")
)


def case(contexts, queries, padding, kv_heads, group, head_dim, block_size):
    rng = np.random.default_rng(sum(queries) + block_size)
    width = -(-max(contexts) // block_size) + 1
    cache = paged(rng, contexts, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, width=width)
    starts = np.cumsum([0, *queries]).astype(np.int32)
    q = rng.standard_normal((starts[-1] + padding, kv_heads * group, head_dim)).astype(np.float32)
    q[starts[-1] :] = np.nan  # what a padded row holds is nobody's business
    args = (q, *cache[:3], starts, cache.context_lens)
    return tuple(map(jnp.asarray, args)), head_dim**-0.5, prefill_expected(q, cache, starts, head_dim**-0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_oracle_equals_float64_attention(shape):
    args, scale, expected = case(CONTEXTS, QUERIES, PADDING, *shape[:4])
    np.testing.assert_allclose(paged_prefill_attention(*args, scale=scale), expected, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_float64_attention(shape):
    args, scale, expected = case(CONTEXTS, QUERIES, PADDING, *shape[:4])
    tiles = prefill.Tiles(rows=shape[4], block_k=shape[5], num_warps=4, num_stages=2)
    out = interpreted(*args, scale=scale, tiles=tiles)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_oracle_over_several_tiles_of_queries():
    args, scale, expected = case([150, 100], [150, 70], 0, 1, 2, 16, 16)
    np.testing.assert_allclose(paged_prefill_attention(*args, scale=scale), expected, atol=2e-6)


def test_two_token_counts_in_one_process():
    tiles = prefill.Tiles(rows=16, block_k=16, num_warps=4, num_stages=2)
    for queries in ([9], [20, 3]):
        args, scale, expected = case(queries, queries, 1, 1, 2, 16, 16)
        out = interpreted(*args, scale=scale, tiles=tiles)
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_all_sequences_padded():
    args, scale, _ = case([16, 0], [0, 0], 8, 1, 1, 16, 16)
    tiles = prefill.Tiles(rows=16, block_k=16, num_warps=4, num_stages=2)
    for out in (
        paged_prefill_attention(*args, scale=scale),
        interpreted(*args, scale=scale, tiles=tiles),
    ):
        np.testing.assert_array_equal(out, np.zeros_like(out))


def test_rows_of_decoding_sequences_before_the_first_stay():
    args, scale, expected = case(CONTEXTS, QUERIES, PADDING, *SHAPES[0][:4])
    q, out = (jnp.concatenate((jnp.full_like(args[0][:7], fill), args[0])) for fill in (jnp.nan, 3))
    args, tiles = (q, *args[1:4], args[4] + 7, args[5], out), prefill.Tiles(16, 32, num_warps=4, num_stages=2)
    for result in (
        paged_prefill_attention(*args, scale=scale),
        interpreted(*args, scale=scale, tiles=tiles),
    ):
        np.testing.assert_array_equal(result[:7], out[:7])
        np.testing.assert_allclose(result[7:], expected, atol=2e-6)


def test_bits_do_not_depend_on_the_chunk():
    """A token's output is the same to the last bit in a first prefill, in any chunk, and alone as a decode row."""
    (q, *cached, _, _), scale, _ = case([75], [75], 0, 2, 2, 16, 16)
    tiles = prefill.Tiles(rows=16, block_k=16, num_warps=4, num_stages=2)
    for function in (
        lambda *args: interpreted(*args, scale=scale, fixed=True, tiles=tiles),
        lambda *args: paged_prefill_attention(*args, scale=scale, fixed=True),
    ):
        whole = function(q, *cached, jnp.array([0, 75]), jnp.array([75]))
        for start, stop in ((0, 1), (0, 40), (13, 14), (17, 75), (31, 50), (74, 75)):
            starts, lens = jnp.array([0, stop - start]), jnp.array([stop])
            part = function(q[start:stop], *cached, starts, lens)
            np.testing.assert_array_equal(part, whole[start:stop], f"{start} to {stop}")


def test_it_runs_without_jit():
    args, scale, expected = case([20, 9], [4, 9], 1, 1, 2, 16, 16)
    with jax.disable_jit():
        out = paged_prefill_attention(*args, scale=scale)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_tiles_of_the_docstring():
    tiles = prefill_tiles(jnp.array([0, 5, 7]), jnp.array([5, 9]), tokens=8, block_q=4)
    np.testing.assert_array_equal(np.stack(tiles), [[0, 0, 1, 2], [0, 4, 5, 7], [4, 1, 2, 1], [0, 4, 7, -1]])


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_each_row_once(seed):
    rng = np.random.default_rng(seed)
    lengths, block_q = rng.integers(0, 12, rng.integers(1, 6)), int(rng.integers(1, 6))
    tokens = int(lengths.sum() + rng.integers(1, 9))
    starts, contexts = np.cumsum([0, *lengths]), lengths + rng.integers(0, 9, len(lengths))
    rows = np.full(tokens, -1)
    tiles = jax.jit(prefill_tiles, static_argnums=(2, 3))(starts, contexts, tokens, block_q)
    for sequence, row, count, position in zip(*map(np.asarray, tiles), strict=True):
        assert count <= block_q
        assert (rows[row : row + count] == -1).all()
        rows[row : row + count] = sequence
        if count and sequence < len(lengths):
            assert position == contexts[sequence] - lengths[sequence] + row - starts[sequence]
    np.testing.assert_array_equal(rows, np.repeat(np.arange(len(lengths) + 1), [*lengths, tokens - lengths.sum()]))
