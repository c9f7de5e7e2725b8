"""One engine in its own process: `python -m benchmark.worker JOB.json RESULT.json`.

The job names the engine, the model directory, the engine's options, the workloads, their sizes and the repeats. The
result is written after each workload, so that a run that is cut short leaves what it has.
"""

import importlib
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.engines import ENGINES, Engine, versions
from benchmark.online import latencies, serve
from benchmark.workloads import WORKLOADS, Call, Sizes


def main() -> None:
    job, result_path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    kind = ENGINES[job["engine"]]
    start = time.perf_counter()
    importlib.import_module(kind.MODULE)
    imported = time.perf_counter()
    engine = kind(job["model"], job["options"])
    result = {
        "import_seconds": imported - start,
        "start_seconds": time.perf_counter() - imported,
        "kv_capacity_tokens": engine.capacity,
        "max_num_seqs": engine.max_num_seqs,
        "device": engine.device,
        "flags": engine.flags,
        "versions": {"python": platform.python_version(), **versions(kind.PACKAGES)},
        "workloads": {},
    }
    sizes = replace(Sizes(**job["sizes"]), cache_tokens=engine.capacity, max_num_seqs=engine.max_num_seqs)
    write(result_path, result)
    for name in job["workloads"]:
        calls = {}
        for call_name, call in WORKLOADS[name](sizes):
            calls[call_name] = {**call.describe(), "runs": run_call(engine, call, job["repeats"])}
        result["workloads"][name] = calls
        write(result_path, result)


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: the reader may look at any time."""
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").replace(path)


def run_call(engine: Engine, call: Call, repeats: int) -> list[dict[str, Any]]:
    """A warm-up, then the timed repeats. Each begins with an empty prefix cache, or with the call's prompts in it."""
    if call.fill:
        engine.reset_prefix_cache()
        engine.generate(call.prompts, [1] * len(call.prompts))
    return [run_once(engine, call) for _ in range(repeats + 1)][1:]


def run_once(engine: Engine, call: Call) -> dict[str, Any]:
    """Seconds, and what else the call asks for."""
    if call.arrivals:
        engine.reset_prefix_cache()
        stamps = serve(engine, call)
        return {"seconds": max(times[-1] for times in stamps), "latencies_ms": latencies(call.arrivals, stamps)}
    run = {"first_seconds": timed(engine, call, [1] * len(call.prompts))[0]} if call.first_alone else {}
    seconds, cached = timed(engine, call, call.max_tokens)
    return {**run, "seconds": seconds, "cached_tokens": cached}


def timed(engine: Engine, call: Call, max_tokens: list[int]) -> tuple[float, int | None]:
    """Seconds to generate all, and the prompt tokens that came from the prefix cache, if the engine tells."""
    if not call.fill:
        engine.reset_prefix_cache()
    start = time.perf_counter()
    outputs = engine.generate(call.prompts, max_tokens)
    seconds = time.perf_counter() - start
    if [count for count, _ in outputs] != max_tokens:
        raise RuntimeError(f"{type(engine).__name__} did not generate as many tokens as it was asked to")
    cached = [known for _, known in outputs]
    return seconds, None if None in cached else sum(cached)


if __name__ == "__main__":
    main()
