"""Start a script as several processes of this machine that share one model: to try out what a cluster does.

python scripts/launch.py --processes 2 --devices 4 my_script.py its arguments

The script needs no changes but LLM(..., tensor_parallel_size=8) or (..., tensor_parallel_size=4, data_parallel_size=2).
Process 0 prints; what another one has to say is shown if it fails. On a CPU each process has `--devices` devices; on
GPUs process i takes those from i * devices on.
"""

import argparse
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from options import count

GRACE_SECONDS = 90  # for the others to notice that one has ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=count, default=2)
    parser.add_argument("--devices", type=count, default=1, help="of each process")
    parser.add_argument("--member", nargs=2, help=argparse.SUPPRESS)  # coordinator address and number of a child
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"{args.script} is no file")
    return launch(args) if args.member is None else run(args)


def launch(args: argparse.Namespace) -> int:
    """Start the processes and wait for them; the exit code of the first that fails, or 0, or 1 when told to end.

    JAX makes the children deaf to SIGTERM. Ctrl-C and SIGTERM are noted here and raise nothing, however many come: an
    exception in the middle of this would leave children behind.
    """
    told_to_end = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told_to_end.append(number))
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(args.processes)]
        children = []
        try:
            for number in range(args.processes):
                children.append(start(args, address, number, logs[number]))
            failed = wait(children, told_to_end)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
        if told_to_end:
            return 1
        # The first to end need not be the one at fault: it may have been told of the fault before that one was through.
        for number in failed:
            print(f"process {number} of {args.processes} ended with {children[number].returncode}", file=sys.stderr)
            if number:
                print(logs[number].read_text(errors="replace"), file=sys.stderr)
        return abs(children[failed[0]].returncode) if failed else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(args: argparse.Namespace, address: str, number: int, log: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--processes", args.processes, "--devices", args.devices]
    command += ["--member", address, number, args.script, *args.arguments]
    command = list(map(str, command))
    if number == 0:
        return subprocess.Popen(command)
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def wait(children: list[subprocess.Popen], told_to_end: list[int]) -> list[int]:
    """Until all have ended, or a signal comes, or GRACE_SECONDS after one failed; the numbers of those that failed."""
    failed, deadline = [], None
    while True:
        codes = [child.poll() for child in children]
        failed += [number for number, code in enumerate(codes) if code and number not in failed]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if None not in codes or told_to_end or (deadline and time.monotonic() > deadline):
            return failed
        time.sleep(0.05)


def run(args: argparse.Namespace) -> int:
    """In a child: join the others, then be the script."""
    import jax

    from nanovllm_jax.parallel.processes import connect

    address, number = args.member[0], int(args.member[1])
    jax.config.update("jax_num_cpu_devices", args.devices)  # of no effect on GPUs, which are numbered
    first = number * args.devices
    connect(address, args.processes, number, list(range(first, first + args.devices)))
    sys.argv = [str(args.script), *args.arguments]
    sys.path[0] = str(args.script.resolve().parent)
    runpy.run_path(str(args.script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
