"""What a decode step costs on the host, phase by phase, in microseconds.

    python scripts/bench_host.py --model DIRECTORY --load-format dummy   # a config.json is enough
    python scripts/bench_host.py --only scheduler packing                # pure Python: no device, no model

Dispatch and collect are timed while the device is idle, so that waiting for it is no part of them. Without a GPU,
dispatch also computes part of the step. The total has all phases that were measured.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from options import checkpoint, count, refusals

from nanovllm_jax.engine.batch import StepSizes
from nanovllm_jax.engine.buckets import Buckets
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_params import SamplingParams


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=count, nargs="+", default=[1, 64, 256, 512], help="running sequences")
    parser.add_argument("--context", type=count, default=1000, help="tokens of each sequence when the clock starts")
    parser.add_argument("--block-size", type=count, default=256, help="tokens of a KV block")
    parser.add_argument("--steps", type=count, default=256, help="decode steps in one timing")
    parser.add_argument("--repeats", type=count, default=5, help="timings, of which the median counts")
    parser.add_argument("--model", type=checkpoint, help="what dispatch and collect run (default: the tiny model)")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--only", choices=PHASES, nargs="+", default=list(PHASES))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    print(f"{'sequences':>9}  {'phase':<10}  {'us/step':>8}  {'us/sequence':>11}")
    for num_seqs in args.sequences:
        total = 0.0
        for phase in args.only:
            micros = sorted(PHASES[phase](num_seqs, args) for _ in range(args.repeats))[args.repeats // 2]
            total += micros
            print(f"{num_seqs:>9}  {phase:<10}  {micros:>8.1f}  {micros / num_seqs:>11.3f}", flush=True)
        print(f"{num_seqs:>9}  {'total':<10}  {total:>8.1f}  {total / num_seqs:>11.3f}")


def decoding_scheduler(num_seqs: int, args: argparse.Namespace) -> tuple[Scheduler, Schedule]:
    """A scheduler in steady decode, and the step it has in flight."""
    max_len = longest(args)
    scheduler = Scheduler(
        num_blocks=num_seqs * (max_len // args.block_size + 1) * 2,
        block_size=args.block_size,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * args.context,
        max_model_len=max_len,
    )
    stop_token_ids, params = frozenset({151_643, 151_645}), SamplingParams(temperature=0.6)
    for seq_id in range(num_seqs):
        # Block boundaries come evenly, as with prompts of mixed lengths.
        length = args.context - seq_id * args.block_size // num_seqs
        prompt = [seq_id % 50_000] * max(1, length)
        options = dict(seed=seq_id, stop_token_ids=stop_token_ids, max_len=max_len)
        scheduler.add(Sequence(seq_id, str(seq_id), prompt, params, **options))
    return scheduler, scheduler.schedule()


def longest(args: argparse.Namespace) -> int:
    return args.context + args.steps + 10


def scheduler_micros(num_seqs: int, args: argparse.Namespace) -> float:
    """schedule() of each step and update() of the step before, as the engine calls them."""
    scheduler, in_flight = decoding_scheduler(num_seqs, args)

    def step() -> None:
        nonlocal in_flight
        in_flight = next_step(scheduler, in_flight)

    step()  # leaves prefill
    assert len(in_flight.decodes) == num_seqs
    return micros_per_call(step, args.steps)


def next_step(scheduler: Scheduler, in_flight: Schedule) -> Schedule:
    """Schedule a step, then take in made-up tokens of the one before."""
    schedule = scheduler.schedule()
    scheduler.update(in_flight, [7] * len(in_flight.decodes), [7] * len(in_flight.prefills))
    return schedule


def packing_micros(num_seqs: int, args: argparse.Namespace) -> float:
    """BatchPacker.pack() of each step, blocks that are new in a table included."""
    scheduler, in_flight = decoding_scheduler(num_seqs, args)
    width = -(-longest(args) // args.block_size)
    packer = BatchPacker(Buckets((num_seqs,), ((num_seqs, num_seqs * args.context),), width))
    packer.pack(in_flight)
    spent = 0.0
    for _ in range(args.steps):
        in_flight = next_step(scheduler, in_flight)
        start = time.perf_counter()
        packer.pack(in_flight)
        spent += time.perf_counter() - start
    return spent / args.steps * 1e6


def device_micros(num_seqs: int, args: argparse.Namespace) -> tuple[float, float]:
    """ModelRunner.dispatch() of a packed step, the device being idle, and .collect() of one that it has done.

    Every row is padding: that costs the host the same, and the device little.
    """
    runner = make_runner(args.model, args.load_format, longest(args), args.block_size, max(args.sequences))
    shape = runner.buckets.shape_for(StepSizes(num_seqs, 0, num_seqs))
    _, buffer = BatchPacker(runner.buckets).pack(Schedule(), shape)
    spent = np.zeros(2)
    for _ in range(args.steps):
        start = time.perf_counter()
        output = runner.dispatch(shape, buffer)
        dispatched = time.perf_counter()
        runner.wait(output)
        ready = time.perf_counter()
        runner.collect(output)
        spent += dispatched - start, time.perf_counter() - ready
        del output  # before the next dispatch, as engine/dispatch.py has it
    return tuple(spent / args.steps * 1e6)


@cache
def make_runner(model: Path | None, load_format: str, max_model_len: int, block_size: int, max_num_seqs: int):
    """A ModelRunner; imported here, as the other phases do without jax."""
    from nanovllm_jax import LLM
    from nanovllm_jax.checkpoints.load import TINY_MODEL

    with refusals():
        return LLM(
            model or TINY_MODEL,
            load_format=load_format,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            block_size=block_size,
            num_kvcache_blocks=max(64, -(-max_model_len // block_size)),
        ).runner


def micros_per_call(call: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


PHASES = {
    "scheduler": scheduler_micros,
    "packing": packing_micros,
    "dispatch": lambda num_seqs, args: device_micros(num_seqs, args)[0],
    "collect": lambda num_seqs, args: device_micros(num_seqs, args)[1],
}


if __name__ == "__main__":
    main()
