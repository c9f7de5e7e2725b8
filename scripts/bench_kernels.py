"""Time a layer's kernels alone on a GPU, beside their jnp oracles, the limit of the card, and for prefill beside cuDNN.

Those of sampling have a script of their own, bench_sampling.py, and sums over devices are in check_devices.py. Left out
are a row's plain layer, which is the normed one's kernel, and the one for deterministic=True.

    python scripts/bench_kernels.py                         # all of them as they are
    python scripts/bench_kernels.py --sweep                 # the tile settings below against the default ones
    python scripts/bench_kernels.py --sweep --only decode
    python scripts/bench_kernels.py --group 4 --kv-heads 8 --block-size 16

A call's time is that of a program which makes many of them, on inputs that are together more than the L2 cache holds
(but for a few tokens of store and norm), divided by their number: launch gaps count, host time does not. Where calls do
not wait for one another (all but store, new and norm) small ones overlap, which in a model they cannot. The median of
several runs is printed.
"""

import argparse
import functools
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from benchmark.kernel_cases import KERNELS, Case, Shape, make_cases
from benchmark.timing import seconds_per_run
from nanovllm_jax.kernels import decode
from options import add_card, count

CHAINED_CALLS = 128

DECODE_CUTS = [(64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 4, 5), (64, 8, 3), (32, 4, 3), (32, 4, 5), (32, 2, 3)]
DECODE_CUTS += [(64, 2, 3), (32, 2, 5), (128, 4, 3), (128, 8, 3)]  # block_k, warps, stages
DECODE_EXTRA = [1, 16, 32, 64, 128]  # items beyond one a context
PREFILL_CUTS = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2)]
PREFILL_CUTS += [(128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3)]
PREFILL_CUTS += [(64, 32, 4, 3), (32, 64, 4, 3), (32, 64, 2, 3), (256, 64, 8, 3), (256, 128, 8, 2)]
STORE_CUTS = [*itertools.product((1, 2, 4), (1, 2, 4)), (8, 2), (8, 4), (8, 8), (16, 4), (16, 8), (32, 8)]
ROW_CUTS = [*itertools.product((1, 2, 4, 8), (2, 4, 8, 16))]
FEW_CUTS = [*itertools.product((16, 32, 64), (64, 128, 256), (2, 4), (3, 4, 6))]
NORM_CUTS = [*itertools.product((1, 2), (1, 2, 4, 8, 16)), (4, 2), (4, 4), (4, 8), (8, 4), (8, 8)]


def compiled(case: Case, call):
    """A program that makes a call on each input set, `rounds` times over."""
    call = jax.jit(call)  # of one trace, however many calls

    def all_sets(state, sets):
        outs = []
        for inputs in sets:
            out = call(*inputs, *state)
            if state:
                out, *state = out
            outs.append(out)  # XLA would leave out what an oracle does for what nobody gets
        return outs, state

    def several_times(state, sets):
        outs = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(all_sets, state, sets)[0])
        return jax.lax.fori_loop(0, rounds(case), lambda _, carry: all_sets(carry[1], sets), (outs, state))

    program = several_times if case.state else all_sets
    return jax.jit(program, donate_argnums=0).lower(list(case.state), case.sets).compile()


def rounds(case: Case) -> int:
    """How many times a program goes through the input sets: so often that dispatching it is quicker than running it."""
    return -(-CHAINED_CALLS // len(case.sets)) if case.state else 1


def seconds_per_call(case: Case, program, samples: int = 7) -> float:
    return seconds_per_run(program, case.state, case.sets, samples) / (rounds(case) * len(case.sets))


def relative_error(case: Case) -> float:
    """The largest difference to the oracle on the first input set, relative to the largest output."""
    got, expected = (jax.jit(f)(*case.sets[0], *case.state) for f in (case.call, case.oracle))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    as_f32 = [[x.astype(jnp.float32) for x in pair] for pair in pairs]
    if case.kernel == "few":  # whose parts are whole tiles, as the oracle's are not
        as_f32 = [[parts.sum(axis=0) for parts in pair] for pair in as_f32]
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
    oracle = seconds_per_call(case, compiled(case, case.oracle), samples=1)
    line = f"{case.kernel:8}{case.name:17}{rate(case, seconds, args)}"
    line += f"  oracle {oracle * 1e6:.0f} us, {relative_error(case):.1e} from it"
    if case.first_prefill:
        other = cudnn_seconds(case, shape, *case.first_prefill)
        line += f"  cuDNN {other * 1e6:.1f} us ({other / seconds:.2f} x its speed)"
    print(line, flush=True)


def settings(case: Case) -> list:
    """What to try on a case, its default first."""
    tokens = len(case.sets[0][0])
    cuts = {"prefill": PREFILL_CUTS, "store": STORE_CUTS, "norm": NORM_CUTS, "row": ROW_CUTS, "few": FEW_CUTS}
    if case.kernel in ("decode", "new"):
        tried = [decode.Tiles(k, extra, *rest) for (k, *rest), extra in itertools.product(DECODE_CUTS, DECODE_EXTRA)]
    else:  # a tile of more tokens than there are is of use in prefill alone, and row's and few's are of features
        anyway = case.kernel in ("prefill", "row", "few")
        tried = [type(case.default)(*cut) for cut in cuts[case.kernel] if anyway or cut[0] <= tokens]
    return list(dict.fromkeys([case.default, *tried]))


def sweep(cases: list[Case], args) -> None:
    """All settings of all cases, compiled in parallel, then timed one after another; the best beside the default."""

    def build(case, tiles):
        try:
            return compiled(case, functools.partial(case.call, tiles=tiles))
        except Exception as error:  # most often: more shared memory than there is
            return error

    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [(case, [(t, threads.submit(build, case, t)) for t in settings(case)]) for case in cases]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=count, default=8)
    parser.add_argument("--group", type=count, default=2, help="query heads to a kv head")
    parser.add_argument("--head-dim", type=count, default=128)
    parser.add_argument("--block-size", type=count, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=count, default=2**19, help="size of the KV cache")
    parser.add_argument("--hidden", type=count, default=1024, help="what norm, row and few work on")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--sweep", action="store_true", help="time many tile settings")
    parser.add_argument("--top", type=count, default=6, help="how many of a sweep's settings to print for each problem")
    add_card(parser)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no GPU: the kernels are compiled for NVIDIA GPUs only")
    shape = Shape(args.kv_heads, args.group, args.head_dim, args.block_size, args.hidden, jnp.dtype(args.dtype))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {shape}")
    print(f"limit: {args.bandwidth:g} TB/s, {args.flops:g} TFLOP/s")
    cases = make_cases(shape, args.tokens, args.only)
    if args.sweep:
        return sweep([case for case in cases if case.default], args)
    for case in cases:
        bench(case, shape, args)


if __name__ == "__main__":
    main()
