"""What the public functions become: lowered for CUDA on a machine without a GPU, and lowered for the CPU."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from nanovllm_jax.kernels import (
    add_norm,
    few_linear,
    fixed_matmul,
    norm_rope_store,
    paged_decode_attention,
    paged_prefill_attention,
    row_linear,
    row_norm_linear,
    split,
    store_and_decode,
    traced_for,
)

KV_HEADS = 8  # of every published Qwen3; the group sizes of 0.6B and 1.7B, 4B and 8B, 14B, 32B
GROUPS = [2, 4, 5, 8]
PALLAS = "__gpu$xla.gpu.triton"


def lowered_for_cuda(f, *args, platform="gpu") -> str:
    """As an engine traces it, which knows its platform: then the oracles are not traced."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), traced_for(platform):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text: str) -> list[str]:
    return re.findall(r"custom_call @([\w.$]+)", text)


def aliased(text: str) -> list[tuple[str, str]]:
    """(result, argument) of each array that a kernel writes in place."""
    return re.findall(r"output_operand_alias<output_tuple_indices = \[(\d)\],\s*operand_index = (\d)", text)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def cache(dtype=jnp.bfloat16, block_size=256, kv_heads=KV_HEADS, head_dim=128, slots=2**17):
    return jax.ShapeDtypeStruct((2, 1, slots // block_size, kv_heads, block_size, head_dim), dtype)


def store_case(tokens, group, pool):
    kv_heads, head_dim = pool.shape[3], pool.shape[5]
    qkv = jax.ShapeDtypeStruct((tokens, kv_heads, group + 2, head_dim), pool.dtype)
    gain, angle = (
        jax.ShapeDtypeStruct((head_dim,), pool.dtype),
        jax.ShapeDtypeStruct((tokens, head_dim // 2), jnp.float32),
    )
    return functools.partial(norm_rope_store, eps=1e-6), (qkv, gain, gain, angle, angle, ints(tokens), pool, ints())


def norm_case(tokens, features, dtype=jnp.bfloat16, parts=1):
    x, delta = (jax.ShapeDtypeStruct((*leading, tokens, features), dtype) for leading in ((), (parts,)))
    return functools.partial(add_norm, eps=1e-6), (x, delta, jax.ShapeDtypeStruct((features,), dtype))


def split_case(*sizes, dtype=jnp.bfloat16):
    return functools.partial(split, sizes=sizes), (jax.ShapeDtypeStruct((sum(sizes),), dtype),)


def matmul_case(rows, features, depth, dtype=jnp.bfloat16):
    arrays = (jax.ShapeDtypeStruct((n, depth), dtype) for n in (rows, features))
    return functools.partial(fixed_matmul, dtype=dtype), tuple(arrays)


def decode_case(batch, group, pool):
    q = jax.ShapeDtypeStruct((batch, pool.shape[3] * group, pool.shape[5]), pool.dtype)
    f = functools.partial(paged_decode_attention, scale=0.1)
    return f, (q, pool, ints(), ints(batch, 4096 // pool.shape[4]), ints(batch))


def new_tokens_case(batch, group, pool):
    _, new = store_case(batch, group, pool)
    f = functools.partial(store_and_decode, scale=0.1, eps=1e-6)
    return f, (*new, ints(batch, 4096 // pool.shape[4]), ints(batch))


def prefill_case(tokens, sequences, group, pool):
    q = jax.ShapeDtypeStruct((tokens, pool.shape[3] * group, pool.shape[5]), pool.dtype)
    tables = ints(sequences, 4096 // pool.shape[4])
    f = functools.partial(paged_prefill_attention, scale=0.1)
    return f, (q, pool, ints(), tables, ints(sequences + 1), ints(sequences))


POOLS = [cache(), cache(block_size=16), cache(jnp.float32), cache(jnp.float16, 32)]
POOLS += [cache(head_dim=64), cache(head_dim=256), cache(jnp.float32, head_dim=256, block_size=16)]
SHAPES = [(group, pool) for group in GROUPS for pool in POOLS[:2]] + [(2, pool) for pool in POOLS[2:]]
SHAPES += [(1, cache(kv_heads=1)), (2, cache(slots=2**22))]  # offsets beyond 2**31
SHAPES += [(4, cache(kv_heads=1)), (8, cache(kv_heads=1))]  # a device's share of 8B and 32B over 8


@pytest.mark.parametrize(("group", "pool"), SHAPES, ids=str)
def test_store_lowers_to_one_kernel_that_aliases_the_cache(group, pool):
    for tokens in (1, 256, 544, 16384):
        f, args = store_case(tokens, group, pool)
        text = lowered_for_cuda(f, *args)
        assert custom_calls(text) == [PALLAS]
        assert aliased(text) == [("1", "6")]


@pytest.mark.parametrize("features", [1024, 2048, 2560, 4096, 5120, 48])  # of 0.6B, 1.7B, 4B, 8B, 14B and 32B
def test_norm_lowers_to_one_kernel(features):
    for tokens, dtype, parts in ((1, jnp.bfloat16, 4), (256, jnp.float32, 1), (16384, jnp.float16, 0)):
        f, args = norm_case(tokens, features, dtype, parts)
        assert custom_calls(lowered_for_cuda(f, *args)) == [PALLAS]


@pytest.mark.parametrize(("hidden", "layers"), [(1024, 28), (5120, 64), (48, 2)])  # of 0.6B, 32B and a small one
def test_split_lowers_to_one_kernel(hidden, layers):
    for dtype in (jnp.bfloat16, jnp.float32):
        f, args = split_case(*[hidden, hidden, 128, 128] * layers, hidden, dtype=dtype)
        assert custom_calls(lowered_for_cuda(f, *args)) == [PALLAS]


@pytest.mark.parametrize(("features", "depth"), [(4096, 1024), (6144, 2560), (1024, 3072), (151936, 1024), (40, 48)])
def test_fixed_matmul_lowers_to_one_kernel(features, depth):
    for rows, dtype in ((1, jnp.bfloat16), (300, jnp.float32), (16384, jnp.float16)):
        f, args = matmul_case(rows, features, depth, dtype)
        assert custom_calls(lowered_for_cuda(f, *args)) == [PALLAS]


@pytest.mark.parametrize(("weights", "features", "depth"), [(1, 4096, 1024), (2, 3072, 1024), (1, 1024, 2560)])
def test_linear_layers_of_a_row_lower_to_one_kernel(weights, features, depth):
    row, gain, weight = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, depth), (depth,), (weights, features, depth))
    )
    fused = functools.partial(row_norm_linear, eps=1e-6)
    assert custom_calls(lowered_for_cuda(fused, row, row, gain, weight)) == [PALLAS]
    part = jax.ShapeDtypeStruct((features, depth), jnp.bfloat16)
    assert custom_calls(lowered_for_cuda(row_linear, row, part)) == [PALLAS]


@pytest.mark.parametrize(
    ("weights", "features", "depth"),
    [(1, 4096, 1024), (2, 3072, 1024), (1, 1024, 3072), (1, 151936, 1024), (2, 40, 600)],
)
def test_linear_layers_of_few_rows_lower_to_one_kernel(weights, features, depth):
    for rows, dtype in ((2, jnp.bfloat16), (33, jnp.float16), (64, jnp.bfloat16)):
        x, weight = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, depth), (weights, features, depth)))
        assert custom_calls(lowered_for_cuda(few_linear, x, weight)) == [PALLAS]


@pytest.mark.parametrize(("group", "pool"), SHAPES, ids=str)
def test_decode_lowers_to_its_kernels(group, pool):
    for batch in (1, 2048):
        f, args = decode_case(batch, group, pool)
        assert custom_calls(lowered_for_cuda(f, *args)) == [PALLAS] * 3  # the list of work, attention, parts combined


@pytest.mark.parametrize(("group", "pool"), SHAPES, ids=str)
def test_new_tokens_lower_to_kernels_that_alias_the_cache(group, pool):
    for batch in (1, 127, 128, 2048):
        f, args = new_tokens_case(batch, group, pool)
        text = lowered_for_cuda(f, *args)
        assert custom_calls(text) == [PALLAS] * 3  # as of decode: what stores is the second of these
        assert aliased(text)[0] == ("3", "6")


@pytest.mark.parametrize(("group", "pool"), SHAPES, ids=str)
def test_prefill_lowers_to_one_kernel(group, pool):
    f, args = prefill_case(2048, 16, group, pool)
    assert custom_calls(lowered_for_cuda(f, *args)) == [PALLAS]


def test_layers_share_one_lowering():
    f, (q, pool, _, tables, lens) = decode_case(2048, 2, cache())

    def layers(q, pool, tables, lens):
        for layer in range(4):
            q = f(q, pool, layer, tables, lens)
        return q

    text = jax.jit(layers).lower(q, pool, tables, lens).as_text()
    assert len(re.findall(r"func.func private @paged_decode_attention", text)) == 1


CASES = {
    "store": lambda: store_case(4, 2, cache()),
    "norm": lambda: norm_case(4, 64),
    "split": lambda: split_case(4, 64),
    "matmul": lambda: matmul_case(4, 64, 32),
    "decode": lambda: decode_case(4, 2, cache()),
    "new tokens": lambda: new_tokens_case(4, 2, cache()),
    "prefill": lambda: prefill_case(64, 2, 2, cache()),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_one_part_is_traced_where_the_platform_is_known(make):
    f, args = make()
    traced = jax.jit(f)  # one of them for all: what it traced for another platform is no answer

    def jaxpr(platform):
        with traced_for(platform):
            return str(traced.trace(*args).jaxpr)

    for platform, has_kernel, has_both in (("cpu", 0, 0), ("gpu", 1, 0), (None, 1, 1), ("cpu", 0, 0)):
        text = jaxpr(platform)
        assert ("pallas_call" in text, "platform_index" in text) == (has_kernel, has_both), platform


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_gpu_gets_the_kernels_alone(make):
    """Also where it is not known before that it is one."""
    f, args = make()
    calls = custom_calls(lowered_for_cuda(f, *args, platform=None))
    assert set(calls) == {PALLAS}
    assert calls == custom_calls(lowered_for_cuda(f, *args))


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_cpu_gets_the_oracle_alone(make):
    f, args = make()
    lowered = jax.jit(f).lower(*args)
    assert custom_calls(lowered.as_text()) == []
    assert "conditional" not in lowered.compile().as_text()


def test_lowering_looks_for_no_module_of_types(monkeypatch):
    """There is none of Triton's: to look along the whole path at each value would take longer than all the rest."""
    searched = []

    class Recorder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            searched.append(name)

    monkeypatch.setattr(sys, "meta_path", [Recorder, *sys.meta_path])
    f, args = decode_case(3, 2, cache())
    lowered_for_cuda(f, *args)
    assert len(searched) < 20, searched
