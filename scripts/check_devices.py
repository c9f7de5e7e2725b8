"""Does a model over several GPUs give what one gives, and how fast is it? Random weights of Qwen3-0.6B's shapes.

python scripts/check_devices.py --devices 2                          # meant to take under two minutes on two GPUs
python scripts/check_devices.py --devices 2 --only links sums speed

Each check of scripts/device_checks.py prints a line when it ends. Where one fails, or its process crashes or hangs, the
others run all the same, and the exit code is 1. A CPU is taken for so many devices, and its shapes are smaller.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import device_checks

PATIENCE = 240  # seconds for one check: then it hangs, and its processes are killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, choices=(2, 4, 8, 16), default=2)
    parser.add_argument("--only", nargs="+", choices=device_checks.CHECKS, default=list(device_checks.CHECKS))
    args = parser.parse_args()
    names = [name for name in device_checks.CHECKS if name in args.only or name == "alone"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: so that no process is left
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Before the processes of the last check can have the GPUs, the process of the others must have ended.
        groups = [[name for name in names if name != "processes"], [name for name in names if name == "processes"]]
        failed = [name for group in groups for name in run(group, folder, args.devices)]
    print(f"{len(names) - len(failed)} of {len(names)} checks passed in {time.monotonic() - start:.0f} s")
    return int(bool(failed))


def run(names: list[str], folder: str, devices: int) -> list[str]:
    """Run checks in one process, and in another one what is left when it ends too early; the names of what failed."""
    left, failed = list(names), []
    while left:
        command = [sys.executable, device_checks.__file__, folder, str(devices), *left]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            while left:
                start = time.monotonic()
                line = read_line(child)
                if not line:
                    seconds = time.monotonic() - start
                    print(f"{left[0]:10} FAILED {seconds:6.1f} s  its process ended with {child.wait()}", flush=True)
                    failed.append(left.pop(0))
                    break
                print(line, end="", flush=True)
                if line.split()[:1] == left[:1]:
                    failed += [left[0]] if line.split()[1] == "FAILED" else []
                    left.pop(0)
        finally:
            if left:  # else it ends by itself
                end(child)
            child.wait()
    return failed


def read_line(child: subprocess.Popen) -> str:
    """The child's next line, empty when there is none; it is killed where none comes for too long."""
    timer = threading.Timer(PATIENCE, end, [child])
    timer.start()
    try:
        return child.stdout.readline()
    finally:
        timer.cancel()


def end(child: subprocess.Popen) -> None:
    """Kill a child and what it has started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
