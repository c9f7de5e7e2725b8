"""Weights over several devices: the same whoever holds them, and never more in a process's memory than it holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import SMALL, write_checkpoint
from test_parallel import HERE, LAUNCH

JOB = str(HERE / "weights_job.py")


# Memory that is freed goes back at once: what is measured is what is held.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}


def run(*command):
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(
        list(map(str, command)), cwd=HERE, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]


def test_random_weights_do_not_depend_on_the_mesh():
    """Copies of kv heads included; each device makes its own shard alone."""
    run(sys.executable, JOB, "random")


@pytest.mark.parametrize("processes", [2])
def test_loading_takes_the_memory_of_its_shards(tmp_path, processes):
    """A checkpoint of 207 MB over two processes: each may grow by its half and what is on its way, well below all."""
    sizes = dict(vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, head_dim=64)
    write_checkpoint(tmp_path / "model", SMALL.__class__(**(vars(SMALL) | sizes)))
    run(*LAUNCH, "--processes", processes, "--devices", 1, JOB, "memory", tmp_path / "model", tmp_path / "report")
    for number in range(processes):
        report = json.loads(Path(tmp_path / f"report{number}").read_text())
        assert report["own"] < 0.51 * report["files"]
        assert report["peak"] < report["own"] + 6 * report["largest"], report
        assert report["peak"] < 0.65 * report["files"], report
