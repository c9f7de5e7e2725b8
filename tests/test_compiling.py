"""Programs that several processes compile: the same, and no worse off where a process fails."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import SMALL, write_checkpoint

from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.models import compiling
from nanovllm_jax.models.compiling import Helper, Todo, compile_all, helpers_for
from nanovllm_jax.models.programs import ProgramStore
from nanovllm_jax.models.step_programs import ProgramSettings, StepPrograms
from nanovllm_jax.parallel.sizes import split_config

pytestmark = pytest.mark.usefixtures("no_compilation_cache")
SHAPES = [BatchShape(2, 0, 2, 4, num_steps=2), BatchShape(2, 2, 16, 4), BatchShape(1, 0, 1, 4)]
ONE = SHAPES[2:]  # where it does not matter what is compiled


def make_programs(**options):
    config = EngineConfig(**options)
    model = replace(ModelConfig.from_pretrained(TINY_MODEL), num_hidden_layers=1)
    model = split_config(model, config.tensor_parallel_size)
    return StepPrograms.of(ProgramSettings(config, model, jnp.dtype("float32"), max_num_seqs=4, num_blocks=8))


@pytest.fixture(scope="module")
def programs():
    """Each lowered once, and so compiled once in this process: no option of XLA's is given for a CPU."""
    programs = make_programs()
    programs.lower = cache(programs.lower)
    return programs


def make_store(directory=None):
    return ProgramStore(directory, jax.devices()[:1], "settings")


@pytest.fixture
def store():
    return make_store()


@pytest.fixture
def helped(monkeypatch):
    """What came from helpers."""
    received, unpacked = [], ProgramStore.unpacked

    def note(store, data):
        received.append(data)
        return unpacked(store, data)

    monkeypatch.setattr(ProgramStore, "unpacked", note)
    return received


@pytest.fixture
def by_helpers(helped, monkeypatch):
    """`helped`, where this process begins nothing by itself."""
    monkeypatch.setattr(compiling, "_next", lambda todo, done, missing: done.get(timeout=60))
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


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """Helpers that are sent what they want to be sent, and for which a test answers."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec cat > /dev/null")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))


def end(helper):
    helper.join(timeout=200)
    helper.process.kill()
    helper.end()


def numbers(like):
    if like.dtype == jnp.int32:
        return jnp.ones(like.shape, jnp.int32)
    return jnp.asarray(np.random.default_rng(0).standard_normal(like.shape), like.dtype)


def test_a_helper_makes_the_same_programs(programs, store, by_helpers, caplog):
    """To the last bit of each output, and no less in place."""
    with caplog.at_level(logging.INFO, compiling.__name__):
        helped = compile_all(programs, SHAPES, store, 2)
    assert sorted(map(str, helped)) == sorted(map(str, SHAPES))
    assert len(by_helpers) == 3
    assert "2 processes have compiled 3 of 3 programs" in caplog.text
    for shape, other in helped.items():
        own, results = programs.lower(shape).compile(), []
        assert (other.in_tree, other.out_tree) == (own.in_tree, own.out_tree)
        for program in (own, other):
            args = jax.tree.map(numbers, programs.arguments(shape))
            results.append(jax.tree.map(np.asarray, program(*args)))
            assert all(array.is_deleted() for array in jax.tree.leaves(args[1:3]))
        jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("num_helpers", [0, 1])
def test_what_is_compiled_is_kept(programs, tmp_path, num_helpers, request, monkeypatch):
    """Whichever process has compiled it, whatever is in the path of modules; nothing of the working directory runs."""
    # What imports ignore, and what goes by the working directory, which a helper must not look into by itself.
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/tmp"), "relative", ""])
    working = tmp_path / "working"
    working.mkdir()
    (working / "queue.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(working)
    helped, store = request.getfixturevalue("by_helpers" if num_helpers else "helped"), make_store(tmp_path / "kept")
    assert not store.load_all(ONE)
    compile_all(programs, ONE, store, num_helpers)
    assert len(helped) == num_helpers
    assert list(store.load_all(ONE)) == ONE
    assert [path.name for path in working.iterdir()] == ["queue.py"]


SEVERAL_DEVICES = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.models import compiling
from nanovllm_jax.models.programs import ProgramStore

jax.config.update("jax_enable_compilation_cache", False)
helped, unpacked = [], ProgramStore.unpacked
ProgramStore.unpacked = lambda *args: helped.append(args) or unpacked(*args)

def tokens(num_helpers):
    ModelRunner._num_helpers = lambda *_: num_helpers
    options = dict(tensor_parallel_size=2, data_parallel_size=2, max_num_seqs=1, max_num_batched_tokens=16)
    llm = LLM(sys.argv[1], compilation_cache_dir=None, **options)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)]

alone = tokens(0)
assert not helped
compiling._next = lambda todo, done, missing: done.get(timeout=200)
assert tokens(1) == alone
assert helped
"""


def test_programs_of_several_devices(tmp_path):
    """A helper makes the same mesh."""
    model = write_checkpoint(tmp_path / "model", replace(SMALL, num_hidden_layers=1))
    subprocess.run([sys.executable, "-c", SEVERAL_DEVICES, str(model)], check=True)


def test_a_helper_has_the_settings_of_jax(programs, caplog):
    """As this process has them when it compiles, whoever set them: with this one no step can be traced."""
    done = SimpleQueue()
    with jax.enable_x64(True), caplog.at_level(logging.DEBUG, compiling.__name__):
        end(Helper(programs, Todo(SHAPES[:1]), done, make_store()))
    assert done.get_nowait() == (SHAPES[0], None)
    assert re.search(r"(int|float)64", caplog.text)  # whichever it comes to first


def test_how_many_helpers(monkeypatch):
    """Three where there is room, and none where it would be in the way."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    gib = 1 << 30
    assert helpers_for(34, 8 * gib, gib) == 3
    assert [helpers_for(34, 5 * gib, gib), helpers_for(34, 2 * gib, 0), helpers_for(34, 2 * gib, 2 * gib)] == [2, 2, 0]
    assert [helpers_for(34, 0, 0), helpers_for(3, 8 * gib, gib)] == [0, 0]
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert helpers_for(34, 8 * gib, gib) == 0
    monkeypatch.undo()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert helpers_for(34, 8 * gib, gib) == 0


def test_what_is_to_do():
    """This process takes them in their order, a helper those with most prefill tokens, and none is taken twice."""
    todo = Todo(SHAPES)
    assert [todo.largest(), todo.first(), todo.largest()] == [SHAPES[1], SHAPES[0], SHAPES[2]]
    assert (todo.first(), todo.largest()) == (None, None)
    todo.put_back(SHAPES[:1])
    assert todo.first() == SHAPES[0]


def test_no_helpers(store, started):
    compiled = compile_all(Fake(str), SHAPES, store)
    assert list(compiled.items()) == [(shape, str(shape)) for shape in SHAPES]
    assert not started


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python", "", None])
def test_a_helper_that_does_not_start(programs, store, helped, monkeypatch, caplog, python):
    monkeypatch.setattr(sys, "executable", python)
    with caplog.at_level(logging.DEBUG, compiling.__name__):
        assert list(compile_all(programs, ONE, store, 2)) == ONE
    assert not helped
    assert caplog.text.count("a helper process") == 2


def test_helpers_keep_no_memory_of_a_gpu_from_one_another(programs, store, monkeypatch):
    """Beside a large model there is little of it. Whatever pool the user has for this process, they have none."""
    environments = []

    def note(*args, env, **options):
        environments.append(env)
        raise OSError("no process")

    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    monkeypatch.setattr(subprocess, "Popen", note)
    assert list(compile_all(programs, ONE, store, 2)) == ONE
    assert [env["XLA_PYTHON_CLIENT_ALLOCATOR"] for env in environments] == ["platform"] * 2


@pytest.mark.parametrize("which", [0, 2, -1], ids=["modules", "flags", "devices"])
def test_other_programs_are_no_help(programs, store, which):
    """A helper that would make them says so, as in test_a_helper_that_says_what_is_wrong."""
    store.about[which] = "another"
    with pytest.raises(RuntimeError, match=r"not \{'another'\}"):
        compiling._programs_of(jax.config.values, programs.settings, store.settings, store.about)


@pytest.mark.usefixtures("silent")
def test_what_cannot_be_read_is_compiled_here(programs, store, helped, monkeypatch, caplog):
    """And nothing else is left to such a helper."""
    answers = iter([(None, None), (SHAPES[1], b"nonsense"), (None, None)])
    monkeypatch.setattr(Helper, "_receive", lambda helper: next(answers))
    monkeypatch.setattr(compiling, "_next", after_the_helper(1))
    with caplog.at_level(logging.DEBUG, compiling.__name__):
        assert len(compile_all(programs, SHAPES, store, 1)) == len(SHAPES)
    assert helped == [b"nonsense"]
    assert next(answers) == (None, None)
    assert "a helper process is of no use: UnpicklingError" in caplog.text


def after_the_helper(number):
    """`_next`, called when a helper has taken so many of SHAPES."""

    def wait_first(todo, done, missing):
        while not begun and len(todo._shapes) > len(SHAPES) - number:
            time.sleep(0.01)
        begun.append(True)
        return following(todo, done, missing)

    begun, following = [], compiling._next
    return wait_first


def test_what_a_helper_cannot_compile_is_compiled_here(programs, store, by_helpers, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import nanovllm_jax.models.step_programs as module\nmodule.compiler_options = lambda *_: {'no_such_option': 1}"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    answers, receive = [], Helper._receive

    def note(helper):
        answers.append(receive(helper))
        return answers[-1]

    monkeypatch.setattr(Helper, "_receive", note)
    assert len(compile_all(programs, ONE, store, 1)) == 1
    assert (ONE[0], None) in answers
    assert not by_helpers


@pytest.mark.usefixtures("silent")
def test_a_helper_without_a_thread(programs, store, started, monkeypatch, caplog):
    monkeypatch.setattr(Helper, "start", no_thread)
    with caplog.at_level(logging.DEBUG, compiling.__name__):
        assert list(compile_all(programs, ONE, store, 1)) == ONE
    assert started[0].wait(timeout=60) < 0
    assert "can't start new thread" in caplog.text


def no_thread(helper):
    raise RuntimeError("can't start new thread")


def test_a_helper_that_says_what_is_wrong(programs, store, caplog):
    """It cannot make the model; the exception is in the log of this process, and it has taken nothing."""
    settings = programs.settings._replace(model_config="no config")
    broken, todo = StepPrograms(settings, programs.mesh, programs.weights), Todo(SHAPES)
    with caplog.at_level(logging.DEBUG, compiling.__name__):
        end(Helper(broken, todo, SimpleQueue(), store))
    assert "AttributeError" in caplog.text
    assert todo.first() == SHAPES[0]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("fate", ["dies", "sleeps"])
def test_a_helper_that_does_not_answer(programs, store, helped, monkeypatch, fate):
    """Its programs are compiled here: at once if it is known to be dead, else when they have all had their time."""

    def receive(helper):
        if len(asked) < 3:
            asked.append(helper)
            return None, None
        if fate == "sleeps":
            helper.process.wait()  # for its end
        raise EOFError

    def note(todo, shapes):
        late.append(len(shapes))
        return put_back(todo, shapes)

    asked, late, put_back = [], [], Todo.put_back
    monkeypatch.setattr(Helper, "_receive", receive)
    monkeypatch.setattr(Todo, "put_back", note)
    monkeypatch.setattr(compiling, "PATIENCE", 0.1)
    monkeypatch.setattr(compiling, "_next", after_the_helper(3))
    assert sorted(map(str, compile_all(programs, SHAPES, store, 1))) == sorted(map(str, SHAPES))
    assert late == ([2] if fate == "sleeps" else [])
    assert not helped


def test_a_program_that_comes_twice_is_compiled_once(store, monkeypatch):
    """Late ones do, when they were not waited for."""
    came = iter([(0, None), (0, None), (1, "one"), (1, None), (0, None), (2, None)])
    monkeypatch.setattr(compiling, "_next", lambda *_: next(came))
    compiled = []
    programs = Fake(lambda shape: compiled.append(shape) or shape)
    assert compile_all(programs, [0, 1, 2], store) == {0: 0, 1: "one", 2: 2}
    assert compiled == [0, 2]


def test_no_process_is_left(programs, store, started, monkeypatch):
    """Neither when all is compiled, nor when this process is stopped half way."""

    def stop(*_):
        raise KeyboardInterrupt

    compile_all(programs, ONE, store, 1)
    monkeypatch.setattr(compiling, "_next", stop)
    with pytest.raises(KeyboardInterrupt):
        compile_all(programs, ONE, store, 1)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
    assert all(pipe.closed for process in started for pipe in (process.stdin, process.stdout))


class Fake:
    """Programs, each of which `compile` is to make, called with its shape."""

    def __init__(self, compile):
        self.compile = compile

    def lower(self, shape):
        return SimpleNamespace(compile=lambda options: self.compile(shape))

    def compiler_options(self, shape):
        return {}


def test_what_failed_beside_others_is_compiled_once_more(store, caplog):
    def compile(name):
        failures[name] -= 1
        if failures[name] >= 0:
            raise RuntimeError("Failed to launch ptxas")
        return name

    failures = {"a": 1, "b": 0}
    assert compile_all(Fake(compile), ["a", "b"], store) == {"a": "a", "b": "b"}
    assert "'a' could not be compiled beside others (Failed to launch ptxas)" in caplog.text
    failures = {"a": 2}
    with pytest.raises(RuntimeError, match="ptxas"):
        compile_all(Fake(compile), ["a"], store)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_leaves_what_has_not_begun(store):
    """Also where all is lowered, and the first thread waits for the others."""
    begun, threads = [], os.cpu_count()

    def compile(shape):
        begun.append(shape)
        time.sleep(0.2)
        if shape == threads:  # then those before it have begun
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        compile_all(Fake(compile), list(range(1, 10 * threads)), store)
    assert threads <= len(begun) <= 2 * threads
