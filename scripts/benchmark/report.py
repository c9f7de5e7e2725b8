"""From a record (what bench.py writes as JSON) to rows, a table and notes. Pure functions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmark.limits import Card, decode_step_seconds, generate_seconds, prefill_seconds
from benchmark.online import PERCENTILES
from benchmark.workloads import SWEEP_STEPS
from nanovllm_jax.config import ModelConfig

OURS = "ours"


@dataclass(frozen=True)
class Row:
    """One figure of every engine that has it."""

    workload: str
    name: str
    unit: str
    values: dict[str, list[float]]
    """By engine, one a repeat."""
    limit: float | None = None
    """What the card allows, in the same unit."""
    more_is_better: bool = False

    def median(self, engine: str) -> float | None:
        return median(self.values[engine]) if self.values.get(engine) else None

    def spread(self, engine: str) -> float:
        """Half the way from the least to the most, relative to the median."""
        values = self.values[engine]
        return (max(values) - min(values)) / 2 / median(values) if median(values) else 0.0

    def speedup(self, engine: str, other: str) -> float | None:
        """How many times as fast `engine` is as `other`."""
        a, b = self.median(engine), self.median(other)
        if not a or not b:
            return None
        return a / b if self.more_is_better else b / a

    def share(self, engine: str) -> float | None:
        """Of the limit: 1 is as fast as the card allows."""
        value = self.median(engine)
        if not value or not self.limit:
            return None
        return value / self.limit if self.more_is_better else self.limit / value

    def summary(self) -> dict[str, Any]:
        """For the JSON record."""
        engines = {
            name: {"median": self.median(name), "spread": self.spread(name), "share_of_limit": self.share(name)}
            for name in self.values
        }
        peers = [name for name in self.values if name != OURS]
        return {
            "workload": self.workload,
            "name": self.name,
            "unit": self.unit,
            "limit": self.limit,
            "engines": engines,
            "ours_to": {peer: self.speedup(OURS, peer) for peer in peers},
        }


class Record:
    """A record's calls, and the card's limits for them."""

    def __init__(self, record: dict[str, Any]):
        self.results = record["engines"]
        self.config = ModelConfig(**record["model_config"])
        card = Card(record["card"]["bytes_per_second"], record["card"]["flops_per_second"])
        self.limits = self.config, itemsize(record), card

    def calls(self, workload: str) -> dict[str, dict[str, Any]]:
        """Every call that any engine ran, with its lengths."""
        merged: dict[str, dict[str, Any]] = {}
        for rounds in self.results.values():
            for result in rounds:
                merged = result["workloads"].get(workload, {}) | merged
        return merged

    def runs(self, workload: str, call: str, figure: Callable[[dict], float | None]) -> dict[str, list[float]]:
        """A figure of every run, by engine."""
        values = {}
        for engine, rounds in self.results.items():
            calls = [result["workloads"].get(workload, {}).get(call, {"runs": []}) for result in rounds]
            found = [figure(run) for own in calls for run in own["runs"]]
            if found and None not in found:
                values[engine] = found
        return values


def itemsize(record: dict[str, Any]) -> int:
    """Bytes of a number as our engine had it; a peer's default is bfloat16."""
    return 4 if any(run["flags"].get("dtype") == "float32" for run in record["engines"].get(OURS, [])) else 2


def rows(record: dict[str, Any]) -> list[Row]:
    """Every figure of a record, in the order of the workloads."""
    r = Record(record)
    return [row for make in (_nano, _single, _prefill, _sweep, _shared, _online, _start) for row in make(r)]


def _nano(r: Record) -> Iterator[Row]:
    yield from _throughput(r, "nano")


def _throughput(r: Record, workload: str) -> Iterator[Row]:
    for call, about in r.calls(workload).items():
        count = sum(about["output_tokens"])
        prompts, outputs, reusable = about["prompt_tokens"], about["output_tokens"], about["reusable_tokens"]
        limit = generate_seconds(*r.limits, prompts, outputs, reusable)
        yield Row(workload, "time", "s", r.runs(workload, call, lambda run: run["seconds"]), limit)
        yield Row(workload, "output", "tok/s", r.runs(workload, call, _rate(count)), count / limit, more_is_better=True)


def _rate(tokens: int) -> Callable[[dict], float]:
    return lambda run: tokens / run["seconds"]


def _single(r: Record) -> Iterator[Row]:
    for call, about in r.calls("single").items():
        (prompt,), (count,) = about["prompt_tokens"], about["output_tokens"]
        first = 1e3 * prefill_seconds(*r.limits, [prompt], [0])
        yield Row("single", "first token", "ms", r.runs("single", call, lambda run: 1e3 * run["first_seconds"]), first)
        after = 1e3 * decode_step_seconds(*r.limits, [prompt + count / 2])
        yield Row("single", "after it", "ms/token", r.runs("single", call, _step_ms(count - 1)), after)


def _step_ms(steps: int) -> Callable[[dict], float]:
    return lambda run: 1e3 * (run["seconds"] - run["first_seconds"]) / steps


def _prefill(r: Record) -> Iterator[Row]:
    for call, about in r.calls("prefill").items():
        prompts, count = about["prompt_tokens"], sum(about["prompt_tokens"])
        limit = count / prefill_seconds(*r.limits, prompts, [0] * len(prompts))
        yield Row("prefill", "prompts", "tok/s", r.runs("prefill", call, _rate(count)), limit, more_is_better=True)


def _sweep(r: Record) -> Iterator[Row]:
    calls = r.calls("sweep")
    for call in sorted(calls, key=lambda name: [int(number) for number in name.split(" x ")][::-1]):
        about = calls[call]
        contexts = [prompt + SWEEP_STEPS / 2 for prompt in about["prompt_tokens"]]
        limit = 1e3 * decode_step_seconds(*r.limits, contexts)
        yield Row("sweep", call, "ms/step", r.runs("sweep", call, _step_ms(SWEEP_STEPS)), limit)


def _shared(r: Record) -> Iterator[Row]:
    yield from _throughput(r, "shared")
    for call, about in r.calls("shared").items():
        count, reusable = sum(about["prompt_tokens"]), sum(about["reusable_tokens"])
        hits = r.runs("shared", call, _percent_cached(count))
        yield Row("shared", "prompt tokens from the cache", "%", hits, 100 * reusable / count, more_is_better=True)


def _percent_cached(prompt_tokens: int) -> Callable[[dict], float | None]:
    return lambda run: None if run["cached_tokens"] is None else 100 * run["cached_tokens"] / prompt_tokens


def _online(r: Record) -> Iterator[Row]:
    for call in r.calls("online"):
        for kind in ("TTFT", "TPOT", "ITL"):
            for p in (f"p{percent}" for percent in PERCENTILES):
                yield Row("online", f"{call} {kind} {p}", "ms", r.runs("online", call, _latency(kind, p)))


def _latency(kind: str, percentile: str) -> Callable[[dict], float]:
    return lambda run: run["latencies_ms"][kind][percentile]


def _start(r: Record) -> Iterator[Row]:
    """A later start may find what the first one left on disk: compiled programs, files in memory."""
    for key, name in (("import_seconds", "import"), ("start_seconds", "until ready")):
        for which, part in (("the first", slice(1)), ("later ones", slice(1, None))):
            found = {engine: [result[key] for result in rounds[part]] for engine, rounds in r.results.items()}
            if values := {engine: seconds for engine, seconds in found.items() if seconds}:
                yield Row("start", f"{name}, {which}", "s", values)


def table(record: dict[str, Any]) -> str:
    """A Markdown table: median, spread and share of the limit of every engine, and how many times as fast ours is."""
    engines = list(record["engines"])
    peers = [name for name in engines if name != OURS and OURS in engines]
    header = ["work", "unit", *engines, *(f"ours : {peer}" for peer in peers), "limit"]
    lines = [header]
    for row in rows(record):
        ratios = [_number(row.speedup(OURS, peer), " x") for peer in peers]
        cells = [_cell(row, engine) for engine in engines]
        lines.append([f"{row.workload}: {row.name}", row.unit, *cells, *ratios, _number(row.limit)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(row: Row, engine: str) -> str:
    value, share = row.median(engine), row.share(engine)
    if value is None:
        return "-"
    return f"{_number(value)} ±{row.spread(engine):.1%}" + ("" if share is None else f" ({share:.0%})")


def _number(value: float | None, suffix: str = "") -> str:
    """Four digits, or all before the point."""
    if value is None:
        return "-"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") + suffix


def notes(record: dict[str, Any]) -> str:
    """What ran where, line by line."""
    card, machine, config = record["card"], record["machine"], ModelConfig(**record["model_config"])
    terabytes, teraflops = card["bytes_per_second"] / 1e12, card["flops_per_second"] / 1e12
    lines = [
        f"{machine['gpu'] or card['device'] or 'no GPU'}; commit {machine['commit']}",
        f"model: {record['model']}, {config.num_parameters / 1e9:.3g} billion parameters",
        f"limit: memory at {terabytes:.3g} TB/s, matmuls at {teraflops:.3g} TFLOP/s ({card['device'] or 'no GPU'}), of "
        f"numbers of {itemsize(record)} bytes",
    ]
    for engine, rounds in record["engines"].items():
        versions = ", ".join(f"{package} {version}" for package, version in rounds[0]["versions"].items())
        lines.append(f"{engine}: KV cache of {rounds[0]['kv_capacity_tokens']:,} tokens; {versions}")
    lines += [f"{engine}: {reason}" for engine, reason in record["missing"].items()]
    lines += [f"{engine} failed: {reason.strip().splitlines()[-1]}" for engine, reason in record["failed"].items()]
    if absent := absent_cells(record):
        lines.append(f"not in the sweep, as no engine has room for it: {', '.join(absent)}")
    lines.append("In a cell: median, ± half the spread, and in brackets the share of the limit.")
    return "\n".join(lines)


def absent_cells(record: dict[str, Any]) -> list[str]:
    """Batches and contexts that were asked for and that no engine ran, where a sweep was run."""
    results = [result["workloads"].get("sweep") for rounds in record["engines"].values() for result in rounds]
    done = {call for calls in results if calls is not None for call in calls}
    sizes = record["sizes"]
    asked = [f"{batch} x {context}" for context in sizes["contexts"] for batch in sizes["batches"]]
    return [call for call in asked if call not in done] if any(calls is not None for calls in results) else []


def check_same_requests(record: dict[str, Any]) -> None:
    """Raise RuntimeError where two engines ran other token ids or lengths under one name."""
    seen: dict[tuple[str, str], dict] = {}
    for rounds in record["engines"].values():
        for result in rounds:
            for workload, calls in result["workloads"].items():
                for call, about in calls.items():
                    request = {key: value for key, value in about.items() if key != "runs"}
                    if seen.setdefault((workload, call), request) != request:
                        raise RuntimeError(f"{workload} {call}: two environments draw different random numbers")
