"""Run an engine hard, and compare everything that it returns with the same request run alone.

    python scripts/soak.py                                # 2000 requests to the embedded tiny model
    python scripts/soak.py --model DIRECTORY --load-format dummy --requests 1000000 --seconds 300

Requests of every kind share a pool that is too small for them, so that they are preempted; others are aborted,
streamed and left, or refused. Then each one that ended runs again, alone in the idle engine and with nothing in the
prefix cache. In float32 its tokens must be the same, and its log probabilities to 2e-6 of the model's largest logit
(of those below -1: that much of their size). In 16 bits the first token that differs must be a tie (see
soaking/referee.py), and what follows it is not compared. The exit status is 1 where anything differs, a block leaks,
memory grows or a program is compiled on the way.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

import jax.numpy as jnp
from options import above_zero, checkpoint, count, refusals, seed
from soaking.company import Company
from soaking.compare import Result, largest_difference, other_differences, token_differences
from soaking.referee import Referee
from soaking.requests import Case, RequestMaker
from soaking.watch import Memory, num_compiles

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.layers.attention import causal_attention

ROUND = 200  # requests in company, before each is run alone
NOISE = 0.25  # of log probabilities in 16 bits
ROUNDING = 2e-6  # of log probabilities in float32, as a share of the largest logit
MOST_GROWTH = 1024  # KiB for 1000 requests
SHORTEST = 64  # tokens of max_model_len: a text of a few words and its answer fit


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=checkpoint, default=TINY_MODEL, help="a checkpoint's directory, or a Hub id")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument("--requests", type=count, default=2000)
    parser.add_argument("--seconds", type=above_zero, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=count, default=256)
    parser.add_argument("--max-num-seqs", type=count, default=16)
    parser.add_argument("--max-num-batched-tokens", type=count, default=128)
    parser.add_argument("--block-size", type=count, default=16)
    parser.add_argument("--blocks", type=count, help="of the pool (default: two of the longest requests)")
    parser.add_argument("--num-scheduler-steps", type=count)
    parser.add_argument("--gpu-memory-utilization", type=above_zero, default=0.3)
    args = parser.parse_args(arguments)
    if args.max_model_len < SHORTEST:
        parser.error(f"--max-model-len {args.max_model_len} leaves no room for requests: give {SHORTEST} or more")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(start_engine(args, Path(scratch)), args.seed)
        soak.warm_up()
        with suppress(KeyboardInterrupt):  # Ctrl-C ends a long run early
            soak.run(args.requests, time.monotonic() + args.seconds)
    print(soak.report())
    return int(bool(soak.problems()))


def start_engine(args: argparse.Namespace, scratch: Path) -> LLM:
    """An engine with a tokenizer: the embedded model's, where the checkpoint has none."""
    model = args.model
    if not (model / "tokenizer.json").is_file():
        files = {file.name: file for file in (*model.iterdir(), *TINY_MODEL.glob("tokenizer*"))}
        for name, file in files.items():
            (scratch / name).symlink_to(file.resolve())
        model = scratch
    names = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "load_format")
    names += ("num_scheduler_steps", "gpu_memory_utilization")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    blocks = args.blocks or 2 * -(-args.max_model_len // args.block_size)
    with refusals():
        return LLM(model, num_kvcache_blocks=blocks, **options)


def largest_logit(llm: LLM) -> float:
    """In size, after each of a few tokens of any kind: a trained model's are larger than random ones', and so is their
    rounding.
    """
    tokens = jnp.arange(64) * 61 % llm.model_config.vocab_size
    hidden, _ = llm.model(tokens, jnp.arange(64), None, causal_attention)
    return float(jnp.abs(llm.model.logits(hidden)).max())


class Soak:
    """One engine, and what has come out of it."""

    def __init__(self, llm: LLM, seed: int):
        self.llm = llm
        rng = random.Random(seed)
        self.maker = RequestMaker(llm, rng)
        self.company = Company(llm, self.maker, rng)
        self.referee, self.memory = Referee(llm), Memory()
        self.counts: Counter[str] = self.company.counts
        self.tolerance = NOISE if llm.runner.dtype.itemsize == 2 else ROUNDING * largest_logit(llm)
        self.mismatches: list[str] = []
        self.logprob_difference = 0.0
        self.seconds = 0.0

    def warm_up(self) -> None:
        """The few programs that are compiled when they are first asked for."""
        params = SamplingParams(max_tokens=2, prompt_logprobs=1, logit_bias={0: 1}, logprobs=1)
        self.llm.generate([1, 1], params, use_tqdm=False)  # the first token of a prompt has no logprob
        self._run_every_program()

    def run(self, requests: int, deadline: float) -> None:
        """So many requests, or as many as there is time for, in rounds."""
        start = time.monotonic()
        while self.counts["requests"] < requests and time.monotonic() < deadline:
            self._run_round(min(ROUND, requests - self.counts["requests"]), deadline)
            self.memory.sample(self.counts["requests"])
            self.seconds = time.monotonic() - start
            print(f"{self.seconds:6.0f} s  {self.counts['requests']} requests  {self.memory}", file=sys.stderr)

    def _run_round(self, requests: int, deadline: float) -> None:
        compiled = num_compiles()
        finished = self.company.run(requests)
        self._count_leaks()
        pairs = self._run_alone(finished, deadline)
        self.counts["compiles"] += num_compiles() - compiled
        for case, found, alone in pairs:
            self._compare(case, found, alone)

    def _run_every_program(self) -> None:
        """Once, with nothing but padding: a GPU takes host memory for a program when it first runs it.

        And those of prompt_logprobs, of which each number of tokens has its own.
        """
        runner = self.llm.runner
        for shape in runner.programs:
            _, buffer = self.llm.packer.pack(Schedule(), shape)
            output = runner.dispatch(shape, buffer)
            if shape.prefill_rows:
                runner.collect_prompt_logprobs(runner.prompt_logprobs(output, shape, buffer, [(0, 0, 0)]))
            runner.collect(output)

    def problems(self) -> list[str]:
        """What went wrong, in words."""
        slope = self.memory.slope()
        found = list(self.mismatches)
        found += [f"{self.counts[name]} {name}" for name in ("leaked blocks", "compiles") if self.counts[name]]
        found += [f"memory grows by {slope:.0f} KiB for 1000 requests"] if slope and slope > MOST_GROWTH else []
        found += [] if self.counts["compared"] else ["nothing was compared"]
        return found

    def report(self) -> str:
        """Every figure, and the first problems."""
        names = ("requests", "tokens", "aborts", "streams left", "refused", "preemptions")
        names += (
            "prompt tokens found in the cache",
            "compared",
            "tokens compared",
            "ties",
            "leaked blocks",
            "compiles",
        )
        rows = [("seconds", f"{self.seconds:.0f}")] + [(name, self.counts[name]) for name in names]
        slope = self.memory.slope()
        rows += [
            ("mismatches", len(self.mismatches)),
            ("largest difference of logprobs", f"{self.logprob_difference:.1e}"),
            ("allocated, KiB for 1000 requests", "too short to say" if slope is None else f"{slope:.0f}"),
            ("allocated, resident at the end", str(self.memory)),
        ]
        problems = self.problems()
        lines = [f"{name:<34} {value}" for name, value in rows] + [f"PROBLEM {problem}" for problem in problems[:10]]
        return "\n".join([*lines, f"{len(problems)} problems" if problems else "passed"])

    def _run_alone(self, finished: list[tuple[Case, Result]], deadline: float) -> list[tuple[Case, Result, Result]]:
        pairs = []
        for case, found in finished:
            if time.monotonic() > deadline:
                break
            self.llm.reset_prefix_cache()
            [output] = self.llm.generate([case.prompt], case.params, use_tqdm=False)
            alone = Result()
            alone.add(output)
            pairs.append((case, found, alone))
        return pairs

    def _compare(self, case: Case, found: Result, alone: Result) -> None:
        self.counts["compared"] += 1
        words = other_differences(found, alone, self.tolerance)
        self.counts["tokens compared"] += found.num_tokens
        for difference in token_differences(found, alone):
            index, tokens = difference.index, found.texts[difference.index].tokens
            before = tokens[: difference.at]
            self.counts["tokens compared"] -= len(tokens) - len(before)
            if self.referee.is_tie(found.prompt, case.params, index, before, difference.tokens):
                self.counts["ties"] += 1
            else:
                words.append(f"token {difference.at} of text {index}: {difference.tokens}")
        self.logprob_difference = max(self.logprob_difference, largest_difference(found, alone))
        if words:
            self.mismatches.append(f"{'; '.join(words)} of {shorten(str(case), 2000, placeholder=' ...')}")

    def _count_leaks(self) -> None:
        """Books that balance, and a pool that is free."""
        self.llm.scheduler.check()
        assert not self.llm.scheduler.has_unfinished
        self.counts["leaked blocks"] += self.llm.scheduler.block_manager.num_used_blocks


if __name__ == "__main__":
    if "PYTHONMALLOC" not in os.environ:  # the C library can tell how much of its memory is in use
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONMALLOC": "malloc"})
    sys.exit(main())
