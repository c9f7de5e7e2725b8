"""Programs that other processes lower: the same, and no worse off where such a process fails."""

import logging
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.models import lowering
from nanovllm_jax.models.lowering import Helper, helpers_for, lower_all
from nanovllm_jax.models.step_programs import ProgramSettings, StepPrograms
from nanovllm_jax.parallel.sizes import split_config

SHAPES = [BatchShape(2, 0, 0, 4, num_steps=2), BatchShape(2, 2, 16, 4), BatchShape(1, 0, 0, 4)]


def make_programs(**options):
    config = EngineConfig(**options)
    model = replace(ModelConfig.from_pretrained(TINY_MODEL), num_hidden_layers=2)
    model = split_config(model, config.tensor_parallel_size)
    return StepPrograms.of(ProgramSettings(config, model, jnp.dtype("float32"), max_num_seqs=4, num_blocks=8))


@pytest.fixture(scope="module")
def programs():
    return make_programs()


@pytest.fixture
def helped(monkeypatch):
    """The shapes that came from helpers."""
    shapes, lower_exported = [], StepPrograms.lower_exported

    def note(programs, shape, exported):
        shapes.append(shape)
        return lower_exported(programs, shape, exported)

    monkeypatch.setattr(StepPrograms, "lower_exported", note)
    return shapes


@pytest.fixture
def by_helpers(helped, monkeypatch):
    """`helped`, where this process begins nothing by itself."""
    monkeypatch.setattr(lowering, "_next", lambda todo, done, missing: done.get(timeout=200))
    return helped


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    processes, start = [], subprocess.Popen

    def note(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    return processes


def end(helper):
    helper.join(timeout=200)
    helper.process.kill()
    helper.end()


def numbers(like):
    if like.dtype == jnp.int32:
        return jnp.ones(like.shape, jnp.int32)
    return jnp.asarray(np.random.default_rng(0).standard_normal(like.shape), like.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_exported_program_is_the_same_program(programs, shape):
    """To the last bit of each output, and no less in place."""
    own, other = programs.lower(shape), programs.lower_exported(shape, programs.export(shape))
    assert other.in_tree == own.in_tree
    assert other.out_tree == own.out_tree
    results = []
    for program in (own.compile(), other.compile()):
        args = jax.tree.map(numbers, programs.arguments(shape))
        results.append(jax.tree.map(np.asarray, program(*args)))
        assert all(array.is_deleted() for array in jax.tree.leaves(args[1:3]))
    jax.tree.map(np.testing.assert_array_equal, *results)


SEVERAL_DEVICES = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.models import lowering
from nanovllm_jax.models.step_programs import StepPrograms

helped, lower_exported = [], StepPrograms.lower_exported
StepPrograms.lower_exported = lambda *args: helped.append(args) or lower_exported(*args)

def tokens(num_helpers):
    ModelRunner._num_helpers = lambda *_: num_helpers
    options = dict(tensor_parallel_size=2, data_parallel_size=2, max_num_seqs=2, max_num_batched_tokens=32)
    llm = LLM(TINY_MODEL, compilation_cache_dir=None, **options)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)]

alone = tokens(0)
assert not helped
lowering._next = lambda todo, done, missing: done.get(timeout=200)
assert tokens(1) == alone
assert helped
"""


def test_programs_of_several_devices():
    """A helper makes the same mesh."""
    subprocess.run([sys.executable, "-c", SEVERAL_DEVICES], check=True)


def test_helpers_lower_what_nobody_has_begun(programs, by_helpers, caplog):
    with caplog.at_level(logging.INFO, lowering.__name__):
        assert sorted(map(str, dict(lower_all(programs, SHAPES, 2)))) == sorted(map(str, SHAPES))
    assert len(by_helpers) == 3
    assert "2 processes have lowered 3 of 3 programs" in caplog.text


def test_a_helper_has_the_settings_of_jax(programs, caplog):
    """As this process has them when it lowers, whoever set them: with this one no step can be traced."""
    done = SimpleQueue()
    with jax.enable_x64(True), caplog.at_level(logging.DEBUG, lowering.__name__):
        end(Helper(programs, deque(SHAPES[:1]), done))
    assert done.get_nowait() == (SHAPES[0], None)
    assert "int64" in caplog.text


def test_how_many_helpers(monkeypatch):
    """Three where there is room, and none where it would be in the way."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert helpers_for(34, 8 << 30) == 3
    assert [helpers_for(34, 2 << 30), helpers_for(34, 0), helpers_for(3, 8 << 30)] == [2, 0, 0]
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert helpers_for(34, 8 << 30) == 0
    monkeypatch.undo()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert helpers_for(34, 8 << 30) == 0


def test_no_helpers(programs, helped):
    assert [shape for shape, _ in lower_all(programs, SHAPES)] == SHAPES
    assert not helped


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python", "", None])
def test_a_helper_that_does_not_start(programs, helped, monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    assert [shape for shape, _ in lower_all(programs, SHAPES, 2)] == SHAPES
    assert not helped


@pytest.mark.parametrize("path", [Path("/tmp"), "relative", ""], ids=repr)
def test_any_path_of_modules(programs, by_helpers, monkeypatch, path):
    """What imports ignore, and what goes by the working directory, which a helper must not look into by itself."""
    monkeypatch.setattr(sys, "path", [*sys.path, path])
    assert len(dict(lower_all(programs, SHAPES[2:], 1))) == len(by_helpers) == 1


def test_a_helper_runs_nothing_of_the_working_directory(programs, by_helpers, monkeypatch, tmp_path):
    (tmp_path / "queue.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert len(dict(lower_all(programs, SHAPES[:1], 1))) == len(by_helpers) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["queue.py"]


def test_a_helper_with_other_modules_is_of_no_use(programs, monkeypatch, caplog):
    monkeypatch.setattr(lowering, "source_digest", lambda: "another")
    with caplog.at_level(logging.DEBUG, lowering.__name__):
        helper = Helper(programs, deque(SHAPES), SimpleQueue())
        end(helper)
    assert "not another" in caplog.text
    assert len(helper.todo) == len(SHAPES)


def test_what_cannot_be_read_is_lowered_here(programs, by_helpers, monkeypatch):
    monkeypatch.setattr(Helper, "_ask", lambda helper, question: b"nonsense")
    assert len(dict(lower_all(programs, SHAPES[:1], 1))) == 1


def test_a_helper_without_a_thread(programs, started, monkeypatch):
    monkeypatch.setattr(Helper, "start", no_thread)
    assert [shape for shape, _ in lower_all(programs, SHAPES, 1)] == SHAPES
    assert started[0].wait(timeout=60) < 0


def no_thread(helper):
    raise RuntimeError("can't start new thread")


def test_a_helper_that_says_what_is_wrong(programs, caplog):
    """It cannot make the model; the exception is in the log of this process."""
    settings = programs.settings._replace(model_config="no config")
    broken = StepPrograms(settings, programs.mesh, programs.weights, programs.treedef)
    with caplog.at_level(logging.DEBUG, lowering.__name__):
        end(Helper(broken, deque(), SimpleQueue()))
    assert "AttributeError" in caplog.text


@pytest.mark.parametrize("fate", ["dies", "sleeps"])
def test_a_helper_that_does_not_answer(programs, helped, monkeypatch, fate):
    """Its program is lowered here: at once if it is known to be dead, else when it has had its time."""

    def ask(helper, question):
        if question is not helper.job:
            if fate == "sleeps":
                helper.process.wait()  # for its end
            raise EOFError

    begun = []

    def next_after_the_helper(todo, done, missing):
        while not begun and len(todo) == len(SHAPES):
            time.sleep(0.01)  # so that the helper has taken one
        begun.append(True)
        return _next(todo, done, missing)

    _next = lowering._next
    monkeypatch.setattr(Helper, "_ask", ask)
    monkeypatch.setattr(lowering, "PATIENCE", 0.1)
    monkeypatch.setattr(lowering, "_next", next_after_the_helper)
    assert sorted(map(str, dict(lower_all(programs, SHAPES, 1)))) == sorted(map(str, SHAPES))
    assert not helped


def test_no_process_is_left(programs, started):
    """Neither when all is lowered, nor when the caller stops half way."""
    for _ in lower_all(programs, SHAPES, 1):
        pass
    half = lower_all(programs, SHAPES, 1)
    next(half)
    half.close()
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
    assert all(pipe.closed for process in started for pipe in (process.stdin, process.stdout))
