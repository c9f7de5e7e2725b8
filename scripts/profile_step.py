"""One decode or prefill step on the device, by phase of the model: time, launches, and share of the card's limit.

    python scripts/profile_step.py --model DIRECTORY --batch 64 --context 1000
    python scripts/profile_step.py --model DIRECTORY --phase prefill --batch 16 --context 1024 --picture prefill.png

Phases are the model's named scopes; `other` is the rest: embedding, positions, the last norm, copies. Of kernels that
XLA launches together (as a CUDA graph) the trace does not say which instruction they are. So here they are launched one
by one, which takes the host longer than a small step takes the GPU: how fast the engine is, `bench.py` says.
"""

import argparse
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from benchmark.limits import Card, Cost, decode_phases, prefill_phases
from options import add_card, checkpoint, count, picture, refusals, writing

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.models.step import StepOutput

PHASES = ("attention", "attend", "mlp", "head", "sample", "other")
CONTAINERS = ("while", "call", "conditional")  # on a CPU they are events too, around those of their bodies


class Kernel(NamedTuple):
    """One run of a kernel; microseconds, from the trace's first."""

    name: str
    phase: str
    start: float
    duration: float


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    llm = make_llm(args)
    work = Decode(llm, args) if args.phase == "decode" else Prefill(llm, args)
    work.run()  # warm-up
    start = time.perf_counter()
    steps = work.run()
    micros = 1e6 * (time.perf_counter() - start) / steps
    kernels, steps = profile(llm, work.run)
    rows, columns = len(work.prompts), llm.model_config.vocab_size
    costs = work.costs() | {"sample": Cost(4.0 * rows * columns, 0.0)}  # the logits, read once
    device = jax.devices()[0].device_kind
    limit = f"limit: {args.bandwidth:g} TB/s, {args.flops:g} TFLOP/s"
    print(f"{args.phase}, {args.batch} x {args.context}, on {device}: {micros:,.1f} us without the profiler; {limit}")
    print(phase_table(kernels, steps, costs, Card(1e12 * args.bandwidth, 1e12 * args.flops)))
    print(f"\nThe longest of the kernels, a step:\n{kernel_table(kernels, steps, args.top)}")
    if args.picture:
        draw_timeline(kernels, steps, args.picture)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=checkpoint, default=TINY_MODEL)
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--phase", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--batch", type=count, default=8, help="sequences")
    parser.add_argument("--context", type=count, default=512, help="tokens of each: in the cache, or to prefill")
    parser.add_argument("--max-num-seqs", type=count, help="the engine's option")
    parser.add_argument("--steps", type=count, default=4, help="calls of the engine's step() to profile when decoding")
    parser.add_argument("--top", type=count, default=12, help="how many kernels to list")
    parser.add_argument("--picture", type=picture, help="write a step's timeline here (.png, .svg, .pdf)")
    add_card(parser)
    args = parser.parse_args(arguments)
    with refusals():
        longest, most = args.context + output_tokens(args), ModelConfig.from_pretrained(args.model).max_context
    if longest > most:
        parser.error(f"--context {args.context} and the tokens of all steps are {longest}, the model's most are {most}")
    return args


# ------------------------------------------------------------ the work


def make_llm(args: argparse.Namespace) -> LLM:
    options = dict(max_model_len=args.context + output_tokens(args), max_num_seqs=args.max_num_seqs)
    with refusals():
        return LLM(args.model, load_format=args.load_format, **options)


def output_tokens(args: argparse.Namespace) -> int:
    """Enough for the warm-up, the timing and the profile, where a step of the engine is several of the model.

    And for the first of them to go on while the others' prompts are computed.
    """
    if args.phase == "prefill":
        return 1
    return 64 * args.steps + args.batch * args.context // 1024


class Decode:
    """Some steps of a batch that is decoding."""

    def __init__(self, llm: LLM, args: argparse.Namespace):
        self.llm, self.steps = llm, args.steps
        self.prompts = make_prompts(llm, args)
        params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output_tokens(args))
        for prompt in self.prompts:
            llm.add_request(prompt, params)
        running = llm.scheduler.running
        while len(running) < args.batch or any(seq.num_completion_tokens < 1 for seq in running.values()):
            if llm.step():
                raise SystemExit(f"{args.batch} sequences do not run at a time: lower --batch or raise --max-num-seqs")

    def run(self) -> int:
        """Returns how many steps of the model it took: an engine's step may be several."""
        jax.block_until_ready(self.llm.runner.state.last_tokens)  # what is in flight is not counted
        before = self.llm.metrics.num_decode_tokens
        for _ in range(self.steps):
            self.llm.step()
        jax.block_until_ready(self.llm.runner.state.last_tokens)
        return (self.llm.metrics.num_decode_tokens - before) // len(self.prompts)

    def costs(self) -> dict[str, Cost]:
        contexts = [seq.num_computed for seq in self.llm.scheduler.running.values()]
        return decode_phases(self.llm.model_config, self.llm.runner.dtype.itemsize, contexts)


class Prefill:
    """Prompts computed from nothing, in one step or as many as max_num_batched_tokens makes them."""

    def __init__(self, llm: LLM, args: argparse.Namespace):
        self.llm, self.prompts = llm, make_prompts(llm, args)

    def run(self) -> int:
        """Returns 1: all prompts together count as one step."""
        self.llm.reset_prefix_cache()
        self.llm.generate(self.prompts, SamplingParams(temperature=0.6, max_tokens=1), use_tqdm=False)
        return 1

    def costs(self) -> dict[str, Cost]:
        lengths = [len(prompt) for prompt in self.prompts]
        return prefill_phases(self.llm.model_config, self.llm.runner.dtype.itemsize, lengths, [0] * len(lengths))


def make_prompts(llm: LLM, args: argparse.Namespace) -> list[list[int]]:
    """Prompts that share no prefix."""
    size = min(10_000, llm.model_config.vocab_size)
    return [[(17 * row + 31 * i) % size for i in range(args.context)] for row in range(args.batch)]


# ------------------------------------------------------------ the trace


def profile(llm: LLM, run: Callable[[], int]) -> tuple[list[Kernel], int]:
    """Every kernel of a run, and the steps that it took."""
    with tempfile.TemporaryDirectory() as directory, recorded_dispatches(llm.runner) as shapes:
        with jax.profiler.trace(directory):
            steps = run()
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = sorted(device_events(data), key=lambda event: event[2])
    # Instructions of two programs may share a name. The trace tells programs apart by numbers, met in dispatch order.
    programs = [op_names(llm.runner.programs[shape].as_text()) for shape in dict.fromkeys(shapes)]
    numbers = dict.fromkeys(s["program_id"] for _, s, _, _ in events if "program_id" in s and "hlo_op" in s)
    by_number = dict(zip(numbers, programs, strict=False))
    kernels = []
    for name, stats, start, duration in events:
        scopes = by_number.get(stats.get("program_id"), programs[0])
        kernels.append(Kernel(name, phase_of(stats, scopes), (start - events[0][2]) / 1e3, duration / 1e3))
    return kernels, steps


@contextmanager
def recorded_dispatches(runner: ModelRunner) -> Iterator[list[BatchShape]]:
    """The shapes of the batches that are dispatched meanwhile."""
    shapes, dispatch = [], runner.dispatch

    def recording(shape: BatchShape, buffer: np.ndarray) -> StepOutput:
        shapes.append(shape)
        return dispatch(shape, buffer)

    runner.dispatch = recording
    try:
        yield shapes
    finally:
        del runner.dispatch


def device_events(data: jax.profiler.ProfileData) -> Iterator[tuple[str, dict[str, Any], float, float]]:
    """Name, stats, start and duration in nanoseconds: of the first GPU's streams, or of the threads of a CPU."""
    planes = {plane.name: plane for plane in data.planes}
    gpu = planes.get("/device:GPU:0")
    for line in (gpu or planes["/host:CPU"]).lines:
        for event in line.events if line.name.startswith("Stream") or not gpu else ():
            stats = dict(event.stats)
            if gpu or ("hlo_op" in stats and not event.name.startswith(CONTAINERS)):
                yield event.name, stats, event.start_ns, event.duration_ns


def op_names(hlo: str) -> dict[str, str]:
    """For each instruction of a compiled program, the path of named scopes that it comes from."""
    return dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE))


def phase_of(stats: dict[str, Any], scopes: dict[str, str]) -> str:
    """The innermost phase in an event's path of scopes, which is the program's or, failing that, the event's own."""
    path = scopes.get(str(stats.get("hlo_op"))) or str(stats.get("tf_op") or stats.get("name") or "")
    return next((scope for scope in reversed(path.split("/")) if scope in PHASES), "other")


# ------------------------------------------------------------ the report


def phase_table(kernels: list[Kernel], steps: int, costs: dict[str, Cost], card: Card) -> str:
    """A line for each phase, for one step: the limit is that of its bytes or of its FLOPs, whichever is longer."""
    spent, launches = defaultdict(float), defaultdict(float)
    for kernel in kernels:
        for phase in (kernel.phase, "all"):
            spent[phase] += kernel.duration / steps
            launches[phase] += 1 / steps
    costs = costs | {"all": Cost.total(costs.values())}
    lines = [
        f"{'phase':<10} {'us':>10} {'share':>6} {'launches':>8} {'GB':>9} {'TFLOP':>9} {'limit us':>10} {'of limit':>8}"
    ]
    for phase in (*PHASES, "all"):
        line = f"{phase:<10} {spent[phase]:>10,.1f} {spent[phase] / spent['all']:>6.1%} {launches[phase]:>8,.1f}"
        if phase in costs:
            cost, limit = costs[phase], 1e6 * costs[phase].seconds(card)
            share = limit / spent[phase] if spent[phase] else float("nan")
            line += f" {cost.bytes / 1e9:>9.4f} {cost.flops / 1e12:>9.4f} {limit:>10,.1f} {share:>8.1%}"
        lines.append(line)
    return "\n".join(lines)


def kernel_table(kernels: list[Kernel], steps: int, top: int) -> str:
    """The kernels that take longest, numbered copies of one kernel together."""
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        durations[re.sub(r"[._]\d+$", "", kernel.name), kernel.phase].append(kernel.duration)
    longest = sorted(durations.items(), key=lambda item: -sum(item[1]))[:top]
    return "\n".join(
        f"{phase:<10} {sum(times) / steps:>10,.1f} us {len(times) / steps:>8,.1f} launches  {name}"
        for (name, phase), times in longest
    )


def draw_timeline(kernels: list[Kernel], steps: int, path: Path) -> None:
    """The first step: a lane for each phase."""
    from matplotlib.figure import Figure

    first = kernels[: len(kernels) // steps]  # they are sorted by their starts
    figure = Figure(figsize=(14, 3), layout="constrained")
    axes = figure.subplots()
    for lane, phase in enumerate(PHASES):
        bars = [(k.start, k.duration) for k in first if k.phase == phase]
        axes.broken_barh(bars, (lane - 0.4, 0.8), color=f"C{lane}")
    axes.set_yticks(range(len(PHASES)), PHASES)
    axes.invert_yaxis()
    axes.set_xlabel("us")
    with writing(path):
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
