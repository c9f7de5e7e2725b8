"""Attention over values and lengths that are out to break it, against float64: oracles and interpreted kernels on a
CPU, the compiled kernels (and contexts up to 128k tokens) on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import (
    common,
    decode,
    hopper_prefill,
    paged_decode_attention,
    paged_prefill_attention,
    prefill,
)
from paged_cases import Paged, block_tables, decode_expected, in_layers, naive_attention, prefill_expected

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of a token's largest output
SCALE = 1 / 8  # a power of two rounds nothing
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


# --- values: (q [c, K, G, H], k [n, K, H], v [n, K, H]) of a sequence's n keys and c newest tokens ---


def random(rng, dtype, c, n, heads, group, head_dim):
    return tuple(rng.standard_normal((*size, head_dim)) for size in ((c, heads, group), (n, heads), (n, heads)))


def huge_scores(rng, dtype, *sizes):
    """Of tens of thousands, all exact in float32 and far apart: all of the weight falls on the keys of the highest."""
    q, k, v = random(rng, dtype, *sizes)
    return *(np.clip(np.round(5 * x), -15, 15) * 16 for x in (q, k)), v


def huge_values(rng, dtype, c, n, *sizes):
    """As large as their sum over the context allows in float32."""
    q, k, v = random(rng, dtype, c, n, *sizes)
    return q, k, v * min(float(jnp.finfo(dtype).max), FLOAT32_MAX / n) / 8


def tiny(rng, dtype, *sizes):
    """Denormal queries and keys, and hardly normal values."""
    q, k, v = random(rng, dtype, *sizes)
    smallest = float(jnp.finfo(dtype).tiny)
    return q * smallest / 16, k * smallest / 16, (1 + abs(v)) * smallest * 16


def all_equal(rng, dtype, *sizes):
    """One key and one value over and over: the answer is that value."""
    q, k, v = random(rng, dtype, *sizes)
    return q, np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:1], v.shape)


def one_dominant_key(rng, dtype, c, n, *sizes):
    """Somewhere in what all queries see, a key with all but e**-30 of the weight."""
    q, k, v = random(rng, dtype, c, n, *sizes)
    direction = np.sign(k[0])  # (K, H)
    k[rng.integers(n - c + 1)] = 40 * direction
    return 0.2 * q + direction[:, None], k, v


VALUES = [random, huge_scores, huge_values, tiny, all_equal, one_dominant_key]
POISONS = [np.nan, np.inf, -np.inf]


def stress(make, contexts, counts, shape, *, padding=0, poison=np.nan):
    """(q [T, N, H], cache) of sequences with these contexts and numbers of new tokens, in float32 but rounded.

    What no sequence owns holds `poison`, and so do `padding` queries behind the last.
    """
    dtype, kv_heads, group, head_dim, block_size = shape
    rng = np.random.default_rng(len(contexts) + max(contexts))
    width = -(-max(contexts) // block_size) + 1
    tables, num_blocks = block_tables(rng, contexts, block_size, width)
    q = np.full((sum(counts) + padding, kv_heads * group, head_dim), poison, np.float32)
    caches, row = np.full((2, num_blocks, kv_heads, block_size, head_dim), poison, np.float32), 0
    for table, context, count in zip(tables, contexts, counts, strict=True):
        if context:
            new, *keys_and_values = make(rng, dtype, count, context, kv_heads, group, head_dim)
            q[row : row + count] = new.reshape(count, -1, head_dim)
            block, offset = np.divmod(np.arange(context), block_size)
            for target, values in zip(caches, keys_and_values, strict=True):
                target[table[block], :, offset] = values
        row += count
    q, caches = (x.astype(jnp.dtype(dtype)).astype(np.float32) for x in (q, caches))
    return q, Paged(*in_layers(caches, poison), tables, np.array(contexts, np.int32))


def arrays(dtype, q, cache: Paged, *between):
    """The arguments of a kernel."""
    floats = (jnp.asarray(x.astype(jnp.dtype(dtype))) for x in (q, cache.kv_cache))
    return *floats, *map(jnp.asarray, (cache.layer, cache.block_tables, *between, cache.context_lens))


def assert_close(out, expected, dtype, tolerance=0.0):
    """Within the tolerance of each token's largest output; exactly zero where that is zero."""
    assert out.dtype == dtype
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    error, largest = (np.abs(x).max(axis=(1, 2)) for x in (out - expected, expected))
    assert (error <= max(tolerance, TOLERANCE[dtype]) * largest).all(), (error / np.maximum(largest, 1e-300)).max()


def check_decode(kernel, make, contexts, shape, poison=np.nan, tolerance=0.0):
    """A row without context holds poison in its query and must be zero."""
    dtype = shape[0]
    q, cache = stress(make, contexts, [1] * len(contexts), shape, poison=poison)
    out = kernel(*arrays(dtype, q, cache), scale=SCALE)
    assert_close(out, decode_expected(q, cache, SCALE), dtype, tolerance)


def check_prefill(kernel, make, sequences, shape, poison=np.nan, tolerance=0.0):
    """Three rows behind the last sequence hold poison and must be zero."""
    contexts, counts = zip(*sequences, strict=True)
    dtype = shape[0]
    q, cache = stress(make, contexts, counts, shape, padding=3, poison=poison)
    starts = np.cumsum([0, *counts]).astype(np.int32)
    out = kernel(*arrays(dtype, q, cache, starts), scale=SCALE)
    assert_close(out, prefill_expected(q, cache, starts, SCALE), dtype, tolerance)


# --- lengths ---


def edges(*sizes):
    """0, 1, and each size and its neighbours."""
    return sorted({0, 1, *(size + d for size in sizes for d in (-1, 0, 1))})


def chunk_edges(contexts, counts):
    """(context, new tokens) for all pairs in which the context holds the new tokens."""
    return [(0, 0), *((context, count) for context in contexts for count in counts if 0 < count <= context)]


# --- on a CPU: the oracles that it runs, and the kernels interpreted ---

SMALL = [  # dtype, K, G, H, block_size: smaller than a tile of keys, larger, and as large
    ("float32", 2, 2, 16, 16),
    ("bfloat16", 2, 2, 16, 64),
    ("float16", 2, 2, 16, 32),
]
DECODE_TILES = decode.Tiles(block_k=32, extra=3, num_warps=4, num_stages=2)
PREFILL_TILES = prefill.Tiles(rows=16, block_k=32, num_warps=4, num_stages=2)
CPU_DECODES = [
    paged_decode_attention,
    jax.jit(partial(decode.paged_decode_attention, tiles=DECODE_TILES, interpret=True), static_argnames="scale"),
]
CPU_PREFILLS = [
    paged_prefill_attention,
    jax.jit(partial(prefill.paged_prefill_attention, tiles=PREFILL_TILES, interpret=True), static_argnames="scale"),
]
KERNELS = ["oracle", "interpreted"]
SHORT = edges(16, 32, 64, 96)  # blocks and tiles
CHUNKS = chunk_edges(edges(16, 33), edges(8))  # PREFILL_TILES takes 8 tokens at a time


@pytest.mark.parametrize("kernel", CPU_DECODES, ids=KERNELS)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape[0])
@pytest.mark.parametrize("make", VALUES, ids=lambda make: make.__name__)
def test_decode_values(kernel, shape, make):
    check_decode(kernel, make, SHORT, shape, POISONS[VALUES.index(make) % 3])


@pytest.mark.parametrize("kernel", CPU_PREFILLS, ids=KERNELS)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape[0])
@pytest.mark.parametrize("make", VALUES, ids=lambda make: make.__name__)
def test_prefill_values(kernel, shape, make):
    check_prefill(kernel, make, CHUNKS, shape, POISONS[VALUES.index(make) % 3])


@pytest.mark.parametrize("kernel", CPU_DECODES, ids=KERNELS)
@pytest.mark.parametrize("sequences", [1, 2, 33, 512])
def test_decode_batches(kernel, sequences):
    contexts = np.resize(SHORT[::-1], sequences).tolist()
    check_decode(kernel, random, contexts, ("float32", 1, 2, 16, 16))


@pytest.mark.parametrize("kernel", CPU_PREFILLS, ids=KERNELS)
@pytest.mark.parametrize("sequences", [1, 2, 33])
def test_prefill_batches(kernel, sequences):
    pairs = [CHUNKS[::-1][i % len(CHUNKS)] for i in range(sequences)]
    check_prefill(kernel, random, pairs, ("float32", 1, 2, 16, 16))


# --- on a GPU ---

LARGE = [("float32", 2, 4, 128, 16), ("bfloat16", 2, 4, 128, 256), ("float16", 2, 4, 128, 64)]
LONG = 2**17
MEDIUM = edges(16, 64, 128, 256, 1024)  # blocks and tiles of each dtype, many of them
MEDIUM_CHUNKS = chunk_edges([*edges(64), 300], edges(16, 32))


# A weight is exp2 of a score times log2(e), which the GPU's kernels round to float32: where scores are tens of
# thousands, a weight is off by up to 4e-3.
GPU_TOLERANCE = {huge_scores: 4e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=lambda shape: shape[0])
@pytest.mark.parametrize("make", VALUES, ids=lambda make: make.__name__)
def test_decode_values_on_a_gpu(shape, make):
    poison, tolerance = POISONS[VALUES.index(make) % 3], GPU_TOLERANCE.get(make, 0)
    check_decode(paged_decode_attention, make, MEDIUM, shape, poison, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=lambda shape: shape[0])
@pytest.mark.parametrize("make", VALUES, ids=lambda make: make.__name__)
def test_prefill_values_on_a_gpu(shape, make):
    poison, tolerance = POISONS[VALUES.index(make) % 3], GPU_TOLERANCE.get(make, 0)
    check_prefill(paged_prefill_attention, make, MEDIUM_CHUNKS, shape, poison, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not common.is_hopper(), reason="this kernel is for compute capability 9.0")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", VALUES, ids=lambda make: make.__name__)
def test_prefill_values_on_hopper(dtype, make):
    poison, tolerance = POISONS[VALUES.index(make) % 3], GPU_TOLERANCE.get(make, 0)
    shape = (dtype, 2, 4, 128, 256)
    check_prefill(hopper_prefill.paged_prefill_attention, make, MEDIUM_CHUNKS, shape, poison, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 64, 512])
def test_decode_batches_on_a_gpu(sequences):
    contexts = np.resize(edges(64, 128)[::-1], sequences).tolist()
    check_decode(paged_decode_attention, random, contexts, ("bfloat16", 1, 2, 128, 64))


@pytest.mark.gpu
def test_a_prefill_of_512_sequences_on_a_gpu():
    pairs = [MEDIUM_CHUNKS[::-1][i % len(MEDIUM_CHUNKS)] for i in range(512)]
    check_prefill(paged_prefill_attention, random, pairs, ("bfloat16", 1, 2, 128, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [random, one_dominant_key], ids=lambda make: make.__name__)
def test_decode_of_long_contexts_on_a_gpu(make):
    contexts = [LONG, 1, LONG - 1, 0, LONG // 2 + 1]
    check_decode(paged_decode_attention, make, contexts, ("bfloat16", 1, 2, 128, 256))


@pytest.mark.gpu
def test_prefill_of_a_long_context_on_a_gpu():
    """Its last 4,096 tokens, of which a few are compared."""
    count, dtype = 4096, "bfloat16"
    q, cache = stress(random, [LONG], [count], (dtype, 1, 2, 128, 256))
    starts = np.array([0, count], np.int32)
    out = paged_prefill_attention(*arrays(dtype, q, cache, starts), scale=SCALE)
    rows = np.unique([0, 31, 32, 33, 127, 128, 129, *np.linspace(0, count - 1, 16, dtype=int)])
    expected = naive_attention(q[rows], cache, 0, SCALE, positions=LONG - count + rows)
    assert_close(out[rows], expected, dtype)
