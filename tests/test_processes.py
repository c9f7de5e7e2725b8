"""Scores and new weights where the engine spreads over several processes, and what they say when they disagree."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from parallel_job import CONFIGS
from small_model import write_checkpoint
from test_parallel import HERE, LAUNCH, reports_of, run
from test_parallel import assert_same as assert_same_report

JOB = str(HERE / "processes_job.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = replace(CONFIGS["group4"], num_hidden_layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("processes") / "model", config)


@pytest.mark.slow
def test_scores_and_new_weights(directory, tmp_path):
    """Over two processes as over two devices of one, with weights in every form that a script may have."""
    arguments = directory, tmp_path / "report", jax.config.jax_compilation_cache_dir
    run(LAUNCH[0], JOB, *arguments)
    alone = json.loads(Path(f"{tmp_path}/report0").read_text())
    run(*LAUNCH, "--processes", 2, "--devices", 1, JOB, *arguments)
    reports = [json.loads(Path(f"{tmp_path}/report{number}").read_text()) for number in range(2)]
    differ, own = "the 2 processes were given different requests, w", "these weights do not fit the model: embed_tokens"
    for report, third in zip(reports, (differ, own), strict=True):
        assert report.keys() >= alone.keys()
        for name in ("finish", "recompute", "saved"):
            assert report[name] == alone[name], name
        for name in ("first", "numpy", "own", "spread", "last"):
            assert_same(report[name], alone[name])
        assert_same(report["then"], report["last"])
        assert [said[:48] for said in report["refused"]] == [differ, differ, third, *[differ] * 7]
    assert alone["finish"] != alone["recompute"]
    assert len({str(alone[name][0]) for name in ("first", "numpy", "own", "spread")}) == 4, "the weights differ"
    assert_same(alone["last"], alone["first"])
    assert ["has waited" in said for said in reports[0]["warned"]] == [True]
    assert reports[1]["warned"] == []


@pytest.mark.slow
def test_two_jobs_side_by_side(directory, tmp_path):
    """Each of two processes, begun at the same time on this host: neither hears of the other."""
    alone, meshes = reports_of(directory, "1x1")["1x1"], ["1x2", "2x1"]
    command = [*LAUNCH, "--processes", 2, "--devices", 1, HERE / "parallel_job.py", directory]
    jobs = [[*command, tmp_path / mesh, jax.config.jax_compilation_cache_dir, mesh] for mesh in meshes]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    for mesh in meshes:
        for number in range(2):
            assert_same_report(json.loads(Path(f"{tmp_path / mesh}{number}").read_text())[mesh], alone)


def assert_same(ours, theirs):
    """Tokens are equal, and scores but for the order of sums."""
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
