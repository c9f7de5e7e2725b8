"""A record as a picture: bars for throughput and latency, and the time per decode step against the batch."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.report import Row, rows

COLUMNS = 4
COLORS = {"ours": "tab:blue", "nanovllm": "tab:orange", "vllm": "tab:green"}
OTHER = "tab:gray"


def plot(record: dict[str, Any], path: Path) -> None:
    """Write the picture in the form that the path's suffix names."""
    figures = [row for row in rows(record) if row.values]
    bars = [row for row in figures if row.unit in ("tok/s", "ms", "ms/token") and is_drawn(row)]
    sweeps: dict[str, list[Row]] = {}
    for row in figures:
        if row.workload == "sweep":
            sweeps.setdefault(row.name.split(" x ")[1], []).append(row)
    count = len(bars) + len(sweeps)
    lines = max(1, -(-count // COLUMNS))
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(3.2 * COLUMNS, 2.8 * lines), layout="constrained")
        axes = iter(figure.subplots(lines, COLUMNS, squeeze=False).flat)
        for row in bars:
            draw_bars(next(axes), row)
        for context, steps in sweeps.items():
            draw_sweep(next(axes), context, steps)
        for unused in axes:
            unused.set_axis_off()
        figure.suptitle(f"{Path(record['model']).name} on {record['machine']['gpu'] or record['card']['device']}")
        figure.savefig(path, dpi=150)


def is_drawn(row: Row) -> bool:
    """Of the online workload some of its many figures."""
    return row.workload != "online" or row.name.endswith(("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99"))


def draw_bars(axes: Axes, row: Row) -> None:
    """One bar an engine, a dashed line at the limit."""
    engines = list(row.values)
    heights = [row.median(engine) for engine in engines]
    errors = [row.spread(engine) * height for engine, height in zip(engines, heights, strict=True)]
    axes.bar(engines, heights, yerr=errors, capsize=3, color=[COLORS.get(engine, OTHER) for engine in engines])
    if row.limit:
        axes.axhline(row.limit, color="black", linestyle="--", linewidth=1)
    axes.set_title(f"{row.workload}: {row.name}, {row.unit}\n({'more' if row.more_is_better else 'less'} is better)")


def draw_sweep(axes: Axes, context: str, steps: list[Row]) -> None:
    """Time per step against batch, the limit dashed."""
    batches = [int(row.name.split(" x ")[0]) for row in steps]
    for engine in dict.fromkeys(engine for row in steps for engine in row.values):
        times = [row.median(engine) or float("nan") for row in steps]
        axes.plot(batches, times, marker="o", markersize=3, label=engine, color=COLORS.get(engine, OTHER))
    axes.plot(batches, [row.limit for row in steps], "k--", linewidth=1, label="limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch")
    axes.set_title(f"decode at context {context}, ms/step")
    axes.legend()
