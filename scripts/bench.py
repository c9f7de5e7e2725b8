"""This engine beside nano-vllm and vLLM: the same token ids, lengths and weights, each in its own process.

    python scripts/bench.py --model DIRECTORY                       # nano-vllm's own benchmark, every engine installed
    python scripts/bench.py --model DIRECTORY --engines ours --workload nano single prefill sweep shared online
    python scripts/bench.py --random-weights CONFIG.json            # writes a random checkpoint of that shape once
    python scripts/bench.py --model DIRECTORY --load-format dummy   # a config.json is enough; not for nano-vllm
    python scripts/bench.py --model DIRECTORY --python vllm=/path/to/venv/bin/python --json run.json --plot run.png
    python scripts/bench.py --report run.json --plot run.png        # an earlier run's table and picture

Engines take turns, round by round, and every call is warmed up and then repeated; the prefix cache is emptied before
each, but in the sweep, whose prompts are in it. No --model: the tiny model, on a CPU too.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmark import machine, report
from benchmark.engines import ENGINES
from benchmark.workloads import SWEEP_STEPS, WORKLOADS, Sizes
from options import above_zero, checkpoint, count, json_object, new_file, picture, writing

from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.checkpoints.orbax import FOLDER
from nanovllm_jax.config import ModelConfig

SCRIPTS = Path(__file__).parent
INTERRUPTED = "interrupted"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Sizes(vocab_size=0, max_model_len=0)
    parser.add_argument("--model", help="a checkpoint's directory, or a Hub id")
    parser.add_argument(
        "--random-weights",
        type=Path,
        metavar="CONFIG",
        help="write a checkpoint of this config.json's shape to --model (default: a cache), if it is not there yet",
    )
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=list(ENGINES))
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["nano"])
    parser.add_argument(
        "--python",
        type=assignment,
        action="append",
        default=[],
        metavar="ENGINE=PYTHON",
        help="an engine's own interpreter",
    )
    parser.add_argument(
        "--options",
        type=settings,
        action="append",
        default=[],
        metavar="ENGINE=JSON",
        help="further arguments of its LLM(...)",
    )
    parser.add_argument("--max-model-len", type=count, help="of every engine (default: 4096, or what the sweep needs)")
    parser.add_argument("--gpu-memory-utilization", type=above_zero, default=0.9)
    parser.add_argument("--repeats", type=count, default=3, help="timed runs of a call in each round")
    parser.add_argument("--rounds", type=count, help="starts of each engine (default: 2, or 1 for a single engine)")
    parser.add_argument("--batches", type=count, nargs="+", default=defaults.batches, help="of the sweep")
    parser.add_argument("--contexts", type=count, nargs="+", default=defaults.contexts, help="of the sweep, in tokens")
    parser.add_argument(
        "--rates", type=above_zero, nargs="+", default=defaults.rates, help="of online, in requests per second"
    )
    parser.add_argument("--requests", type=count, help="in each call, in place of the workload's own number")
    parser.add_argument("--bandwidth", type=above_zero, help="the card's TB/s (default: measured)")
    parser.add_argument("--flops", type=above_zero, help="the card's TFLOP/s (default: measured)")
    parser.add_argument("--json", type=new_file, help="write the record here, after every engine's turn")
    parser.add_argument("--plot", type=picture, help="write a picture here (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--report", type=recorded, metavar="FILE", help="a record: show it, run nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    args = parser.parse_args(arguments)
    if args.report and args.json:
        parser.error("--report runs nothing that --json could write")
    try:
        if not args.report:
            args.model = prepare_model(args)
            args.config = ModelConfig.from_pretrained(args.model)
    except (argparse.ArgumentTypeError, ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    return args


def assignment(text: str) -> tuple[str, str]:
    engine, equals, value = text.partition("=")
    if engine not in ENGINES or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=VALUE with one of {', '.join(ENGINES)}")
    return engine, value


def settings(text: str) -> tuple[str, dict[str, Any]]:
    engine, value = assignment(text)
    return engine, json_object(value)


def recorded(text: str) -> dict[str, Any]:
    """What --json has written."""
    try:
        record = json.loads(Path(text).read_text())
        report.notes(record)
        report.table(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no record of this script: {error!r}") from error
    return record


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where an engine that is there failed, and where there is none."""
    args = parse_args(arguments)
    record = args.report or run(args)
    print(report.table(record), report.notes(record), sep="\n\n")
    if args.plot:
        from benchmark.plot import plot  # late: it needs matplotlib

        with writing(args.plot):
            plot(record, args.plot)
    return int(bool(record["failed"]) or not record["engines"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the record."""
    pythons = dict.fromkeys(ENGINES, sys.executable) | dict(args.python)
    options, model, config = dict(args.options), args.model, args.config
    sizes = Sizes(
        vocab_size=config.vocab_size,
        max_model_len=resolve_max_model_len(args, config),
        requests=args.requests,
        batches=args.batches,
        contexts=args.contexts,
        rates=args.rates,
    )
    missing = find_missing(args, pythons)
    engines = [engine for engine in args.engines if engine not in missing]
    record: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "model": str(model),
        "model_config": {name: value for name, value in asdict(config).items() if name != "rope"},
        "sizes": asdict(sizes),
        "machine": machine.describe(),
        "card": measure_card(args, sys.executable if report.OURS in missing else pythons[report.OURS]),
        "missing": missing,
        "failed": {},
        "engines": {},
    }
    for reason in missing.items():
        print(*reason, sep=": ", flush=True)
    if not engines:
        keep(record, args.json)
    common = {"max_model_len": sizes.max_model_len, "gpu_memory_utilization": args.gpu_memory_utilization}
    if args.load_format != "auto":
        common["load_format"] = args.load_format
    job = {"model": str(model), "workloads": args.workload, "sizes": asdict(sizes), "repeats": args.repeats}
    for number in range(args.rounds or min(2, len(engines))):
        for engine in engines:
            print(f"round {number + 1}: {engine}", flush=True)
            own_job = job | {"engine": engine, "options": common | options.get(engine, {})}
            run_engine(record, own_job, pythons[engine], args.verbose)
            keep(record, args.json)
            if record["failed"].get(engine) == INTERRUPTED:
                return record
    return record


def keep(record: dict[str, Any], path: Path | None) -> None:
    """Write what there is so far, with its summary."""
    record["summary"] = [row.summary() for row in report.rows(record)]
    if path:
        with writing(path):
            path.write_text(json.dumps(record, indent=1))


def prepare_model(args: argparse.Namespace) -> Path:
    """The checkpoint's directory, written first where that is asked for.

    Raises ValueError where another model is there already, OSError and RuntimeError where it cannot be written.
    """
    if not args.random_weights:
        return checkpoint(args.model or TINY_MODEL)
    path = args.random_weights / "config.json" if args.random_weights.is_dir() else args.random_weights
    name = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    default = f"~/.cache/nanovllm_jax/random-weights/{name}"
    directory = Path(args.model or default).expanduser().resolve()
    wanted, there = read_config(path), directory / "config.json"
    if there.exists() and read_config(there) != wanted:
        raise ValueError(f"{directory} holds another model than {path}: give another --model")
    if not (directory / FOLDER).is_dir() and not list(directory.glob("*.safetensors")):
        print(f"writing random weights to {directory}", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        run_module(sys.executable, "benchmark.checkpoint", [path, directory], verbose=True)
    return directory


def read_config(path: Path) -> ModelConfig:
    """From a config.json under any name, whatever the dtype. Raises ValueError, naming it, where it is none."""
    return replace(ModelConfig.from_file(path), dtype="bfloat16")


def resolve_max_model_len(args: argparse.Namespace, config: ModelConfig) -> int:
    if args.max_model_len:
        return args.max_model_len
    sweep = max(args.contexts) + SWEEP_STEPS + 2 if "sweep" in args.workload else 0
    return min(max(4096, sweep), config.max_context)


def find_missing(args: argparse.Namespace, pythons: dict[str, str]) -> dict[str, str]:
    """The engines that cannot run, and what to do about it."""
    missing = {}
    for engine in args.engines:
        kind = ENGINES[engine]
        if not has_module(pythons[engine], kind.MODULE.partition(".")[0]):
            missing[engine] = (
                f"not installed in {pythons[engine]}. {kind.INSTALL}; or name another environment with "
                f"--python {engine}=/path/to/venv/bin/python"
            )
        elif args.load_format == "dummy" and not kind.READS_DUMMY:
            missing[engine] = "cannot make up weights (--load-format dummy); write some with --random-weights CONFIG"
    return missing


def has_module(python: str, name: str) -> bool:
    """Whether an interpreter is there and finds a module; a folder that happens to have its name is none."""
    probe = f"import importlib.util as u, sys; sys.exit(not getattr(u.find_spec({name!r}), 'origin', None))"
    try:
        return subprocess.run([python, "-c", probe], check=False).returncode == 0
    except OSError:
        return False


def measure_card(args: argparse.Namespace, python: str) -> dict[str, Any]:
    """The rates that are given, and the others measured, by an interpreter with JAX."""
    given = {"bytes_per_second": args.bandwidth, "flops_per_second": args.flops}
    given = {name: 1e12 * value for name, value in given.items() if value}
    if len(given) == 2:
        return {"device": machine.describe()["gpu"]} | given
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "card.json"
        try:
            run_module(python, "benchmark.card", [path], args.verbose)
        except RuntimeError as error:
            raise SystemExit(f"{error}error: the card cannot be measured: give --bandwidth and --flops") from error
        return json.loads(path.read_text()) | given


def run_engine(record: dict[str, Any], job: dict[str, Any], python: str, verbose: bool) -> None:
    """One engine's turn: adds its result to the record, or what it had until it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        job_path, result_path = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_path.write_text(json.dumps(job))
        try:
            run_module(python, "benchmark.worker", [job_path, result_path], verbose)
        except RuntimeError as error:
            record["failed"][job["engine"]] = str(error)
            print(f"{job['engine']} failed: {error}", flush=True)
        except KeyboardInterrupt:
            record["failed"][job["engine"]] = INTERRUPTED
        if result_path.exists():
            record["engines"].setdefault(job["engine"], []).append(json.loads(result_path.read_text()))
        elif job["engine"] not in record["failed"]:
            record["failed"][job["engine"]] = "it ended without a result"
    report.check_same_requests(record)


def run_module(python: str, module: str, arguments: list[Path], verbose: bool) -> None:
    """Run a module of this package in its own process; raises RuntimeError with the end of what it printed."""
    path = os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [python, "-m", module, *map(str, arguments)]
        output = None if verbose else log
        status = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=output, stderr=output, check=False
        ).returncode
        if status:
            log.seek(0)
            raise RuntimeError(f"{shlex.join(command)} ended with status {status}\n{''.join(log.readlines()[-30:])}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the engine ends, what it has is kept
    sys.exit(main())
