"""Does a model over several GPUs give the tokens of one, and how fast is it? Random weights of Qwen3-0.6B's shapes.

python scripts/check_devices.py --devices 2          # under 3 minutes on two H200

float32: greedy and seeded tokens must be those of one GPU, but for draws closer than rounding. bfloat16: decode speed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import plan

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.huggingface import config_json

SIZES = dict(max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=2048, num_kvcache_blocks=512)
LEAST_EQUAL = 0.9  # of all tokens: a text goes its own way from the first draw that rounding decides


def prompts(count: int, length: int) -> list[list[int]]:
    return [[(7919 * number + 31 * place) % 150_000 for place in range(length)] for number in range(count)]


def tokens_of(llm: LLM) -> list[list[int]]:
    """Greedy, seeded and filtered texts, with log probabilities asked for."""
    kinds = [
        dict(temperature=0),
        dict(temperature=0.8, seed=1),
        dict(temperature=0.8, seed=2, top_k=50, top_p=0.9),
        dict(temperature=0, logprobs=5, repetition_penalty=1.1),
    ]
    params = [SamplingParams(max_tokens=16, ignore_eos=True, **kind) for kind in kinds for _ in range(4)]
    return [out["token_ids"] for out in llm.generate(prompts(len(params), 40), params, use_tqdm=False)]


def step_seconds(llm: LLM, sequences: int) -> float:
    """Of a decode step, the prefill's time taken off."""
    params = [SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True) for n in (2, 130)]
    times = []
    for round in range(4):  # the first two warm up
        start = time.perf_counter()
        llm.generate([[round, *p] for p in prompts(sequences, 200)], params[round % 2], use_tqdm=False)
        times.append(time.perf_counter() - start)
    return (times[3] - times[2]) / 128


def run_one(directory: str, devices: int, result: str) -> None:
    options = dict(load_format="dummy", tensor_parallel_size=devices, compilation_cache_dir=None, **SIZES)
    llm = LLM(directory, dtype="float32", **options)
    report = {"tokens": tokens_of(llm)}
    llm.runner.caches = llm.runner.leaves = None
    llm = LLM(directory, dtype="bfloat16", **options)
    report["ms"] = {sequences: 1e3 * step_seconds(llm, sequences) for sequences in (1, 64)}
    Path(result).write_text(json.dumps(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args.run[0], int(args.run[1]), args.run[2])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        config = config_json(plan.published("0.6B"), "bfloat16") | {"num_hidden_layers": args.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        reports = []
        for devices in (1, args.devices):
            result = Path(folder) / "result.json"
            subprocess.run([sys.executable, __file__, "--run", folder, str(devices), str(result)], check=True)
            reports.append(json.loads(result.read_text()))
            print(f"{devices} devices: decode step of 1 and 64 sequences, ms: {reports[-1]['ms']}", flush=True)
    pairs = [(a, b) for ours, theirs in zip(*(r["tokens"] for r in reports)) for a, b in zip(ours, theirs)]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    print(f"float32: {equal:.1%} of {len(pairs)} tokens are those of one device")
    return 0 if equal >= LEAST_EQUAL else 1


if __name__ == "__main__":
    sys.exit(main())
