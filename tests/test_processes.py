"""Scores and new weights where the engine spreads over several processes, and what they say when they disagree."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from parallel_job import CONFIGS
from small_model import write_checkpoint
from test_parallel import HERE, LAUNCH, run

JOB = str(HERE / "processes_job.py")


@pytest.mark.slow
def test_scores_and_new_weights(tmp_path):
    """Over two processes as over two devices of one, with weights in every form that a script may have."""
    directory = write_checkpoint(tmp_path / "model", replace(CONFIGS["group4"], num_hidden_layers=1))
    arguments = directory, tmp_path / "report", jax.config.jax_compilation_cache_dir
    run(LAUNCH[0], JOB, *arguments)
    alone = json.loads(Path(f"{tmp_path}/report0").read_text())
    run(*LAUNCH, "--processes", 2, "--devices", 1, JOB, *arguments)
    reports = [json.loads(Path(f"{tmp_path}/report{number}").read_text()) for number in range(2)]
    for report in reports:
        assert report.keys() >= alone.keys()
        for name in ("finish", "recompute"):
            assert report[name] == alone[name], name
        for name in ("first", "numpy", "own", "spread", "last"):
            assert_same(report[name], alone[name])
        assert_same(report["then"], report["last"])
        assert [said[:48] for said in report["refused"]] == ["the 2 processes were given different requests or"] * 5
    assert alone["finish"] != alone["recompute"]
    assert len({str(alone[name][0]) for name in ("first", "numpy", "own", "spread")}) == 4, "the weights differ"
    assert_same(alone["last"], alone["first"])
    assert ["has waited" in said for said in reports[0]["warned"]] == [True]
    assert reports[1]["warned"] == []


def assert_same(ours, theirs):
    """Tokens are equal, and scores but for the order of sums."""
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
