"""Time each kernel alone on a GPU, beside the limit of the card, and for prefill beside cuDNN.

    python scripts/bench_kernels.py                    # every kernel at its default settings, checked on the oracle
    python scripts/bench_kernels.py --sweep prefill    # every tile setting of the list below, fastest first
    python scripts/bench_kernels.py --group 4 --kv-heads 8 --block-size 16

A call's time is that of a program which makes many of them, each on its own inputs (together more than the L2 cache
holds), divided by their number: launch gaps count, host time does not. The median of several runs is printed.
"""

import argparse
import functools
import itertools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from nanovllm_jax.kernels import decode, prefill, reference, store

DECODE = [(1, 1000, 1000), (1, 32000, 32000), (8, 1000, 1000), (64, 200, 1486), (256, 1000, 1000), (256, 200, 1486)]
PREFILL = [(16, 1024, 1024), (1, 16384, 16384), (64, 256, 256), (4, 2048, 8192), (1, 1000, 1000)]
STORE = [1, 256, 2048, 16384]

DECODE_TILES = [
    decode.Tiles(block_k, splits, min_tiles, num_warps, num_stages)
    for block_k, num_warps, num_stages in [(64, 4, 3), (64, 4, 5), (32, 2, 3), (32, 4, 5), (128, 4, 3), (128, 8, 3)]
    for splits, min_tiles in [(1, 1), (2, 4), (4, 4), (16, 1), (64, 1)]
]
PREFILL_CUTS = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 5), (128, 64, 4, 2), (128, 32, 4, 3)]
PREFILL_CUTS += [(64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3), (256, 64, 8, 3)]
PREFILL_TILES = [prefill.Tiles(*cut) for cut in PREFILL_CUTS]
STORE_TILES = [store.Tiles(tokens, warps) for tokens in (1, 2, 4, 8) for warps in (2, 4, 8)]


class Case(NamedTuple):
    """One problem: a kernel as kernel(*inputs, tiles=...), its input sets, and what it must move or compute."""

    kernel: str
    name: str
    call: object
    oracle: object
    sets: list
    bytes: float
    flops: float
    first_prefill: tuple[int, int] | None = None  # (sequences, tokens of each): cuDNN can do the same


class Shape(NamedTuple):
    """What all cases share."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: jnp.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def queries(self, rng, rows):
        shape = (rows, self.kv_heads * self.group, self.head_dim)
        return jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype)


def make_pool(shape: Shape, tokens: int):
    size = (tokens // shape.block_size, shape.kv_heads, shape.block_size, shape.head_dim)
    return tuple(jax.random.normal(jax.random.key(i), size, shape.dtype) for i in range(2))


def sets_for(set_bytes: float) -> int:
    """So many that they overflow the L2 cache several times."""
    return int(np.clip(256e6 / set_bytes, 4, 32))


def random_tables(rng, shape: Shape, pool, contexts):
    width = -(-max(contexts) // shape.block_size)
    blocks = itertools.cycle(rng.permutation(len(pool[0])))
    rows = [list(itertools.islice(blocks, width)) for _ in contexts]
    return jnp.array(rows, jnp.int32), jnp.array(contexts, jnp.int32)


def decode_case(rng, shape: Shape, pool, batch, low, high) -> Case:
    contexts = rng.integers(low, high + 1, batch)
    moved = float(contexts.sum()) * shape.token_bytes
    sets = [
        (shape.queries(rng, batch), *pool, *random_tables(rng, shape, pool, rng.permutation(contexts)))
        for _ in range(sets_for(moved))
    ]
    scale = shape.head_dim**-0.5
    call = functools.partial(decode.paged_decode_attention, scale=scale)
    oracle = functools.partial(reference.paged_decode_attention, scale=scale)
    flops = 4.0 * contexts.sum() * shape.kv_heads * shape.group * shape.head_dim
    name = f"{batch} x {low}" + (f"-{high}" if high > low else "")
    return Case("decode", name, call, oracle, sets, moved, flops)


def prefill_case(rng, shape: Shape, pool, sequences, new, context) -> Case:
    starts = jnp.arange(sequences + 1, dtype=jnp.int32) * new
    sets = []
    for _ in range(4):
        tables, lens = random_tables(rng, shape, pool, [context] * sequences)
        sets.append((shape.queries(rng, sequences * new), *pool, tables, starts, lens))
    scale = shape.head_dim**-0.5
    call = functools.partial(prefill.paged_prefill_attention, scale=scale)
    oracle = functools.partial(reference.paged_prefill_attention, scale=scale)
    seen = sequences * new * (context - new + (new + 1) / 2)  # keys, summed over the query tokens
    flops = 4.0 * seen * shape.kv_heads * shape.group * shape.head_dim
    name = f"{sequences} x {new}" + (f" of {context}" if context > new else "")
    moved = float(sequences * context) * shape.token_bytes
    first_prefill = (sequences, new) if context == new and shape.dtype.itemsize == 2 else None
    return Case("prefill", name, call, oracle, sets, moved, flops, first_prefill)


def store_case(rng, shape: Shape, pool, tokens) -> Case:
    slots = len(pool[0]) * shape.block_size
    new = (tokens, shape.kv_heads, shape.head_dim)
    moved = 2.0 * tokens * shape.token_bytes
    sets = []
    for _ in range(min(16, sets_for(moved))):
        k, v = (jnp.asarray(rng.standard_normal(new, np.float32), shape.dtype) for _ in range(2))
        sets.append((k, v, jnp.asarray(rng.permutation(slots)[:tokens], jnp.int32)))
    return Case("store", f"{tokens}", store.store_kv, reference.store_kv, sets, moved, 0.0)


def compiled(case: Case, call, pool):
    """A program that makes one call on each input set; for store, on caches that it is given and gives back."""
    if case.kernel == "store":

        def program(caches, sets):
            for inputs in sets:
                caches = call(*inputs, *caches)
            return caches

        return jax.jit(program, donate_argnums=0).lower(pool, case.sets).compile()
    return jax.jit(lambda sets: [call(*inputs) for inputs in sets]).lower(case.sets).compile()


def seconds_per_call(case: Case, program, pool, samples: int = 7) -> float:
    """The median over samples of about 10 ms each."""
    caches = jax.tree.map(jnp.copy, pool) if case.kernel == "store" else None

    def run(times):
        nonlocal caches
        start = time.perf_counter()
        for _ in range(times):
            if caches is None:
                out = program(case.sets)
            else:
                out = caches = program(caches, case.sets)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    run(2)
    times = max(2, int(0.01 / (run(3) / 3)))
    return statistics.median(run(times) for _ in range(samples)) / times / len(case.sets)


def relative_error(case: Case, pool) -> float:
    """The largest difference to the oracle on the first input set, relative to the largest output."""
    inputs = (*case.sets[0], *pool) if case.kernel == "store" else case.sets[0]
    got, expected = jax.jit(case.call)(*inputs), jax.jit(case.oracle)(*inputs)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    as_f32 = [[x.astype(jnp.float32) for x in pair] for pair in pairs]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in as_f32)


def cudnn_seconds(case: Case, shape: Shape, sequences: int, new: int) -> float:
    """cuDNN's fused attention on the same first prefill, contiguous instead of paged."""
    rng = np.random.default_rng(0)
    sizes = [(sequences, new, heads, shape.head_dim) for heads in (shape.kv_heads * shape.group, shape.kv_heads)]
    sets = []
    for _ in case.sets:
        q, k, v = (jnp.asarray(rng.standard_normal(size, np.float32), shape.dtype) for size in (*sizes, sizes[1]))
        sets.append((q, k, v))
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    contiguous = case._replace(kernel="cudnn", sets=sets)
    return seconds_per_call(contiguous, compiled(contiguous, attention, None), None)


def rate(case: Case, seconds: float, args) -> str:
    limit = max(case.bytes / args.bandwidth / 1e12, case.flops / args.flops / 1e12)
    if case.kernel == "prefill":
        amount = f"{case.flops / seconds / 1e12:6.0f} TFLOP/s"
    else:
        amount = f"{case.bytes / seconds / 1e12:6.2f} TB/s"
    return f"{seconds * 1e6:9.1f} us  {amount}  {limit / seconds:5.0%} of the limit"


def bench(case: Case, shape: Shape, pool, args) -> None:
    seconds = seconds_per_call(case, compiled(case, case.call, pool), pool)
    line = f"{case.kernel:8}{case.name:16}{rate(case, seconds, args)}  error {relative_error(case, pool):.1e}"
    if case.first_prefill:
        other = cudnn_seconds(case, shape, *case.first_prefill)
        line += f"  cuDNN {other * 1e6:.1f} us ({other / seconds:.2f} x its speed)"
    print(line, flush=True)


def sweep(case: Case, pool, args) -> None:
    """All settings of the case's kernel, compiled in parallel, timed one after another."""
    settings = {"decode": DECODE_TILES, "prefill": PREFILL_TILES, "store": STORE_TILES}[case.kernel]
    if case.kernel == "decode":  # neither a handful of programs nor heaps of empty ones
        unsplit = len(case.sets[0][0]) * pool[0].shape[1]
        settings = [tiles for tiles in settings if 64 <= unsplit * tiles.splits <= 8192]

    def build(tiles):
        try:
            return compiled(case, functools.partial(case.call, tiles=tiles), pool)
        except Exception as error:  # most often: more shared memory than there is
            return error

    with ThreadPoolExecutor() as threads:
        programs = list(threads.map(build, settings))
    timed = []
    for tiles, program in zip(settings, programs, strict=True):
        if isinstance(program, Exception):
            print(f"{case.kernel:8}{case.name:16}{tiles} does not compile: {str(program).splitlines()[0][:80]}")
        else:
            timed.append((seconds_per_call(case, program, pool, samples=3), tiles))
    for seconds, tiles in sorted(timed):
        print(f"{case.kernel:8}{case.name:16}{rate(case, seconds, args)}  {tiles}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=2, help="query heads to a kv head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2**19, help="size of the KV cache")
    parser.add_argument("--only", choices=["decode", "prefill", "store"])
    parser.add_argument("--sweep", choices=["decode", "prefill", "store"], help="time this kernel's tile settings")
    parser.add_argument("--bandwidth", type=float, default=4.4, help="the card's measured TB/s (H200: 4.4)")
    parser.add_argument("--flops", type=float, default=790, help="the card's measured TFLOP/s (H200, bf16: 790)")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no GPU: the kernels are compiled for NVIDIA GPUs only")
    shape = Shape(args.kv_heads, args.group, args.head_dim, args.block_size, jnp.dtype(args.dtype))
    pool = make_pool(shape, args.tokens)
    rng = np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {shape}")
    kernels = {"decode": (decode_case, DECODE), "prefill": (prefill_case, PREFILL), "store": (store_case, STORE)}
    for kernel, (make, problems) in kernels.items():
        if kernel != (args.sweep or args.only or kernel):
            continue
        for problem in problems:
            case = make(rng, shape, pool, *np.atleast_1d(problem).tolist())
            if args.sweep:
                sweep(case, pool, args)
            else:
                bench(case, shape, pool, args)


if __name__ == "__main__":
    main()
