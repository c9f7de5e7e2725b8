"""The compiled kernels on a GPU against the float32 oracle: random ragged batches, NaN in every unused slot."""

import functools

import exchange_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import (
    add_norm,
    common,
    decode,
    few,
    few_linear,
    hopper_prefill,
    is_many_rows,
    noisy_argmax,
    norm,
    norm_rope_store,
    paged_decode_attention,
    paged_prefill_attention,
    prefill,
    reference,
    reference_sampling,
    row_linear,
    row_norm_linear,
    split,
    store,
    store_and_decode,
    swiglu,
)
from paged_cases import LAYER, LAYERS, new_tokens, paged, with_shared_blocks
from sampling_array import sampling_array

pytestmark = pytest.mark.gpu

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}  # of the largest output
SHAPES = [  # dtype, K, G, H, block_size
    (jnp.bfloat16, 8, 2, 128, 256),
    (jnp.bfloat16, 8, 4, 128, 16),
    (jnp.bfloat16, 8, 5, 128, 256),
    (jnp.bfloat16, 2, 8, 128, 64),
    (jnp.bfloat16, 1, 4, 128, 256),  # a device's share of 8B over 8
    (jnp.bfloat16, 1, 8, 128, 256),  # and of 32B
    (jnp.bfloat16, 3, 1, 256, 32),
    (jnp.bfloat16, 4, 3, 64, 128),
    (jnp.float16, 2, 2, 128, 16),
    (jnp.float32, 2, 2, 128, 256),
    (jnp.float32, 1, 5, 64, 16),
    (jnp.float32, 2, 1, 256, 32),
]
CONTEXTS = [3000, 0, 1, 16, 17, 255, 256, 257, 1023, 0, 700]
RAGGED = [(1024, 1024), (0, 0), (1000, 65), (257, 1), (256, 256), (300, 44), (1, 1)]  # (context, new tokens)
CHUNKS = [(4000, 1500), (2049, 512)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill free GPU memory that outputs will reuse with NaN, so that what a kernel fails to write shows."""
    jnp.full((2**26,), jnp.nan).block_until_ready().delete()


def on_gpu(seed, contexts, dtype, kv_heads, group, head_dim, block_size, rows):
    rng = np.random.default_rng(seed)
    width = -(-max(contexts) // block_size) + 3
    cache = paged(rng, contexts, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, width=width)
    return with_queries(rng, cache, dtype, rows, kv_heads * group)


def with_queries(rng, cache, dtype, rows, heads):
    q = jnp.asarray(rng.standard_normal((rows, heads, cache.own.shape[-1])), dtype)
    return q, jnp.asarray(cache.kv_cache, dtype), *map(jnp.asarray, cache[1:])


decode_oracle = jax.jit(reference.paged_decode_attention, static_argnames="scale")
prefill_oracle = jax.jit(reference.paged_prefill_attention, static_argnames="scale")


def assert_close(out, oracle, args, dtype, scale):
    q, kv_cache, layer, *rest = args
    own = kv_cache[:, layer, None]  # the oracle needs no other, and tests beside one another share the card's memory
    expected = oracle(*(x.astype(jnp.float32) for x in (q, own)), jnp.int32(0), *rest, scale=scale)
    out, expected = np.asarray(out, np.float32), np.asarray(expected)
    assert np.isfinite(out).all()
    assert np.abs(out - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape):
    args = on_gpu(1, CONTEXTS, *shape, rows=len(CONTEXTS))
    scale = shape[3] ** -0.5
    out = paged_decode_attention(*args, scale=scale)
    assert_close(out, decode_oracle, args, shape[0], scale)
    assert not np.asarray(out[np.array(CONTEXTS) == 0]).any()


@pytest.mark.parametrize("shape", [*SHAPES[:3], SHAPES[-1]], ids=str)
@pytest.mark.parametrize("contexts", [[1], CONTEXTS * 24], ids=["one", "many"])
def test_decode_batches(contexts, shape):
    args = on_gpu(2, contexts, *shape, rows=len(contexts))
    assert_close(paged_decode_attention(*args, scale=0.1), decode_oracle, args, shape[0], 0.1)


@pytest.mark.parametrize("extra", [1, 2, 5, 64])
@pytest.mark.parametrize("contexts", [[4000], [2500, 1500], [4000, 0, 1, 130]], ids=str)
def test_decode_cuts(contexts, extra):
    shape = SHAPES[0]
    args = on_gpu(3, contexts, *shape, rows=len(contexts))
    tiles = decode.Tiles(block_k=64, extra=extra, num_warps=4, num_stages=3)
    out = jax.jit(functools.partial(decode.paged_decode_attention, scale=0.1, tiles=tiles))(*args)
    assert_close(out, decode_oracle, args, shape[0], 0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("contexts", [[1], [1000], CONTEXTS, CONTEXTS * 12], ids=["first", "one", "some", "many"])
def test_new_tokens(contexts, shape):
    _, kv_heads, _, head_dim, block_size = shape
    rng = np.random.default_rng(5)
    width = -(-max(contexts) // block_size) + 3
    cache = paged(rng, contexts, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, width=width)
    check_new_tokens(rng, cache, shape)


# Sequences beside one another that share so many tokens of theirs: more and fewer than read together, and none.
ALIKE = [0, 300, 300, *range(530, 1800, 70), 9, 2000, 2100, 1000]
PREFIXES = [(1, 2, 256), (3, 19, 512), (5, 6, 512), (23, 2, 1792)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("times", [1, 6], ids=["some", "many"])
def test_shared_blocks(times, shape):
    _, kv_heads, _, head_dim, block_size = shape
    rng, contexts = np.random.default_rng(7), ALIKE * times
    cache = paged(rng, contexts, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, width=2304 // block_size)
    prefixes = [
        (first + i * len(ALIKE), rows, tokens // block_size) for i in range(times) for first, rows, tokens in PREFIXES
    ]
    cache = with_shared_blocks(cache, prefixes)
    check_decode(rng, cache, shape)
    check_new_tokens(rng, cache, shape)


def check_decode(rng, cache, shape):
    dtype, kv_heads, group, *_ = shape
    args = with_queries(rng, cache, dtype, len(cache.context_lens), kv_heads * group)
    assert_close(paged_decode_attention(*args, scale=0.1), decode_oracle, args, dtype, 0.1)


def check_new_tokens(rng, cache, shape):
    dtype, _, group, head_dim, _ = shape
    new = new_tokens(rng, cache, group)
    kinds = [dtype] * 3 + [jnp.float32] * 2 + [jnp.int32] + [dtype] + [jnp.int32] * 3
    args = [jnp.asarray(x, kind) for x, kind in zip((*new, *cache), kinds, strict=True)]
    options = dict(scale=head_dim**-0.5, eps=1e-6)
    q, stored = reference.norm_rope_store(*args[:8], eps=1e-6)
    own, empty = stored[:, LAYER], int(jnp.isnan(stored).sum())
    del stored  # for its memory
    want = np.asarray(decode_oracle(q, own[:, None], jnp.int32(0), *args[8:], scale=options["scale"]), np.float32)
    for _ in range(3):  # what one thread writes and another reads
        out, kv_cache = store_and_decode(*args, **options)
        assert jnp.isnan(kv_cache).sum() == empty
        assert_stored_alike(kv_cache[:, LAYER], own, dtype)
        del kv_cache
        assert np.abs(np.asarray(out, np.float32) - want).max() <= 2 * TOLERANCE[dtype] * np.abs(want).max()


def assert_stored_alike(got, expected, dtype):
    for a, b in zip(got, expected, strict=True):
        assert (jnp.isnan(a) == jnp.isnan(b)).all()
        assert_rounded_alike([jnp.nan_to_num(a)], [jnp.nan_to_num(b)], dtype)


def prefill_args(sequences, shape, padding):
    contexts, queries = zip(*sequences, strict=True)
    starts = np.cumsum([0, *queries]).astype(np.int32)
    q, kv_cache, layer, tables, lens = on_gpu(4, contexts, *shape, rows=int(starts[-1]) + padding)
    return q, kv_cache, layer, tables, jnp.asarray(starts), lens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(shape):
    args = prefill_args(RAGGED, shape, padding=70)
    scale = shape[3] ** -0.5
    out = paged_prefill_attention(*args, scale=scale)
    assert_close(out, prefill_oracle, args, shape[0], scale)
    assert not np.asarray(out[-70:]).any()


@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_prefill_for_any_gpu(shape):
    """Triton's kernel, where a Hopper has one of its own."""
    args = prefill_args(RAGGED, shape, padding=70)
    out = jax.jit(functools.partial(prefill.paged_prefill_attention, scale=0.1))(*args)
    assert_close(out, prefill_oracle, args, shape[0], 0.1)


on_hopper = pytest.mark.skipif(not common.is_hopper(), reason="these kernels are for compute capability 9.0")
HOPPER = [SHAPES[0], (jnp.bfloat16, 8, 4, 128, 128), SHAPES[2], SHAPES[4], (jnp.float16, 2, 3, 128, 512)]
SEQUENCES = [*RAGGED, *CHUNKS, (70, 70), (64, 64), (63, 63), (3000, 1), (128, 128), (129, 129), (5000, 4500)]


@on_hopper
@pytest.mark.parametrize(("decodes", "padding"), [(0, 200), (32, 200), (32, 6000)])
@pytest.mark.parametrize("shape", HOPPER, ids=str)
def test_prefill_on_hopper(shape, decodes, padding):
    q, *rest = prefill_args(SEQUENCES, shape, padding=padding)
    scale = shape[3] ** -0.5
    assert hopper_prefill.fits(q, rest[0])
    behind = (jnp.concatenate((q[:decodes], q)), *rest[:3], rest[3] + decodes, rest[4])
    out = (jnp.full_like(behind[0], 3),) if decodes else ()
    results = [paged_prefill_attention(*behind, *out, scale=scale) for _ in range(5)]
    assert (results[0][:decodes] == 3).all()
    assert_close(results[0][decodes:], prefill_oracle, (q, *rest), shape[0], scale)
    assert not np.asarray(results[0][-padding:]).any()
    for again in results[1:]:  # warpgroups that do not wait for one another would show here
        np.testing.assert_array_equal(np.asarray(again), np.asarray(results[0]))


@on_hopper
def test_prefill_on_hopper_reads_a_part_of_the_batch():
    """A table that begins anywhere in a larger array, as the engine's do."""
    q, kv_cache, layer, tables, starts, lens = prefill_args(SEQUENCES, HOPPER[0], padding=0)
    buffer, ends = jnp.concatenate((starts, lens, tables.ravel())), np.cumsum([len(starts), len(lens)])

    @jax.jit
    def step(q, buffer):
        starts, lens, table = jnp.split(buffer, ends)
        return paged_prefill_attention(q, kv_cache, layer, table.reshape(tables.shape), starts, lens, scale=0.1)

    want = paged_prefill_attention(q, kv_cache, layer, tables, starts, lens, scale=0.1)
    np.testing.assert_array_equal(np.asarray(step(q, buffer)), np.asarray(want))


@on_hopper
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("rows", "depth", "features"),
    [
        (8192, 1024, 3072),
        (1056, 2560, 1280),
        (5000, 4096, 1536),
        (72, 1024, 3072),
        (128, 2560, 9728),
        (256, 2048, 6144),
    ],
)
def test_swiglu(rows, depth, features, dtype):
    rng = np.random.default_rng(rows)
    x, weight = (jnp.asarray(rng.standard_normal(size), dtype) for size in ((rows, depth), (2, features, depth)))
    weight = weight * jnp.asarray(depth**-0.5, dtype)
    assert is_many_rows(x, weight) == (rows not in (72, 1056))
    results = [np.asarray(swiglu(x, weight), np.float32) for _ in range(3)]
    assert_rounded_alike(results[:1], [jax.jit(reference.swiglu)(x, weight)], dtype, share=0.02)
    for again in results[1:]:
        np.testing.assert_array_equal(again, results[0])


@pytest.mark.parametrize("tiles", [None, prefill.Tiles(64, 64, 4, 2), prefill.Tiles(128, 32, 4, 3)], ids=str)
def test_prefill_of_chunks(tiles):
    args = prefill_args(CHUNKS, SHAPES[2], padding=0)
    out = jax.jit(functools.partial(prefill.paged_prefill_attention, scale=0.1, tiles=tiles))(*args)
    assert_close(out, prefill_oracle, args, SHAPES[2][0], 0.1)


def store_args(tokens, shape, blocks):
    """Projections of which some rows are padded, a cache full of numbers, and a layer of it."""
    dtype, kv_heads, group, head_dim, block_size = shape
    rng = np.random.default_rng(tokens)
    slots = rng.permutation(blocks * block_size)[:tokens].astype(np.int32)
    slots[rng.random(tokens) < 0.2] = -1
    qkv, pool = (tokens, kv_heads, group + 2, head_dim), (2, LAYERS, blocks, kv_heads, block_size, head_dim)
    angles = rng.uniform(0, 100, (tokens, head_dim // 2))
    heads = (rng.standard_normal(qkv), *rng.uniform(0.5, 2, (2, head_dim)))
    qkv, q_gain, k_gain, kv_cache = (jnp.asarray(x, dtype) for x in (*heads, rng.standard_normal(pool)))
    cos, sin = (jnp.asarray(x, jnp.float32) for x in (np.cos(angles), np.sin(angles)))
    return qkv, q_gain, k_gain, cos, sin, jnp.asarray(slots), kv_cache, jnp.int32(LAYER)


def assert_rounded_alike(got, expected, dtype, share=0.002):
    """16 bits: equal but for values that lay between two, a share of all. float32: close."""
    for a, b in zip(got, expected, strict=True):
        a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))  # on the GPU, for they may be large
        assert jnp.abs(a - b).max() <= TOLERANCE[dtype] * jnp.abs(b).max()
        assert dtype == jnp.float32 or jnp.mean(a != b) < share


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 257, 5001])
def test_store(tokens, shape):
    args = store_args(tokens, shape, blocks=8192 // shape[-1])
    # Op by op: as one program for a GPU, XLA has made something else of 5,001 tokens with 5 query heads to a kv head.
    expected = reference.norm_rope_store(*args, eps=1e-6)
    got = jax.jit(functools.partial(norm_rope_store, eps=1e-6), donate_argnums=6)(*args)
    assert_rounded_alike(got, expected, shape[0])


@pytest.mark.parametrize("tiles", [store.Tiles(1, 4), store.Tiles(4, 2), store.Tiles(16, 8)], ids=str)
def test_store_tiles(tiles):
    args = store_args(259, SHAPES[2], blocks=4)
    expected = reference.norm_rope_store(*args, eps=1e-6)
    got = jax.jit(functools.partial(store.norm_rope_store, eps=1e-6, tiles=tiles))(*args)
    assert_rounded_alike(got, expected, SHAPES[2][0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1024), (257, 2560), (5001, 4096), (33, 5120), (3, 48)])
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_add_norm(tokens, features, dtype, parts):
    rng = np.random.default_rng(tokens)
    x, delta, gain = (rng.standard_normal(size) for size in ((tokens, features), (parts, tokens, features), features))
    args = [jnp.asarray(x, dtype), jnp.asarray(delta, dtype if parts <= 1 else jnp.float32), jnp.asarray(gain, dtype)]
    expected = jax.jit(functools.partial(reference.add_norm, eps=1e-6))(*args)
    assert_rounded_alike(add_norm(*args, 1e-6), expected, dtype)
    tiled = functools.partial(norm.add_norm, eps=1e-6, tiles=norm.Tiles(1 if tokens == 1 else 2, 4))
    assert_rounded_alike(jax.jit(tiled)(*args), expected, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    "sizes", [(1024, 1024, 128, 128) * 28 + (1024,), (5120, 5120, 128, 128) * 64, (5, 300, 7), (48,)], ids=len
)
def test_split(sizes, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(sum(sizes)), dtype)
    expected = np.split(np.asarray(x), np.cumsum(sizes)[:-1])
    for part, want in zip(split(x, sizes), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(part), want)


@pytest.mark.parametrize("case", exchange_cases.CASES, ids=str)
def test_all_reduce_norm_of_one_device_of_several(case):
    """scripts/check_devices.py has all of them."""

    def memory(contents):
        array = jnp.array(contents)
        return array.unsafe_buffer_pointer(), array, lambda: np.array(array, copy=True)

    exchange_cases.check(memory, *case)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("weights", "features", "depth"),  # of 0.6B, 1.7B, 4B, 8B
    [(1, 4096, 1024), (2, 3072, 1024), (1, 1024, 3072), (2, 6144, 2048), (1, 2560, 4096), (1, 6144, 2560)],
)
def test_linear_layers_of_a_row(weights, features, depth, dtype):
    rng = np.random.default_rng(depth)
    sizes = (1, depth), (1, depth), (depth,), (weights, features, depth)
    args = [jnp.asarray(rng.standard_normal(size) / len(size) ** 3, dtype) for size in sizes]
    total, y = row_norm_linear(*args, 1e-6)
    want_total, want_y = jax.jit(functools.partial(reference.row_norm_linear, eps=1e-6))(*args)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(want_total))
    x, weight = args[0], args[3][0]
    for pair in ((y, want_y), (row_linear(x, weight), reference.row_linear(x, weight))):
        got, want = (np.asarray(array, np.float32) for array in pair)
        assert got.shape == want.shape == (1, features)
        assert np.abs(got - want).max() <= TOLERANCE[dtype] * np.abs(want).max()


FEW = [(1, 4096, 1024), (2, 3072, 1024), (1, 1024, 3072), (2, 6144, 2048), (1, 2048, 6144)]  # of 0.6B and 1.7B
FEW += [(1, 151936, 1024), (2, 1000, 600), (1, 3000, 1100), (1, 40, 513)]  # a vocabulary, and ends inside tiles
FEW += [(1, 1024, 768), (1, 1024, 1152)]  # fewer whole parts than there are


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 31, 64])
def test_linear_layers_of_few_rows(rows, shape, dtype):
    """Sums of products of 16-bit numbers, which tensor cores add up in float32, if not in one order."""
    rng = np.random.default_rng(rows)
    x, weight = (jnp.asarray(rng.standard_normal(size) / 8, dtype) for size in ((rows, shape[2]), shape))
    parts = few.parts_of(weight)
    for kind in (dtype, jnp.float32) if shape[0] == 1 else (dtype,):
        y = few_linear(x, weight, dtype=kind)
        assert y.shape == (parts, rows, shape[1])
        assert y.dtype == (jnp.float32 if parts > 1 else kind)
        got, want = (np.asarray(y, np.float32).sum(axis=0) for y in (y, reference.few_linear(x, weight, dtype=y.dtype)))
        assert np.abs(got - want).max() <= {2: 1e-2, 4: 1e-4}[y.dtype.itemsize] * np.abs(want).max()


@pytest.mark.parametrize("apart", [True, False])
def test_a_compiled_step_has_no_branch_and_no_copy_of_the_cache(apart):
    *_, tables, lens = on_gpu(0, [300, 20], *SHAPES[0], rows=2)
    qkv, *args, kv_cache, _ = store_args(2, SHAPES[0], blocks=16)  # larger than what rows leave in parts

    def layers(qkv, kv_cache):
        for layer in range(LAYERS):
            if apart:
                q, kv_cache = norm_rope_store(qkv, *args, kv_cache, layer, eps=1e-6)
                q = paged_decode_attention(q, kv_cache, layer, tables, lens, scale=0.1)
            else:
                q, kv_cache = store_and_decode(qkv, *args, kv_cache, layer, tables, lens, scale=0.1, eps=1e-6)
            qkv = jnp.concatenate([q.reshape(2, 8, 2, 128), qkv[:, :, 2:]], axis=2)
        return qkv, kv_cache

    compiled = jax.jit(layers, donate_argnums=1).lower(qkv, kv_cache).compile()
    memory = compiled.memory_analysis()
    assert "conditional" not in compiled.as_text()
    assert memory.temp_size_in_bytes < kv_cache.nbytes
    assert memory.alias_size_in_bytes >= kv_cache.nbytes


NOISY = [(1, 151936), (3, 18992), (70, 151936), (512, 151936), (9, 500), (9000, 1)]


@pytest.mark.parametrize(("rows", "vocab"), NOISY)
def test_noise_and_the_best_entry(rows, vocab):
    """The oracle's draws, but for entries as close as the card's logarithms; of one entry the score is its noise."""
    rng = np.random.default_rng(rows)
    logits = 3 * jax.random.normal(jax.random.key(0), (rows, vocab)) * (vocab > 1)
    temperatures = np.where(np.arange(rows) % 4 == 3, 0, rng.uniform(0.01, 3, rows))
    sampling = sampling_array(rows, temperature=temperatures, seeds=rng.integers(0, 2**32, (rows, 2), np.uint32))
    positions = jnp.asarray(rng.integers(0, 2**20, rows, np.int32))
    thresholds = jnp.where(jnp.arange(rows) % 2 == 1, 0.0, -jnp.inf)
    args = logits, jnp.asarray(sampling), positions, thresholds
    entries, scores = noisy_argmax(*args)
    expected, highest = jax.jit(reference_sampling.noisy_argmax)(*args)
    np.testing.assert_allclose(scores, highest, rtol=1e-5, atol=2e-5)
    assert np.mean(np.asarray(entries) == np.asarray(expected)) >= 0.99
    for row in range(0, rows, max(1, rows // 5)):
        alone = noisy_argmax(*(x[row : row + 1] for x in args))
        assert (alone[0][0], alone[1][0]) == (entries[row], scores[row]), "a row's draw depends on the others"
