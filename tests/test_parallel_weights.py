"""Weights over several devices: the same whoever holds them, and never more in a process's memory than it holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import SMALL, write_checkpoint
from test_parallel import HERE, LAUNCH

JOB = str(HERE / "weights_job.py")


def run(*command):
    done = subprocess.run(list(map(str, command)), cwd=HERE, capture_output=True, text=True, timeout=600)
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
        assert report["peak"] < report["own"] + 10 * report["largest"] + 16e6, report
        assert report["peak"] < 0.8 * report["files"], report
