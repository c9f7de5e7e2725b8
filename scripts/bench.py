"""Throughput and latency of the whole engine, through LLM.generate.

    python scripts/bench.py --model DIRECTORY                     # nano-vllm's workload: 256 sequences, 100-1024 in and out
    python scripts/bench.py --model DIRECTORY --load-format dummy # a directory with only a config.json: random weights
    python scripts/bench.py --workload nano single prefill        # one engine start serves all; no --model: the tiny model
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import jax

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL


def random_prompts(rng: random.Random, vocab_size: int, lengths: list[int]) -> list[list[int]]:
    return [[rng.randrange(min(10000, vocab_size)) for _ in range(length)] for length in lengths]


def timed(llm: LLM, prompts: list[list[int]], max_tokens: list[int]) -> float:
    """Seconds to generate all, with an empty prefix cache."""
    llm.scheduler.block_manager.reset_prefix_cache()
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in max_tokens]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    assert [len(out["token_ids"]) for out in outputs] == max_tokens
    return elapsed


def nano(llm: LLM, vocab_size: int) -> dict[str, float]:
    """nano-vllm's bench.py: its seed, its order of draws."""
    rng = random.Random(0)
    longest = min(1024, llm.max_model_len // 2 - 1)
    prompts = [
        [rng.randint(0, min(10000, vocab_size - 1)) for _ in range(rng.randint(100, longest))] for _ in range(256)
    ]
    outputs = [rng.randint(100, longest) for _ in range(256)]
    seconds = timed(llm, prompts, outputs)
    return {"prompt tokens": sum(map(len, prompts)), "output tokens": sum(outputs), "seconds": seconds,
            "output tokens/s": sum(outputs) / seconds}


def single(llm: LLM, vocab_size: int) -> dict[str, float]:
    """One sequence alone: 1,000 tokens in, 256 out."""
    rng = random.Random(1)
    length = min(1000, llm.max_model_len - 257)
    first = timed(llm, random_prompts(rng, vocab_size, [length]), [1])
    whole = timed(llm, random_prompts(rng, vocab_size, [length]), [256])
    return {"first token ms": 1e3 * first, "after it ms/token": 1e3 * (whole - first) / 255}


def prefill(llm: LLM, vocab_size: int) -> dict[str, float]:
    """64 prompts of 1,024 tokens, one token out."""
    lengths = [min(1024, llm.max_model_len - 2)] * 64
    seconds = timed(llm, random_prompts(random.Random(2), vocab_size, lengths), [1] * 64)
    return {"seconds": seconds, "prompt tokens/s": sum(lengths) / seconds}


WORKLOADS: dict[str, Callable[[LLM, int], dict[str, float]]] = {"nano": nano, "single": single, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL))
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["nano"])
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the figures, with versions and machine, to this file")
    args = parser.parse_args()

    start = time.perf_counter()
    llm = LLM(args.model, load_format=args.load_format, max_model_len=args.max_model_len)
    report = {
        "model": args.model,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "flax", "nanovllm-jax")},
        "start seconds": time.perf_counter() - start,
        "cache tokens": llm.runner.num_blocks * llm.runner.config.block_size,
    }
    vocab_size = llm.model_config.vocab_size
    for name in args.workload:
        WORKLOADS[name](llm, vocab_size)  # warm-up
        runs = [WORKLOADS[name](llm, vocab_size) for _ in range(args.repeats)]
        report[name] = {key: median(run[key] for run in runs) for key in runs[0]}
        report[name]["runs"] = runs
    for key, value in report.items():
        figures = ", ".join(f"{k} {v:,.3f}" for k, v in value.items() if k != "runs") if isinstance(value, dict) else value
        print(f"{key}: {figures}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
