"""Where and from what source a benchmark ran."""

import platform
import shutil
import subprocess
from pathlib import Path


def describe() -> dict[str, str | None]:
    """GPU (with memory and driver), commit ("+" after it: with changes), processor and system."""
    query = "--query-gpu=name,memory.total,driver_version"
    here = str(Path(__file__).parent)
    commit = output_of("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changes = output_of("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    gpus = (output_of("nvidia-smi", query, "--format=csv,noheader") or "").splitlines()
    return {
        "gpu": (f"{len(gpus)} x " if len(gpus) > 1 else "") + gpus[0] if gpus else None,
        "commit": f"{commit}+" if commit and changes else commit,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is not there, fails or prints nothing."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
