"""How long requests would wait, without a GPU: the scheduler and the batch shapes on a device that only counts time.

    python scripts/simulate.py --model 8B --rates 4 24
    python scripts/simulate.py --model 8B --rates 24 --max-num-batched-tokens 2304
    python scripts/simulate.py --model 0.6B --rates 160 --whole-steps     # steps never stop short of padding
    python scripts/simulate.py --model 8B --rates 24 --exact              # programs for any number of tokens
    python scripts/simulate.py --model 8B --rates 24 --at-once            # steps are not put off for who may come

The requests, the loop that serves them and the latencies are those of bench.py's online workload. What a step costs was
measured on an H200 (docs/performance.md, entries 118 and 121); --costs takes other numbers.
"""

import argparse
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from benchmark.online import PERCENTILES, latencies, serve
from benchmark.workloads import Sizes, online
from options import above_zero, count, from_zero

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.buckets import Buckets, gpu_buckets
from nanovllm_jax.engine.pacing import PAUSE, Pacer
from nanovllm_jax.engine.schedule import ONE_STEP, Schedule, all_of_them
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_params import SamplingParams

MAX_MODEL_LEN = 4096
BLOCK_SIZE = 256


class Costs(NamedTuple):
    """Microseconds on the device: of a step with prompts, of one without, and of attention."""

    prompts: float
    """Any step with prompts,"""
    token: float
    """and each of its tokens, padding too."""
    decodes: float
    """Any other step,"""
    row: float
    """and each of its rows, padding too."""
    context: float
    """Each token in the cache of a sequence that decodes."""
    pair: float
    """Each token of a prompt and one before it."""

    def seconds(self, schedule: Schedule, shape: BatchShape) -> float:
        """Those of one step."""
        attention = self.context * sum(seq.num_computed for seq in schedule.decodes)
        attention += self.pair * sum(
            chunk.num_tokens * (chunk.seq.num_computed - chunk.num_tokens / 2) for chunk in schedule.prefills
        )
        if schedule.prefills:
            return 1e-6 * (attention + self.prompts + self.token * shape.tokens)
        return 1e-6 * (attention + self.decodes + self.row * shape.tokens)


MODELS = {
    "0.6B": Costs(prompts=1600, token=1.75, decodes=950, row=3, context=0.031, pair=0.0005),
    "8B": Costs(prompts=4000, token=19.9, decodes=4250, row=12, context=0.041, pair=0.0012),
}
HOST = 300e-6, 100e-6  # seconds: to choose and dispatch a step, and to read one


class SimulatedStep(NamedTuple):
    """A step on the device, and when that will be done with it."""

    schedule: Schedule
    shape: BatchShape
    dispatched_at: float
    done_at: float


class SimulatedEngine:
    """LLMEngine's loop with a clock of its own: a step is dispatched, and the one before it read when it is over."""

    def __init__(self, costs: Costs, buckets: Buckets, args: argparse.Namespace):
        self.costs, self.buckets, self.exact, self.at_once = costs, buckets, args.exact, args.at_once
        self.pacer = Pacer(self.clock)
        self.scheduler = Scheduler(
            num_blocks=buckets.max_num_seqs * MAX_MODEL_LEN // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_num_seqs=buckets.max_num_seqs,
            max_num_batched_tokens=buckets.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=False,
            fitting=all_of_them if args.whole_steps or args.exact else buckets.fitting,
        )
        self.time = 0.0
        self.in_flight: deque[SimulatedStep] = deque()
        self.running: dict[str, Sequence] = {}
        self.num_steps = self.num_tokens = self.num_padding = 0

    def clock(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def add(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        number, params = int(request_id.split("-")[-1]), SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        seq = Sequence(number, request_id, prompt, params, max_len=len(prompt) + max_tokens)
        self.running[request_id] = seq
        self.scheduler.add(seq)

    def step(self) -> dict[str, int]:
        """One step further; how many tokens each request has, those included that finished."""
        if not self.at_once and (spare := self._spare_seconds()):
            self.time += min(spare, PAUSE)
            return {}
        chosen_at = self.time
        if schedule := self.scheduler.schedule():
            self._dispatch(schedule)
            self.pacer.dispatched(chosen_at)
        if len(self.in_flight) > bool(schedule):
            self._read()
        counts = {name: len(seq.token_ids) - seq.num_prompt_tokens for name, seq in self.running.items()}
        self.running = {name: seq for name, seq in self.running.items() if not seq.is_finished}
        return counts

    def _spare_seconds(self) -> float:
        if not self.in_flight or self.time >= self.in_flight[-1].done_at:
            return 0.0
        return self.pacer.spare(self.in_flight[-1].shape, self.in_flight[-1].dispatched_at)

    def _dispatch(self, schedule: Schedule) -> None:
        self.time += HOST[0]
        tokens = schedule.num_tokens
        shape = self.buckets.shape_for(schedule.sizes)
        computed = replace(shape, tokens=tokens) if self.exact else shape
        before = self.in_flight[-1].done_at if self.in_flight else 0.0
        done_at = max(self.time, before) + self.costs.seconds(schedule, computed)
        self.in_flight.append(SimulatedStep(schedule, shape, self.time, done_at))
        self.num_steps, self.num_tokens = self.num_steps + 1, self.num_tokens + tokens
        self.num_padding += computed.tokens - tokens

    def _read(self) -> None:
        step = self.in_flight.popleft()
        was_done, self.time = self.time >= step.done_at, max(self.time, step.done_at)
        self.pacer.read(step.shape, step.dispatched_at, was_done)
        self.time += HOST[1]
        self.scheduler.update(step.schedule, [1] * len(step.schedule.decodes), [1] * len(step.schedule.prefills))


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8B")
    parser.add_argument("--rates", type=above_zero, nargs="+", default=[4, 24], help="requests a second")
    parser.add_argument("--seconds", type=above_zero, default=8, help="for how long they arrive")
    parser.add_argument("--max-num-seqs", type=count, default=512)
    parser.add_argument("--max-num-batched-tokens", type=count, default=16384)
    parser.add_argument("--whole-steps", action="store_true", help="a step never stops short of padding")
    parser.add_argument("--exact", action="store_true", help="no step is padded")
    parser.add_argument("--at-once", action="store_true", help="a step is chosen as soon as the last is dispatched")
    parser.add_argument("--costs", type=from_zero, nargs=6, metavar=Costs._fields, help="in microseconds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    costs = Costs(*args.costs) if args.costs else MODELS[args.model]
    width = MAX_MODEL_LEN // BLOCK_SIZE
    buckets = gpu_buckets(args.max_num_seqs, args.max_num_batched_tokens, width, ONE_STEP)
    sizes = Sizes(vocab_size=2, max_model_len=MAX_MODEL_LEN, rates=args.rates, seconds=args.seconds)
    percentiles = ", ".join(f"p{percent}" for percent in PERCENTILES)
    print(f"milliseconds, {percentiles}; {args.model}, {len(buckets.all_shapes())} programs")
    for name, call in online(sizes):
        engine = SimulatedEngine(costs, buckets, args)
        stamps = serve(engine, call, engine.clock, engine.sleep)
        found = latencies(call.arrivals, stamps)
        cells = [f"{what} {', '.join(f'{value:.1f}' for value in values.values())}" for what, values in found.items()]
        padding = engine.num_padding / (engine.num_padding + engine.num_tokens)
        print(f"{name}: {'; '.join(cells)}; {engine.num_steps} steps, {padding:.0%} padding", flush=True)


if __name__ == "__main__":
    main()
