"""The problems of bench_kernels.py: each kernel's inputs, its oracle, and what it must move or compute."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from nanovllm_jax.kernels import (
    common,
    decode,
    few,
    hopper_prefill,
    hopper_swiglu,
    norm,
    prefill,
    reference,
    row,
    store,
)

# (batch, shortest and longest context), (sequences, new tokens and context of each), tokens, tokens
DECODE = [(1, 1000, 1000), (1, 32000, 32000), (8, 1000, 1000), (64, 1000, 1000), (64, 200, 1486)]
DECODE += [(256, 1000, 1000), (256, 200, 1486)]
PREFILL = [(16, 1024, 1024), (1, 16384, 16384), (64, 256, 256), (4, 2048, 8192), (1, 1000, 1000)]
NEW = [(1, 1000), (8, 1000), (64, 128)]
SHARED = [(256, 8, 2048, 208), (256, 16, 768, 332), (64, 4, 1024, 208)]  # batch, prefixes, their length, the rest
STORE = [1, 64, 256, 16384]
NORM = [1, 256, 16384]
ROW = [(1, 4096), (2, 3072)]  # (weights, features of each): q/k/v, gate and up
VOCABULARY = 151936
LAYER = np.int32(0)  # of the cache's one
FEW = [(rows, *layer) for rows in (8, 64) for layer in [*ROW, (1, 1024), (1, VOCABULARY)]]  # rows; and o, and the head
SWIGLU = [(1024, 3072), (16384, 3072)]  # rows, features
TABLE_TOKENS = 4096  # a block table's width: at least so many tokens, as an engine's goes by its longest context


class Case(NamedTuple):
    """One problem: a kernel as call(*inputs, *state, tiles=...), its input sets, and what it must move or compute."""

    kernel: str
    name: str
    call: object
    oracle: object
    sets: list
    default: tuple | None  # the tile settings that it has on its own, if there is a choice
    bytes: float
    flops: float = 0.0
    state: tuple = ()  # what calls hand on: each returns an output and the next one's
    first_prefill: tuple[int, int] | None = None  # (sequences, tokens of each): cuDNN can do the same


class Shape(NamedTuple):
    """What all cases share."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    hidden: int
    dtype: jnp.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def random(self, rng, *size):
        return jax.random.normal(jax.random.key(rng.integers(2**31)), size, self.dtype)


def make_pool(shape: Shape, tokens: int):
    """Random keys and values of one layer: what kernels know as kv_cache."""
    size = 2, 1, tokens // shape.block_size, shape.kv_heads, shape.block_size, shape.head_dim
    return jax.random.normal(jax.random.key(0), size, shape.dtype)


def sets_for(set_bytes: float) -> int:
    """So many that they overflow the L2 cache several times."""
    return int(np.clip(256e6 / set_bytes, 4, 32))


def random_tables(rng, shape: Shape, pool, contexts):
    used = [-(-context // shape.block_size) for context in contexts]
    tables = np.zeros((len(contexts), max(TABLE_TOKENS // shape.block_size, *used)), np.int32)
    blocks = itertools.cycle(rng.permutation(pool.shape[2]))
    for table, count in zip(tables, used, strict=True):
        table[:count] = list(itertools.islice(blocks, count))
    return jnp.asarray(tables), jnp.array(contexts, jnp.int32)


def kernel_and_oracle(module, name: str, **static):
    return [functools.partial(getattr(place, name), **static) for place in (module, reference)]


def decode_case(rng, shape: Shape, pool, batch, low, high) -> Case:
    contexts = np.sort(rng.integers(low, high + 1, batch))[::-1]  # longest first, as the scheduler has them
    moved = float(contexts.sum()) * shape.token_bytes
    sets = []
    for _ in range(sets_for(moved)):
        q = shape.random(rng, batch, shape.heads, shape.head_dim)
        sets.append((q, pool, LAYER, *random_tables(rng, shape, pool, contexts)))
    name = f"{batch} x {low}" + (f"-{high}" if high > low else "")
    functions = kernel_and_oracle(decode, "paged_decode_attention", scale=shape.head_dim**-0.5)
    default = decode.default_tiles(batch, shape.kv_heads, shape.head_dim, shape.dtype)
    flops = 4.0 * contexts.sum() * shape.heads * shape.head_dim
    return Case("decode", name, *functions, sets, default, moved, flops)


def new_case(rng, shape: Shape, pool, batch, context) -> Case:
    """A decode case that takes the new tokens in."""

    def pool_last(store_and_decode, tables, lens, *args, **tiles):
        return store_and_decode(*args, LAYER, tables, lens, **tiles)

    attends = decode_case(rng, shape, pool, batch, context, context)
    stores = store_case(rng, shape, pool, batch)
    sets = []
    for (_, _, _, tables, lens), (*token, _) in zip(attends.sets, itertools.cycle(stores.sets)):
        slots = tables[:, (context - 1) // shape.block_size] * shape.block_size + (context - 1) % shape.block_size
        sets.append((tables, lens, *token, slots))
    options = dict(scale=shape.head_dim**-0.5, eps=1e-6)
    functions = [functools.partial(pool_last, f) for f in kernel_and_oracle(decode, "store_and_decode", **options)]
    moved = attends.bytes + stores.bytes
    return Case("new", f"{batch} x {context}", *functions, sets, attends.default, moved, attends.flops, state=(pool,))


def shared_case(rng, shape: Shape, pool, batch, prefixes, length, own) -> Case:
    """A decode case whose sequences have a few prefixes, neighbours the same: these need to be read but once."""
    case = decode_case(rng, shape, pool, batch, length + own, length + own)
    first = np.arange(batch) * prefixes // batch * batch // prefixes  # the one of a prefix whose blocks all have
    blocks = length // shape.block_size
    sets = []
    for *cached, tables, lens in case.sets:
        tables = np.array(tables)
        tables[:, :blocks] = tables[first, :blocks]
        sets.append((*cached, jnp.asarray(tables), lens))
    moved = float(prefixes * length + batch * own) * shape.token_bytes
    return case._replace(kernel="shared", name=f"{batch} x {length}+{own} of {prefixes}", sets=sets, bytes=moved)


def prefill_case(rng, shape: Shape, pool, sequences, new, context) -> Case:
    starts = jnp.arange(sequences + 1, dtype=jnp.int32) * new
    sets = []
    for _ in range(4):
        tables, lens = random_tables(rng, shape, pool, [context] * sequences)
        q = shape.random(rng, sequences * new, shape.heads, shape.head_dim)
        sets.append((q, pool, LAYER, tables, starts, lens))
    name = f"{sequences} x {new}" + (f" of {context}" if context > new else "")
    functions = kernel_and_oracle(prefill, "paged_prefill_attention", scale=shape.head_dim**-0.5)
    default = prefill.default_tiles(sequences * new, shape.heads, shape.group, shape.head_dim, shape.dtype)
    seen = sequences * new * (context - new + (new + 1) / 2)  # keys, summed over the query tokens
    flops = 4.0 * seen * shape.heads * shape.head_dim
    moved = float(sequences * context) * shape.token_bytes
    first_prefill = (sequences, new) if context == new and shape.dtype.itemsize == 2 else None
    return Case("prefill", name, *functions, sets, default, moved, flops, first_prefill=first_prefill)


def store_case(rng, shape: Shape, pool, tokens) -> Case:
    slots, half = pool.shape[2] * shape.block_size, shape.head_dim // 2
    moved = 2.0 * tokens * shape.token_bytes * (shape.group + 2) / 2  # queries, keys and values come in and go out
    sets = []
    for _ in range(sets_for(moved)):
        qkv = shape.random(rng, tokens, shape.kv_heads, shape.group + 2, shape.head_dim)
        gains = [shape.random(rng, shape.head_dim) for _ in range(2)]
        angles = [shape.random(rng, tokens, half).astype(jnp.float32) for _ in range(2)]
        sets.append((qkv, *gains, *angles, jnp.asarray(rng.permutation(slots)[:tokens], jnp.int32)))
    functions = kernel_and_oracle(store, "norm_rope_store", layer=LAYER, eps=1e-6)
    return Case("store", f"{tokens}", *functions, sets, store.default_tiles(tokens), moved, state=(pool,))


def norm_case(rng, shape: Shape, pool, tokens) -> Case:
    def output_first(add_norm, delta, gain, x, **tiles):
        return add_norm(x, delta[None], gain, **tiles)[::-1]

    moved = 4.0 * tokens * shape.hidden * shape.dtype.itemsize
    x, gain = shape.random(rng, tokens, shape.hidden), shape.random(rng, shape.hidden)
    sets = [(shape.random(rng, tokens, shape.hidden), gain) for _ in range(sets_for(moved))]
    functions = [functools.partial(output_first, f) for f in kernel_and_oracle(norm, "add_norm", eps=1e-6)]
    return Case("norm", f"{tokens}", *functions, sets, norm.default_tiles(shape.hidden), moved, state=(x,))


def row_case(rng, shape: Shape, pool, weights, features) -> Case:
    moved = float(weights * features * shape.hidden * shape.dtype.itemsize)
    x, delta, gain = (shape.random(rng, *size, shape.hidden) for size in ((1,), (1,), ()))
    sets = [(x, delta, gain, shape.random(rng, weights, features, shape.hidden)) for _ in range(sets_for(moved))]
    functions = kernel_and_oracle(row, "row_norm_linear", eps=1e-6)
    return Case("row", f"{weights} x {features}", *functions, sets, row.default_tiles(shape.hidden), moved)


def few_case(rng, shape: Shape, pool, rows, weights, features) -> Case:
    x, weight = shape.random(rng, rows, shape.hidden), (weights, features, shape.hidden)
    parts = few.parts_of(jax.ShapeDtypeStruct(weight, shape.dtype))
    kind = jnp.dtype(jnp.float32) if parts > 1 or features == VOCABULARY else shape.dtype
    moved = float(weights * features * shape.hidden * shape.dtype.itemsize + parts * rows * features * kind.itemsize)
    sets = [(x, shape.random(rng, *weight)) for _ in range(sets_for(moved))]
    functions = kernel_and_oracle(few, "few_linear", parts=parts, dtype=kind)
    name = f"{rows} x {weights} x {features}"
    return Case("few", name, *functions, sets, few.default_tiles(weights, features), moved)


def hopper_case(rng, shape: Shape, pool, *problem) -> Case:
    call, oracle = kernel_and_oracle(hopper_prefill, "paged_prefill_attention", scale=shape.head_dim**-0.5)
    return prefill_case(rng, shape, pool, *problem)._replace(kernel="hopper", call=call, oracle=oracle, default=None)


def swiglu_case(rng, shape: Shape, pool, rows, features) -> Case:
    moved = float(shape.dtype.itemsize * (rows * (shape.hidden + features) + 2 * features * shape.hidden))
    weight = shape.random(rng, 2, features, shape.hidden)
    sets = [(shape.random(rng, rows, shape.hidden), weight) for _ in range(sets_for(moved))]
    flops = 4.0 * rows * features * shape.hidden
    return Case("swiglu", f"{rows} x {features}", *kernel_and_oracle(hopper_swiglu, "swiglu"), sets, None, moved, flops)


KERNELS = {"decode": (decode_case, DECODE), "new": (new_case, NEW), "shared": (shared_case, SHARED)}
KERNELS |= {"prefill": (prefill_case, PREFILL)}
KERNELS |= {"store": (store_case, STORE), "norm": (norm_case, NORM), "row": (row_case, ROW), "few": (few_case, FEW)}
if common.is_hopper():
    KERNELS |= {"hopper": (hopper_case, PREFILL), "swiglu": (swiglu_case, SWIGLU)}


def make_cases(shape: Shape, tokens: int, kernels: list[str]) -> Iterator[Case]:
    """Each problem of these kernels, over a KV cache of so many tokens."""
    pool, rng = make_pool(shape, tokens), np.random.default_rng(0)
    for kernel in kernels:
        make, problems = KERNELS[kernel]
        for problem in problems:
            yield make(rng, shape, pool, *np.atleast_1d(problem).tolist())
