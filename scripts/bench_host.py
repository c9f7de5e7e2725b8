"""What a step costs on the host, phase by phase, in microseconds; no GPU is needed.

python scripts/bench_host.py --sequences 1 64 256 512
"""

import argparse
import time
from collections.abc import Callable

from nanovllm_jax.engine.scheduler import Schedule, Scheduler
from nanovllm_jax.engine.sequence import Sequence


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256, 512], help="running sequences")
    parser.add_argument("--context", type=int, default=1000, help="tokens of each sequence when the clock starts")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a KV block")
    parser.add_argument("--steps", type=int, default=256, help="decode steps in one timing")
    parser.add_argument("--repeats", type=int, default=5, help="timings, of which the median counts")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    print(f"{'sequences':>9}  {'phase':<10}  {'us/step':>8}  {'us/sequence':>11}")
    for num_seqs in args.sequences:
        for phase, measure in PHASES.items():
            micros = sorted(measure(num_seqs, args) for _ in range(args.repeats))[args.repeats // 2]
            print(f"{num_seqs:>9}  {phase:<10}  {micros:>8.1f}  {micros / num_seqs:>11.3f}")


def decoding_scheduler(num_seqs: int, args: argparse.Namespace) -> tuple[Scheduler, Schedule]:
    """A scheduler in steady decode, and the step it has in flight."""
    max_len = args.context + args.steps + 10
    scheduler = Scheduler(
        num_blocks=num_seqs * (max_len // args.block_size + 1) * 2,
        block_size=args.block_size,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * args.context,
        max_model_len=max_len,
    )
    for seq_id in range(num_seqs):
        # Block boundaries come evenly, as with prompts of mixed lengths.
        length = args.context - seq_id * args.block_size // num_seqs
        prompt = [seq_id % 50_000] * max(1, length)
        stop_token_ids = frozenset({151_643, 151_645})
        scheduler.add(Sequence(seq_id, str(seq_id), prompt, None, stop_token_ids=stop_token_ids, max_len=max_len))
    return scheduler, scheduler.schedule()


def scheduler_micros(num_seqs: int, args: argparse.Namespace) -> float:
    """schedule() of each step and update() of the step before, as the engine calls them."""
    scheduler, in_flight = decoding_scheduler(num_seqs, args)
    tokens = [7] * num_seqs

    def step() -> None:
        nonlocal in_flight
        schedule = scheduler.schedule()
        scheduler.update(in_flight, tokens[: len(in_flight.decodes)], tokens[: len(in_flight.prefills)])
        in_flight = schedule

    step()  # leaves prefill
    assert len(in_flight.decodes) == num_seqs
    return micros_per_call(step, args.steps)


def micros_per_call(call: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


PHASES = {"scheduler": scheduler_micros}


if __name__ == "__main__":
    main()
