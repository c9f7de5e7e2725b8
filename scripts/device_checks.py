"""The checks of scripts/check_devices.py: `python scripts/device_checks.py FOLDER DEVICES NAME ...`.

Those of numbers compare what a model of two layers gives in float32 with what it gives on one device (`alone`): greedy,
seeded and filtered texts with chunked prompts, prefix hits and preemption, log probabilities, scores, and all of that
once more with other weights.
"""

import argparse
import gc
import json
import math
import re
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plan
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from options import count

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.huggingface import config_json
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.layers.linear import Parts
from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.parallel.backend import compiler_options
from nanovllm_jax.parallel.peers import connect_peers, peers_layout, reach_one_another
from nanovllm_jax.parallel.sharding import MODEL_AXIS, make_mesh, per_device, specs_of

LAYERS = 2  # of the model whose numbers are compared
# So few sizes make five programs. Two requests that run at a time do not fit in the pool together, a prompt is longer
# than a step, and several decode steps are one program.
NUMBERS = dict(
    dtype="float32",
    block_size=16,
    max_num_seqs=2,
    max_num_batched_tokens=64,
    max_model_len=128,
    num_kvcache_blocks=10,
    num_scheduler_steps=4,
)
SPEED = dict(max_num_seqs=64, max_num_batched_tokens=128, max_model_len=1536, num_kvcache_blocks=400)
HIDDEN, SUMS = 1024, 100  # of sums alone: the size of a row, and how many there are
VOCAB = 4000  # prompts' tokens are below
SEQUENCES, PROMPT, STEPS = 64, 500, 64  # that decode at a time, tokens of each one's prompt, and steps that are timed
ON_A_CPU = 4, 20, 8
LEAST_EQUAL = 0.9  # of all tokens: a text goes its own way from the first draw that rounding decides
LARGEST_ERROR = 1e-4  # of a log probability in float32


def write_models(folder: Path) -> None:
    """Directories `numbers` and `speed` with a config.json each, which is all that random weights need."""
    for name in ("numbers", "speed"):
        config = plan.published("0.6B")
        if jax.default_backend() != "gpu":
            config = replace(config, vocab_size=4096, hidden_size=256, intermediate_size=512, head_dim=32)
        if name == "numbers" or jax.default_backend() != "gpu":
            config = replace(config, num_hidden_layers=LAYERS)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_json(config, "bfloat16")))


def make_llm(folder: Path, data: int, model: int, name: str = "numbers", **sizes: Any) -> LLM:
    mesh = dict(data_parallel_size=data, tensor_parallel_size=model)
    return LLM(folder / name, load_format="dummy", compilation_cache_dir=folder / "compiled", **mesh, **sizes)


# ------------------------------------------------------------ numbers


def texts(llm: LLM) -> list[dict[str, list]]:
    """Tokens and log probabilities of texts of every kind."""
    kinds = [
        dict(temperature=0),
        dict(temperature=0.8, seed=1, n=2),
        dict(temperature=0.8, seed=2, top_k=50, top_p=0.9, min_p=0.01),
        dict(temperature=0, logprobs=5, prompt_logprobs=2, repetition_penalty=1.1),
        dict(temperature=1, seed=3, logprobs=0, logit_bias={7: 3.0}, min_tokens=4),
    ]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for kind in kinds for _ in range(2)]
    # Every other prompt begins as the one before it, and goes on for longer.
    prompts = [[(7919 * (i // 2) + 31 * j) % VOCAB for j in range(40 + 50 * (i % 2))] for i in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        dict(tokens=text.token_ids, logprobs=numbers_of(output.prompt_logprobs) + numbers_of(text.logprobs))
        for output in outputs
        for text in output.outputs
    ]


def numbers_of(entries: list | None) -> list[float]:
    return [entry.logprob for by_token in entries or [] if by_token for _, entry in sorted(by_token.items())]


def behaviour(llm: LLM, folder: Path) -> dict[str, Any]:
    """What is compared: texts and scores, and both with other weights."""
    first = dict(texts=texts(llm), scores=scores(llm))
    assert llm.scheduler.num_prefix_hit_tokens, "no prefix was found in the cache"
    assert llm.scheduler.num_preemptions, "no sequence was preempted"
    options = dict(dtype=jnp.float32, mesh=llm.runner.mesh, load_format="dummy", seed=1)
    other = load_model(folder, llm.runner.model_config, **options)
    llm.update_weights(other, donate=True)
    return first | dict(texts_then=texts(llm), scores_then=scores(llm))


def scores(llm: LLM) -> list[float]:
    completions = [[(7919 * i + 31 * j) % VOCAB for j in range(30)] for i in range(4)]
    scored = llm.score([[1], [2] * 20, [3] * 70, [1]], completions, use_tqdm=False)
    return [logprob for completion in scored for logprob in completion]


def compare(folder: Path, found: dict[str, Any]) -> str:
    """Assert that this is what one device has; how near it is."""
    file = folder / "alone.json"
    assert file.exists(), "there is nothing to compare with, as the check 'alone' failed"
    wanted = json.loads(file.read_text())
    pairs = [pair for name in ("texts", "texts_then") for pair in zip(found[name], wanted[name], strict=True)]
    tokens = [a == b for ours, theirs in pairs for a, b in zip(ours["tokens"], theirs["tokens"], strict=True)]
    equal = [(ours["logprobs"], theirs["logprobs"]) for ours, theirs in pairs if ours["tokens"] == theirs["tokens"]]
    equal += [(found[name], wanted[name]) for name in ("scores", "scores_then")]
    error = max(np.abs(np.subtract(ours, theirs)).max(initial=0) for ours, theirs in equal)
    note = (
        f"{np.mean(tokens):.1%} of {len(tokens)} tokens are those of one device, log probabilities within {error:.1e}"
    )
    assert np.mean(tokens) >= LEAST_EQUAL, note
    assert error <= LARGEST_ERROR, note
    return note


def alone(folder: Path, devices: int) -> str:
    """One device."""
    found = behaviour(make_llm(folder, 1, 1, **NUMBERS), folder)
    (folder / "alone.json").write_text(json.dumps(found))
    return f"{jax.devices()[0].device_kind}, {len(found['texts'])} texts"


def tensor(folder: Path, devices: int) -> str:
    """The model split over all devices."""
    llm = make_llm(folder, 1, devices, **NUMBERS)
    program = next(p for shape, p in llm.runner.programs.items() if not shape.prefill_rows and shape.num_steps == 1)
    sums, own = len(re.findall(r" all-reduce(?:-start)?\(", program.as_text())), llm.runner.peers and llm.runner.on_gpu
    wanted = 0 if own else 2 * LAYERS + 1
    assert sums == wanted, f"a step has {sums} all-reduces, where {wanted} are expected"
    return f"{compare(folder, behaviour(llm, folder))}; {sums} all-reduces a step"


def data(folder: Path, devices: int) -> str:
    """The model whole on each device."""
    return compare(folder, behaviour(make_llm(folder, devices, 1, **NUMBERS), folder))


def mixed(folder: Path, devices: int) -> str:
    """Two data groups, each with the model split."""
    if devices == 2:
        return "left out: it needs 4 devices"
    return compare(folder, behaviour(make_llm(folder, 2, devices // 2, **NUMBERS), folder))


def disk(folder: Path, devices: int) -> str:
    """The programs of `tensor`, or else of a first start here, read from the disk."""

    def programs() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (folder / "compiled" / "programs").glob("*.program")}

    if jax.default_backend() != "gpu":
        return "left out: programs are kept on GPUs only"
    if "tensor" not in sys.argv:
        make_llm(folder, 1, devices, **NUMBERS)
    before, start = programs(), time.perf_counter()
    llm = make_llm(folder, 1, devices, **NUMBERS)
    seconds = time.perf_counter() - start
    assert before, "none were kept"
    assert programs() == before, "they were compiled anew"
    return f"{compare(folder, behaviour(llm, folder))}; started in {seconds:.1f} s"


def processes(folder: Path, devices: int) -> str:
    """The model split over two processes."""
    command = [Path(__file__).parent / "launch.py", "--processes", 2, "--devices", devices // 2, __file__]
    command = [sys.executable, *map(str, command), str(folder), str(devices), "member"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"the processes failed:\n{done.stdout[-3000:]}"
    notes = [compare(folder, json.loads((folder / f"member{number}.json").read_text())) for number in range(2)]
    assert notes[0] == notes[1], notes
    return notes[0]


def member(folder: Path, devices: int) -> None:
    """In one of two processes."""
    found = behaviour(make_llm(folder, 1, devices, **NUMBERS), folder)
    (folder / f"member{jax.process_index()}.json").write_text(json.dumps(found))


# ------------------------------------------------------------ speed


def links(folder: Path, devices: int) -> str:
    """All-reduces alone: the time of a small one, and the rate of a large one, as scripts/plan.py counts it."""
    mesh, count = make_mesh(devices), 120 // int(math.log2(devices))  # their sum stays below bfloat16's largest

    def sums(x):
        return lax.fori_loop(0, count, lambda _, x: lax.psum(x, MODEL_AXIS), x)

    program = jax.jit(per_device(sums, mesh, Spec(), Spec()), compiler_options=compiler_options(mesh, 1))

    def seconds(size: int) -> float:
        x = jax.device_put(jnp.ones(size, jnp.bfloat16), jax.NamedSharding(mesh, Spec()))
        assert (np.asarray(program(x), np.float64) == float(devices) ** count).all(), "a sum is wrong"
        start = time.perf_counter()
        for _ in range(5):
            jax.block_until_ready(program(x))
        return (time.perf_counter() - start) / 5 / count

    size = 2**26 if jax.default_backend() == "gpu" else 2**16
    small, large = seconds(1024), seconds(size)
    rate = 2 * (devices - 1) / devices * 2 * size / large
    return f"an all-reduce of 2 KiB takes {1e6 * small:.1f} us, one of {size >> 9} KiB sends {rate / 1e9:.1f} GB/s"


def sums(folder: Path, devices: int) -> str:
    """Sums over devices by their own kernel, each made from the one before, and the same by collectives; their time.

    On a CPU, which has no such kernel, both are collectives.
    """
    mesh, rank, times = make_mesh(devices), partial(lax.axis_index, MODEL_AXIS), []
    if not reach_one_another(mesh):
        return "left out: these devices do not reach one another's memory"
    for dtype, rows in ((jnp.bfloat16, 1), (jnp.float32, 3), (jnp.bfloat16, 64), (jnp.bfloat16, 256)):
        layout, ones = peers_layout(mesh, HIDDEN, jnp.dtype(dtype)), jnp.ones((HIDDEN,), dtype)

        def step(total, peers, by_kernel, ones=ones):
            delta = ((total + 3 * rank()) % 7 - 3)[None]  # small integers, so that no order of sums rounds
            if not by_kernel:
                delta, peers = lax.psum(delta, MODEL_AXIS), None
            total, normed = RMSNorm(HIDDEN, 1e-6, dtype=ones.dtype).add(total % 8 + ones, Parts(delta, peers))
            return total + jnp.floor(normed)

        def program(x, peers, by_kernel, step=step):
            for _ in range(SUMS):
                x = step(x, peers, by_kernel)
            return x[None]

        x = jnp.tile(jnp.arange(HIDDEN, dtype=jnp.float32) % 5, (rows, 1)).astype(dtype)
        args, found = (jax.device_put(x, NamedSharding(mesh, Spec())), connect_peers(layout)), []
        for by_kernel in (True, False):
            specs = Spec(), specs_of(layout)
            one = per_device(partial(program, by_kernel=by_kernel), mesh, specs, Spec(MODEL_AXIS))
            compiled = jax.jit(one, compiler_options=compiler_options(mesh, rows)).lower(*args).compile()
            found += [np.asarray(compiled(*args).astype(jnp.float32)) for _ in range(3)]
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            times.append(1e6 * (time.perf_counter() - start) / SUMS)
        assert all((y == found[0][0]).all() for of_devices in found for y in of_devices), "sums differ"
    row, row_by_collective, *_, many, many_by_collective = times
    return (
        f"a row takes {row:.1f} us by the kernel and {row_by_collective:.1f} by a collective, 256 rows {many:.1f} and "
        f"{many_by_collective:.1f}"
    )


def speed(folder: Path, devices: int) -> str:
    """Of decode steps in bfloat16 (on a CPU float32), on one device and on all, beside scripts/plan.py's for H200s."""
    config = ModelConfig.from_pretrained(folder / "speed")
    for number in (1, devices):
        llm = make_llm(folder, 1, number, "speed", enable_prefix_caching=False, **SPEED)
        many, prompt, steps = (SEQUENCES, PROMPT, STEPS) if llm.runner.on_gpu else ON_A_CPU
        for sequences in (1, many):
            seconds, context = step_seconds(llm, sequences, prompt, steps)
            predicted = plan.decode_step(config, number, sequences, context).seconds
            print(
                f"           {number} devices, {sequences} sequences of {context} tokens: "
                f"{1e3 * seconds:.2f} ms a step, {1e3 * predicted:.2f} predicted",
                flush=True,
            )
        del llm
        gc.collect()
    return "the times above"


def step_seconds(llm: LLM, sequences: int, prompt: int, steps: int) -> tuple[float, int]:
    """Of a decode step, once all of so many sequences decode, and their mean context. `prompt`: tokens of each."""
    params = SamplingParams(temperature=0.6, ignore_eos=True, detokenize=False, max_tokens=None)
    prompts = [[(7919 * i + 31 * j) % VOCAB for j in range(prompt)] for i in range(sequences)]
    metrics, ids = llm.metrics, [llm.add_request(tokens, params) for tokens in prompts]
    prefilled, decoded = metrics.num_prefill_tokens, metrics.num_decode_tokens
    while metrics.num_prefill_tokens < prefilled + sequences * prompt:
        llm.step()
    decode(llm, 8 * sequences)
    context = prompt + (metrics.num_decode_tokens - decoded) // sequences
    start = time.perf_counter()
    tokens = decode(llm, steps * sequences)
    seconds = (time.perf_counter() - start) * sequences / tokens
    for request_id in ids:
        llm.abort_request(request_id)
    while llm.has_unfinished_requests():
        llm.step()
    return seconds, context


def decode(llm: LLM, tokens: int) -> int:
    """Step until so many tokens have come; how many did."""
    before = llm.metrics.num_decode_tokens
    while llm.metrics.num_decode_tokens < before + tokens:
        llm.step()
    return llm.metrics.num_decode_tokens - before


CHECKS = {check.__name__: check for check in (links, sums, alone, tensor, data, mixed, disk, speed, processes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the models that the checks are made with")
    parser.add_argument("devices", type=count)
    parser.add_argument("names", nargs="+", choices=[*CHECKS, "member"])
    args = parser.parse_args()
    folder, devices, names = args.folder, args.devices, args.names
    if names == ["member"]:
        member(folder, devices)
        return
    if names != ["processes"]:
        jax.config.update("jax_num_cpu_devices", devices)  # of no effect on GPUs
        if not (folder / "numbers").exists():
            write_models(folder)
    for name in names:
        start, outcome = time.perf_counter(), "ok"
        try:
            note = CHECKS[name](folder, devices)
        except Exception as error:
            traceback.print_exc()
            outcome, note = "FAILED", f"{type(error).__name__}: {error}"
        gc.collect()  # what a traceback held
        print(f"{name:10} {outcome:6} {time.perf_counter() - start:6.1f} s  {note}", flush=True)


if __name__ == "__main__":
    main()
