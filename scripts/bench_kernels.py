"""Time each kernel alone on a GPU, beside the limit of the card, and for prefill beside cuDNN.

Those of sampling have a script of their own, bench_sampling.py.

    python scripts/bench_kernels.py                         # every kernel as it is, checked on the oracle
    python scripts/bench_kernels.py --sweep                 # the tile settings listed below against the default ones
    python scripts/bench_kernels.py --sweep --only decode
    python scripts/bench_kernels.py --group 4 --kv-heads 8 --block-size 16

A call's time is that of a program which makes many of them, on inputs that are together more than the L2 cache holds
(but for a few tokens of store and norm), divided by their number: launch gaps count, host time does not. The median of
several runs is printed.
"""

import argparse
import functools
import itertools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from nanovllm_jax.kernels import common, decode, hopper_prefill, hopper_swiglu, norm, prefill, reference, row, store

# (batch, shortest and longest context), (sequences, new tokens and context of each), tokens, tokens
DECODE = [(1, 1000, 1000), (1, 32000, 32000), (8, 1000, 1000), (64, 1000, 1000), (64, 200, 1486)]
DECODE += [(256, 1000, 1000), (256, 200, 1486)]
PREFILL = [(16, 1024, 1024), (1, 16384, 16384), (64, 256, 256), (4, 2048, 8192), (1, 1000, 1000)]
NEW = [(1, 1000), (8, 1000), (64, 128)]
STORE = [1, 64, 256, 16384]
NORM = [1, 256, 16384]
ROW = [(1, 4096), (2, 3072)]  # (weights, features of each): q/k/v, gate and up
SWIGLU = [(1024, 3072), (16384, 3072)]  # rows, features
CHAINED_CALLS = 128
TABLE_TOKENS = 4096  # a block table's width: at least so many tokens, as an engine's goes by its longest context

DECODE_CUTS = [(64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 4, 5), (64, 8, 3), (32, 4, 3), (32, 4, 5), (32, 2, 3)]
DECODE_CUTS += [(64, 2, 3), (32, 2, 5), (128, 4, 3), (128, 8, 3)]  # block_k, warps, stages
DECODE_EXTRA = [1, 16, 32, 64, 128]  # items beyond one a context
PREFILL_CUTS = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2)]
PREFILL_CUTS += [(128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3)]
PREFILL_CUTS += [(64, 32, 4, 3), (32, 64, 4, 3), (32, 64, 2, 3), (256, 64, 8, 3), (256, 128, 8, 2)]
STORE_CUTS = [*itertools.product((1, 2, 4), (1, 2, 4)), (8, 2), (8, 4), (8, 8), (16, 4), (16, 8), (32, 8)]
ROW_CUTS = [*itertools.product((1, 2, 4, 8), (2, 4, 8, 16))]
NORM_CUTS = [*itertools.product((1, 2), (1, 2, 4, 8, 16)), (4, 2), (4, 4), (4, 8), (8, 4), (8, 8)]


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
    size = (tokens // shape.block_size, shape.kv_heads, shape.block_size, shape.head_dim)
    return tuple(jax.random.normal(jax.random.key(i), size, shape.dtype) for i in range(2))


def sets_for(set_bytes: float) -> int:
    """So many that they overflow the L2 cache several times."""
    return int(np.clip(256e6 / set_bytes, 4, 32))


def random_tables(rng, shape: Shape, pool, contexts):
    used = [-(-context // shape.block_size) for context in contexts]
    tables = np.zeros((len(contexts), max(TABLE_TOKENS // shape.block_size, *used)), np.int32)
    blocks = itertools.cycle(rng.permutation(len(pool[0])))
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
        sets.append((q, *pool, *random_tables(rng, shape, pool, contexts)))
    name = f"{batch} x {low}" + (f"-{high}" if high > low else "")
    functions = kernel_and_oracle(decode, "paged_decode_attention", scale=shape.head_dim**-0.5)
    default = decode.default_tiles(batch, shape.kv_heads, shape.head_dim, shape.dtype)
    flops = 4.0 * contexts.sum() * shape.heads * shape.head_dim
    return Case("decode", name, *functions, sets, default, moved, flops)


def new_case(rng, shape: Shape, pool, batch, context) -> Case:
    """A decode case that takes the new tokens in: few, so that it is one kernel."""

    def pool_last(store_and_decode, tables, lens, *args, **tiles):
        return store_and_decode(*args, tables, lens, **tiles)

    attends = decode_case(rng, shape, pool, batch, context, context)
    stores = store_case(rng, shape, pool, batch)
    sets = []
    for (_, _, _, tables, lens), (*token, _) in zip(attends.sets, itertools.cycle(stores.sets)):
        slots = tables[:, (context - 1) // shape.block_size] * shape.block_size + (context - 1) % shape.block_size
        sets.append((tables, lens, *token, slots))
    options = dict(scale=shape.head_dim**-0.5, eps=1e-6)
    functions = [functools.partial(pool_last, f) for f in kernel_and_oracle(decode, "store_and_decode", **options)]
    moved = attends.bytes + stores.bytes
    return Case("new", f"{batch} x {context}", *functions, sets, attends.default, moved, attends.flops, state=pool)


def prefill_case(rng, shape: Shape, pool, sequences, new, context) -> Case:
    starts = jnp.arange(sequences + 1, dtype=jnp.int32) * new
    sets = []
    for _ in range(4):
        tables, lens = random_tables(rng, shape, pool, [context] * sequences)
        q = shape.random(rng, sequences * new, shape.heads, shape.head_dim)
        sets.append((q, *pool, tables, starts, lens))
    name = f"{sequences} x {new}" + (f" of {context}" if context > new else "")
    functions = kernel_and_oracle(prefill, "paged_prefill_attention", scale=shape.head_dim**-0.5)
    default = prefill.default_tiles(sequences * new, shape.heads, shape.group, shape.head_dim, shape.dtype)
    seen = sequences * new * (context - new + (new + 1) / 2)  # keys, summed over the query tokens
    flops = 4.0 * seen * shape.heads * shape.head_dim
    moved = float(sequences * context) * shape.token_bytes
    first_prefill = (sequences, new) if context == new and shape.dtype.itemsize == 2 else None
    return Case("prefill", name, *functions, sets, default, moved, flops, first_prefill=first_prefill)


def store_case(rng, shape: Shape, pool, tokens) -> Case:
    slots, half = len(pool[0]) * shape.block_size, shape.head_dim // 2
    moved = 2.0 * tokens * shape.token_bytes * (shape.group + 2) / 2  # queries, keys and values come in and go out
    sets = []
    for _ in range(sets_for(moved)):
        qkv = shape.random(rng, tokens, shape.kv_heads, shape.group + 2, shape.head_dim)
        gains = [shape.random(rng, shape.head_dim) for _ in range(2)]
        angles = [shape.random(rng, tokens, half).astype(jnp.float32) for _ in range(2)]
        sets.append((qkv, *gains, *angles, jnp.asarray(rng.permutation(slots)[:tokens], jnp.int32)))
    functions = kernel_and_oracle(store, "norm_rope_store", eps=1e-6)
    return Case("store", f"{tokens}", *functions, sets, store.default_tiles(tokens), moved, state=pool)


def norm_case(rng, shape: Shape, pool, tokens) -> Case:
    def output_first(add_norm, delta, gain, x, **tiles):
        return add_norm(x, delta, gain, **tiles)[::-1]

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


def hopper_case(rng, shape: Shape, pool, *problem) -> Case:
    call, oracle = kernel_and_oracle(hopper_prefill, "paged_prefill_attention", scale=shape.head_dim**-0.5)
    return prefill_case(rng, shape, pool, *problem)._replace(kernel="hopper", call=call, oracle=oracle, default=None)


def swiglu_case(rng, shape: Shape, pool, rows, features) -> Case:
    moved = float(shape.dtype.itemsize * (rows * (shape.hidden + features) + 2 * features * shape.hidden))
    weight = shape.random(rng, 2, features, shape.hidden)
    sets = [(shape.random(rng, rows, shape.hidden), weight) for _ in range(sets_for(moved))]
    flops = 4.0 * rows * features * shape.hidden
    return Case("swiglu", f"{rows} x {features}", *kernel_and_oracle(hopper_swiglu, "swiglu"), sets, None, moved, flops)


def compiled(case: Case, call):
    """A program that makes a call on each input set, or enough calls that dispatching it is quicker than running it."""
    call = jax.jit(call)  # of one trace, however many calls

    def chain(state, sets):
        for inputs in itertools.islice(itertools.cycle(sets), CHAINED_CALLS):
            out, *state = call(*inputs, *state)
        return out, state

    if case.state:
        return jax.jit(chain, donate_argnums=0).lower(list(case.state), case.sets).compile()
    return jax.jit(lambda _, sets: ([call(*inputs) for inputs in sets], [])).lower([], case.sets).compile()


def seconds_per_call(case: Case, program, samples: int = 7) -> float:
    """The median over samples of about 10 ms each."""
    state = [jnp.copy(array) for array in case.state]  # as a program reuses its memory

    def run(times):
        nonlocal state
        start = time.perf_counter()
        for _ in range(times):
            out, state = program(state, case.sets)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    run(2)
    times = max(2, int(0.01 / (run(3) / 3)))
    calls = CHAINED_CALLS if case.state else len(case.sets)
    return statistics.median(run(times) for _ in range(samples)) / times / calls


def relative_error(case: Case) -> float:
    """The largest difference to the oracle on the first input set, relative to the largest output."""
    got, expected = (jax.jit(f)(*case.sets[0], *case.state) for f in (case.call, case.oracle))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    as_f32 = [[x.astype(jnp.float32) for x in pair] for pair in pairs]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in as_f32)


def cudnn_seconds(case: Case, shape: Shape, sequences: int, new: int) -> float:
    """cuDNN's fused attention on the same first prefill, contiguous instead of paged."""
    rng = np.random.default_rng(0)
    heads = shape.heads, shape.kv_heads, shape.kv_heads
    sets = [[shape.random(rng, sequences, new, n, shape.head_dim) for n in heads] for _ in case.sets]
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    contiguous = case._replace(kernel="cudnn", sets=sets)
    return seconds_per_call(contiguous, compiled(contiguous, attention))


def rate(case: Case, seconds: float, args) -> str:
    limit = max(case.bytes / args.bandwidth / 1e12, case.flops / args.flops / 1e12)
    if case.kernel in ("prefill", "hopper", "swiglu"):
        amount = f"{case.flops / seconds / 1e12:6.0f} TFLOP/s"
    else:
        amount = f"{case.bytes / seconds / 1e12:6.2f} TB/s"
    return f"{seconds * 1e6:9.1f} us  {amount}  {limit / seconds:5.0%} of the limit"


def bench(case: Case, shape: Shape, args) -> None:
    seconds = seconds_per_call(case, compiled(case, case.call))
    line = f"{case.kernel:8}{case.name:16}{rate(case, seconds, args)}  error {relative_error(case):.1e}"
    if case.first_prefill:
        other = cudnn_seconds(case, shape, *case.first_prefill)
        line += f"  cuDNN {other * 1e6:.1f} us ({other / seconds:.2f} x its speed)"
    print(line, flush=True)


def settings(case: Case, shape: Shape) -> list:
    """What to try on a case, its default first."""
    tokens = len(case.sets[0][0])
    cuts = {"prefill": PREFILL_CUTS, "store": STORE_CUTS, "norm": NORM_CUTS, "row": ROW_CUTS}
    if case.kernel in ("decode", "new"):
        tried = [decode.Tiles(k, extra, *rest) for (k, *rest), extra in itertools.product(DECODE_CUTS, DECODE_EXTRA)]
    else:  # a tile of more tokens than there are is of use in prefill alone, and a row's is of features
        anyway = case.kernel in ("prefill", "row")
        tried = [type(case.default)(*cut) for cut in cuts[case.kernel] if anyway or cut[0] <= tokens]
    return list(dict.fromkeys([case.default, *tried]))


def sweep(cases: list[Case], shape: Shape, args) -> None:
    """All settings of all cases, compiled in parallel, then timed one after another; the best beside the default."""

    def build(case, tiles):
        try:
            return compiled(case, functools.partial(case.call, tiles=tiles))
        except Exception as error:  # most often: more shared memory than there is
            return error

    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [(case, [(t, threads.submit(build, case, t)) for t in settings(case, shape)]) for case in cases]
    print(f"compiled {sum(len(tried) for _, tried in jobs)} settings in {time.perf_counter() - start:.0f} s")
    summary = []
    for case, tried in jobs:
        timed = []
        for tiles, job in tried:
            if isinstance(program := job.result(), Exception):
                print(f"{case.kernel} {case.name} {tuple(tiles)} fails: {str(program).splitlines()[0][:70]}")
            else:
                timed.append((seconds_per_call(case, program, samples=3), tiles))
        timed.sort()
        print(f"\n{case.kernel:8}{case.name}: {len(timed)} of {len(tried)} settings; {case.default._fields}")
        for seconds, tiles in timed[: args.top]:
            print(f"{rate(case, seconds, args)}  {tuple(tiles)}", flush=True)
        (best, tiles), default = timed[0], next(seconds for seconds, tiles in timed if tiles == case.default)
        change = f"default {default * 1e6:.1f} us {tuple(case.default)}, {default / best:.2f} x as long"
        summary.append(f"{case.kernel:8}{case.name:14}{best * 1e6:8.1f} us {tuple(tiles)}; {change}")
    print(f"\nBest settings, {time.perf_counter() - start:.0f} s after the start:", *summary, sep="\n")


KERNELS = {"decode": (decode_case, DECODE), "new": (new_case, NEW), "prefill": (prefill_case, PREFILL)}
KERNELS |= {"store": (store_case, STORE), "norm": (norm_case, NORM), "row": (row_case, ROW)}
if common.is_hopper():
    KERNELS |= {"hopper": (hopper_case, PREFILL), "swiglu": (swiglu_case, SWIGLU)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=2, help="query heads to a kv head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2**19, help="size of the KV cache")
    parser.add_argument("--hidden", type=int, default=1024, help="what norm and row work on")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--sweep", action="store_true", help="time many tile settings")
    parser.add_argument("--top", type=int, default=6, help="how many of a sweep's settings to print for each problem")
    parser.add_argument("--bandwidth", type=float, default=4.4, help="the card's measured TB/s (H200: 4.4)")
    parser.add_argument("--flops", type=float, default=790, help="the card's measured TFLOP/s (H200, bf16: 790)")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no GPU: the kernels are compiled for NVIDIA GPUs only")
    shape = Shape(args.kv_heads, args.group, args.head_dim, args.block_size, args.hidden, jnp.dtype(args.dtype))
    pool = make_pool(shape, args.tokens)
    rng = np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {shape}")
    problems = [(KERNELS[kernel][0], problem) for kernel in args.only for problem in KERNELS[kernel][1]]
    cases = (make(rng, shape, pool, *np.atleast_1d(problem).tolist()) for make, problem in problems)
    if args.sweep:
        return sweep([case for case in cases if case.default], shape, args)
    for case in cases:
        bench(case, shape, args)


if __name__ == "__main__":
    main()
