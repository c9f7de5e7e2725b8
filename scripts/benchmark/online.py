"""Requests that arrive over time, served through an engine's add and step; and the latencies that they saw."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import quantiles

from benchmark.engines import Engine
from benchmark.workloads import Call

PERCENTILES = (50, 90, 99)


def serve(
    engine: Engine,
    call: Call,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[list[float]]:
    """For each request, the seconds after the start at which the host had each of its tokens."""
    stamps: list[list[float]] = [[] for _ in call.prompts]
    running, waiting = set(), 0
    start = clock()
    while running or waiting < len(call.prompts):
        now = clock() - start
        while waiting < len(call.prompts) and call.arrivals[waiting] <= now:
            engine.add(f"online-{waiting}", call.prompts[waiting], call.max_tokens[waiting])
            running.add(waiting)
            waiting += 1
        if not running:
            sleep(call.arrivals[waiting] - now)
            continue
        counts, now = engine.step(), clock() - start
        for request_id, count in counts.items():
            index = int(request_id.removeprefix("online-"))
            stamps[index] += [now] * (count - len(stamps[index]))
            if count == call.max_tokens[index]:
                running.discard(index)
    return stamps


def latencies(arrivals: list[float], stamps: list[list[float]]) -> dict[str, dict[str, float | None]]:
    """Percentiles in milliseconds, of requests for TTFT and TPOT, of gaps in their texts for ITL.

    As vLLM's own benchmark has them: TTFT counts from the arrival, so it includes the wait for a step that is running.
    TPOT is the mean time per token after a request's first. ITL is each time from what came of a text to what came
    next, be it one token or several.
    """
    gaps = [[after - before for before, after in pairwise(dict.fromkeys(times))] for times in stamps]
    samples = {
        "TTFT": [times[0] - arrival for arrival, times in zip(arrivals, stamps, strict=True)],
        "TPOT": [(times[-1] - times[0]) / (len(times) - 1) for times in stamps if len(times) > 1],
        "ITL": [gap for own in gaps for gap in own],
    }
    return {name: percentiles([1e3 * value for value in values]) for name, values in samples.items()}


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p90 and p99, interpolated; None of no values."""
    if not values:
        return {f"p{percent}": None for percent in PERCENTILES}
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {f"p{percent}": cuts[percent - 1] for percent in PERCENTILES}
