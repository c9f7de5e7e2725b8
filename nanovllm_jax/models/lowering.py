"""Lowering in several processes: it takes a start longer than all else, and holds the interpreter while it does.

A helper reads from its standard input what the programs are made from, and then one batch shape after another; and it
writes each one's step to its standard output.
"""

import gc
import logging
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

import jax
from jax.stages import Lowered

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.models.programs import source_digest
from nanovllm_jax.models.step_programs import StepPrograms

logger = logging.getLogger(__name__)
PATIENCE = 20  # seconds to wait for helpers where nothing else is left to do
CONTEXT_BYTES = 1 << 30  # what a process takes of a GPU


def helpers_for(num_programs: int, free_bytes: float) -> int:
    """How many helpers are of use: there must be work and cores for them, and memory of the GPU."""
    if getattr(sys, "frozen", False):  # sys.executable is no Python, but the user's own program
        return 0
    return min(3, num_programs // 4, (os.cpu_count() or 1) // 4, int(free_bytes // CONTEXT_BYTES))


def lower_all(
    programs: StepPrograms, shapes: list[BatchShape], num_helpers: int = 0
) -> Iterator[tuple[BatchShape, Lowered]]:
    """Each shape's step, as it is ready. A helper that fails, or is late, costs time and nothing else."""
    todo, done = deque(shapes), SimpleQueue()
    missing, helpers, num_helped = dict.fromkeys(shapes), [], 0
    try:
        for _ in range(num_helpers):
            with suppress(Exception):  # whatever there is no room for, or no right to
                helpers.append(Helper(programs, todo, done))
        while missing:
            shape, exported = _next(todo, done, missing)
            if shape in missing:
                del missing[shape]
                num_helped += exported is not None
                yield shape, _lower(programs, shape, exported)
        if helpers:
            logger.info("%d processes have lowered %d of %d programs", len(helpers), num_helped, len(shapes))
    finally:
        for helper in helpers:
            helper.process.kill()
        for helper in helpers:
            helper.end()


def _next(todo: deque, done: SimpleQueue, missing: dict) -> tuple[BatchShape, bytearray | None]:
    """What a helper has ready; else what nobody has begun; else what a helper comes up with, if it does."""
    with suppress(Empty):
        return done.get_nowait()
    with suppress(IndexError):
        return todo.popleft(), None
    with suppress(Empty):
        return done.get(timeout=PATIENCE)
    late = list(missing)
    todo.extend(late[1:])
    return late[0], None


def _lower(programs: StepPrograms, shape: BatchShape, exported: bytearray | None) -> Lowered:
    if exported is not None:
        try:
            return programs.lower_exported(shape, exported)
        except Exception as error:
            logger.debug("what a helper has lowered is of no use: %r", error)
    return programs.lower(shape)


class Helper(Thread):
    """A process that lowers, and the thread that talks to it: it takes from `todo` and puts into `done`."""

    def __init__(self, programs: StepPrograms, todo: deque, done: SimpleQueue):
        super().__init__(daemon=True)
        self.job = source_digest(), jax.__version__, jax.config.values, programs.settings
        self.todo, self.done = todo, done
        # It finds the same modules (-P: and none in the working directory), and takes no share of a GPU's memory.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if isinstance(path, str))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import be_a_helper; be_a_helper()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        try:
            self.start()
        except BaseException:
            self.process.kill()
            raise

    def run(self) -> None:
        """Have one program after another lowered, from when the helper is ready on."""
        shape = None
        try:
            self._ask(self.job)
            while self.todo:
                shape = self.todo.popleft()
                self.done.put((shape, self._ask(shape)))
        except Exception as error:  # it has died, it has been ended, or it says so
            logger.debug("a helper process is of no use: %r", error)
            if shape is not None:
                self.done.put((shape, None))

    def _ask(self, question: object) -> bytearray | None:
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        """Wait for the thread and for the process, which has been killed: it may have been at work, or not begun."""
        self.join()
        with suppress(OSError), self.process:  # closes its pipes
            pass


def be_a_helper() -> None:
    """Read questions and write answers until there are no more."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not print into an answer
    gc.disable()

    def answer(what: bytearray | str | None) -> None:
        pickle.dump(what, answers)
        answers.flush()

    try:
        programs = _programs_of(*pickle.load(questions))
        answer(None)
        while True:
            answer(programs.export(pickle.load(questions)))
    except EOFError:
        pass  # it has been asked all, or whoever asked is gone
    except Exception as error:
        answer(repr(error))


def _programs_of(source: str, version: str, values: dict, settings: tuple) -> StepPrograms:
    """What the asking process has, in this one. Raises RuntimeError where that has other modules than this one."""
    if (source, version) != (source_digest(), jax.__version__):
        raise RuntimeError(f"this is nanovllm_jax {source_digest()} and jax {jax.__version__}, not {source}, {version}")
    for name, value in values.items():
        if value != jax.config.values[name]:
            jax.config.update(name, value)
    jax.config.update("jax_export_ignore_forward_compatibility", True)  # the reader has this very version
    return StepPrograms.of(settings)
