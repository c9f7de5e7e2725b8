"""The kernels of Mosaic GPU on a machine without a GPU: in jax's simulation of one, and what they lower to."""

import faulthandler
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from nanovllm_jax.kernels import (
    common,
    hopper,
    hopper_prefill,
    hopper_swiglu,
    is_many_rows,
    swiglu,
)
from paged_cases import paged, prefill_expected
from test_lowering import PALLAS, cache, custom_calls, lowered_for_cuda, prefill_case

PROGRAMS = 3  # fewer than tiles, so that each has several
JAX_0_10 = jax.__version_info__ < (0, 11)
READS_BEYOND = pytest.mark.skipif(JAX_0_10, reason="jax 0.10 simulates no load that ends beyond an array")
MULTIPLIES = pytest.mark.skipif(JAX_0_10, reason="jax 0.10 simulates no products of tensor cores")
WRITES_IN_PLACE = pytest.mark.skipif(JAX_0_10, reason="jax 0.10's kernels take no mutable arrays")
CASES = [  # contexts, new tokens, kv heads, group, block_size, dtype
    ([128], [128], 1, 1, 128, jnp.bfloat16),
    ([100, 430, 0, 129], [100, 130, 0, 129], 1, 2, 256, jnp.bfloat16),
    ([64, 65, 1, 700], [64, 1, 1, 3], 2, 3, 128, jnp.float16),
]


def prefill(contexts, queries, kv_heads, group, block_size, dtype, decodes=0, padding=128):
    """(the kernel's output, what it should be) behind some rows of decodes, and with padding at the end.

    Unused slots and padded queries are NaN.
    """
    rng = np.random.default_rng(sum(contexts))
    options = dict(kv_heads=kv_heads, head_dim=128, block_size=block_size)
    held = paged(rng, contexts, width=-(-max(contexts) // block_size) + 1, **options)
    starts = np.cumsum([0, *queries]).astype(np.int32)
    q = rng.standard_normal((starts[-1] + padding, kv_heads * group, 128)).astype(np.float32)
    q[starts[-1] :] = np.nan
    expected = prefill_expected(q, held, starts, 0.1)
    q, kv_cache = (jnp.asarray(x, dtype) for x in (np.concatenate((q[:decodes], q)), held.kv_cache))
    out = (jnp.full_like(q, 3),) if decodes else ()
    layer, tables, lens = map(jnp.asarray, held[1:])
    args = q, kv_cache, layer, tables, starts + decodes, lens, *out
    call = functools.partial(hopper_prefill.paged_prefill_attention, scale=0.1, interpret=InterpretGPUParams())
    got = jax.jit(call)(*args)
    return np.asarray(got, np.float32), expected


def use_programs(monkeypatch, number):
    for module in (hopper, hopper_prefill, hopper_swiglu):
        monkeypatch.setattr(module, "SMS", number)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    use_programs(monkeypatch, PROGRAMS)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """jax lowers and compiles a kernel's simulation anew for each warpgroup of each program: here the first does."""
    if not JAX_0_10:  # others may run it in another way
        return
    from jax._src.pallas.mosaic.interpret import thread_map

    lock, programs = threading.Lock(), {}

    def run(jaxpr, *args):
        with lock:
            if jaxpr not in programs:
                program = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                programs[jaxpr] = program.lower(*args).compile()
        programs[jaxpr](*args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


@pytest.fixture(autouse=True)
def no_waiting_forever():
    """Warpgroups that wait for one another, as they would on a GPU, end the process and show where."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("padding", [128, 1024])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_equals_float64_attention(case, padding):
    """And padding of several tiles to each program: it once waited forever, a warpgroup for its turn and the loader
    for it.
    """
    got, expected = prefill(*case, padding=padding)
    np.testing.assert_allclose(got, expected, atol=1e-2 * np.abs(expected).max())
    assert not got[-padding:].any()


@READS_BEYOND
@pytest.mark.parametrize("seed", range(10))
def test_any_batch_in_any_number_of_programs(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    use_programs(monkeypatch, int(rng.integers(1, 9)))
    lengths = [0, 1, 2, 63, 64, 65, 100, 127, 128, 129, 200, 256, 300]
    queries = rng.choice(lengths, rng.integers(1, 6)).tolist()
    contexts = [length and length + int(rng.choice([0, 1, 64, 130, 300])) for length in queries]
    padding = int(rng.choice([8, 100, 130, 700, 1400]))
    heads = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    got, expected = prefill(contexts, queries, *heads, 128, jnp.bfloat16, padding=padding)
    np.testing.assert_allclose(got, expected, atol=1e-2 * np.abs(expected).max(initial=1e-9))
    assert not got[-padding:].any()


def test_nothing_but_padding():
    got, _ = prefill([0], [0], 1, 2, 128, jnp.bfloat16, padding=1024)
    assert not got.any()


@WRITES_IN_PLACE
def test_rows_of_decoding_sequences_before_the_first_stay():
    got, expected = prefill(*CASES[1], decodes=7)
    assert (got[:7] == 3).all()
    np.testing.assert_allclose(got[7:], expected, atol=1e-2 * np.abs(expected).max())


def swiglu_args(rows, depth, features, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((rows, depth), dtype), jax.ShapeDtypeStruct((2, features, depth), dtype)


@MULTIPLIES
@pytest.mark.parametrize("programs", [2, 4, 10])
@pytest.mark.parametrize(
    ("rows", "depth", "features"),
    [(8, 64, 128), (72, 128, 384), (128, 448, 640), (136, 448, 640), (2400, 64, 128), (600, 128, 256), (600, 448, 384)],
)
def test_swiglu_of_any_number_of_tiles_in_any_number_of_programs(rows, depth, features, programs, monkeypatch):
    """Fewer tiles than pairs of programs and more, of the same rows and of others, and tiles that end beyond the last
    feature; fewer loads than there is room for and more.

    Here products take no time and nothing is shared: whether memory is free too early shows on a GPU alone.
    """
    use_programs(monkeypatch, programs)
    rng = np.random.default_rng(rows)
    x, weight = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in ((rows, depth), (2, features, depth)))
    got = hopper_swiglu.swiglu(jnp.asarray(x), jnp.asarray(weight), interpret=InterpretGPUParams(detect_races=True))
    gate, up = np.einsum("td,sfd->stf", x.astype(np.float64), weight.astype(np.float64))
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.01 * np.abs(expected).max())
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("depth", "features"), [(1024, 3072), (2560, 9728), (4096, 1536), (5120, 17408)])
def test_swiglu_lowers_to_one_kernel(depth, features, dtype, monkeypatch):
    """As cut for an H200, and not for a few programs, to which all tiles are alike."""
    use_programs(monkeypatch, 132)
    for rows in (72, 128, 256, 1024, 1056, 16384):
        [call] = custom_calls(lowered_for_cuda(hopper_swiglu.swiglu, *swiglu_args(rows, depth, features, dtype)))
        assert call.startswith("mosaic_gpu")


def test_how_swiglu_is_cut(monkeypatch):
    """Into tiles that keep an H200 at work, and that fit in its shared memory."""
    use_programs(monkeypatch, 132)

    def cut(rows, features):
        tiles = hopper_swiglu.Tiles.of(rows, features)
        assert tiles.stages >= 4
        assert tiles.are_enough
        return tiles.features, tiles.rows_are_shared, tiles.grid

    assert cut(128, 9728) == (80, True, (1, 61))  # of 66 pairs
    assert cut(72, 3072) == (32, True, (1, 48))
    assert cut(256, 12288) == (96, False, (1, 128))  # twice 66 pairs, but for 4
    assert cut(136, 3072) == (48, False, (1, 64))
    for features in (3072, 6144, 9728, 12288, 17408):
        assert cut(16384, features)[0] == 128
    assert not hopper_swiglu.Tiles.of(128, 1536).are_enough


def test_swiglu_and_its_derivative_are_the_oracles_here():
    x = jax.random.normal(jax.random.key(0), (1024, 64), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (2, 128, 64), jnp.bfloat16)

    def plain(x, weight):
        gate, up = jnp.einsum("td,sfd->stf", x, weight)
        return jax.nn.silu(gate) * up

    exact = x.astype(jnp.float32), weight.astype(jnp.float32)
    slope, exact_slope = (jax.grad(lambda *args, f=f: f(*args).astype(jnp.float32).sum()) for f in (swiglu, plain))
    for got, want in ((swiglu(x, weight), plain(*exact)), (slope(x, weight), exact_slope(*exact))):
        assert got.dtype == x.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.01 * np.abs(want).max())


def test_what_they_are_for(monkeypatch):
    many = hopper_swiglu.MANY
    x, weight = swiglu_args(many, 128, 256)
    assert not is_many_rows(x, weight)  # no GPU here
    monkeypatch.setattr(common, "is_hopper", lambda: True)
    assert is_many_rows(x, weight)
    for args in ((many - 8, 128, 256), (many + 4, 128, 256), (many, 96, 256), (many, 128, 200)):
        assert not is_many_rows(*swiglu_args(*args))
    for rows in (128, 256, 1024):  # whole tiles, of which deep ones are few
        assert is_many_rows(*swiglu_args(rows, 1024, 256))
        assert is_many_rows(*swiglu_args(rows, 2560, 256)) == (rows == 128)
    for rows in (64, 120, 136, 384, 1056):
        assert not is_many_rows(*swiglu_args(rows, 1024, 256))
    assert not is_many_rows(*swiglu_args(many, 128, 256, jnp.float32))
    assert not is_many_rows(jax.ShapeDtypeStruct((2, many, 128), jnp.bfloat16), weight)


def test_which_prefill_is_lowered(monkeypatch):
    """Mosaic GPU's for many tokens, unless a token's bits must not depend on the batch; Triton's for the others."""
    monkeypatch.setattr(common, "is_hopper", lambda: True)

    def call(tokens, pool, **options):
        f, args = prefill_case(tokens, 3, 2, pool)
        return custom_calls(lowered_for_cuda(functools.partial(f, **options), *args))

    many = hopper_prefill.MANY
    assert call(many, cache())[-1].startswith("mosaic_gpu")
    assert call(many, cache(block_size=128))[-1].startswith("mosaic_gpu")
    assert call(many, cache(), fixed=True) == [PALLAS]
    for tokens, pool in ((many - 8, cache()), (many, cache(block_size=64)), (many, cache(head_dim=64))):
        assert call(tokens, pool) == [PALLAS]
    assert call(many, cache(jnp.float32)) == [PALLAS]


@WRITES_IN_PLACE
def test_prefill_beside_decodes_is_written_in_place():
    _, (q, *rest) = prefill_case(1088, 3, 2, cache())
    text = lowered_for_cuda(functools.partial(hopper_prefill.paged_prefill_attention, scale=0.1), q, *rest, q)
    assert "output_tuple_indices = [], operand_index = 6" in text


def test_available_asks_for_a_gpu_first():
    common.is_hopper.cache_clear()
    assert not common.is_hopper()
