"""Compiling in several processes: this one and helpers, each a program at a time from one list.

Tracing and lowering hold the interpreter. And while XLA compiles a kernel of Mosaic GPU, no other kernel of the same
process goes on (both want LLVM's options, of which a process has one set). A helper reads from its standard input what
the programs are made from, and then one batch shape after another; it writes the compiled programs to its standard
output.
"""

import gc
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import jax
from jax.stages import Compiled, Lowered

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.models.programs import (
    ProgramStore,
    no_garbage_collection,
    packed,
    pool_of_threads,
    source_digest,
)
from nanovllm_jax.models.step_programs import StepPrograms

logger = logging.getLogger(__name__)
PATIENCE = 60  # seconds to wait for helpers where nothing else is left to do
CONTEXT_BYTES = 1 << 30  # what a process takes of a GPU, beside what it tries matmuls on


def helpers_for(num_programs: int, free_bytes: float, tuning_bytes: int) -> int:
    """How many helpers are of use: there must be work and cores for them, and memory of the GPU.

    tuning_bytes: of the largest matmul's arrays, as XLA tries its kernels.
    """
    if getattr(sys, "frozen", False):  # sys.executable is no Python, but the user's own program
        return 0
    room = int(free_bytes // (CONTEXT_BYTES + tuning_bytes))
    return min(3, num_programs // 4, (os.cpu_count() or 1) // 4, room)


class Todo:
    """The shapes that nobody has begun, for several threads."""

    def __init__(self, shapes: list[BatchShape]):
        self._shapes, self._lock = list(shapes), Lock()

    def first(self) -> BatchShape | None:
        """Take the first one; None where there are none."""
        with self._lock:
            return self._shapes.pop(0) if self._shapes else None

    def largest(self) -> BatchShape | None:
        """Take the one with most prefill tokens, which compiles longest; None where there are none."""
        with self._lock:
            if not self._shapes:
                return None
            shape = max(self._shapes, key=lambda shape: shape.prefill_tokens)
            self._shapes.remove(shape)
            return shape

    def put_back(self, shapes: list[BatchShape]) -> None:
        """Whoever took these does not come to an end with them."""
        with self._lock:
            self._shapes += shapes


def compile_all(
    programs: StepPrograms, shapes: list[BatchShape], store: ProgramStore, num_helpers: int = 0
) -> dict[BatchShape, Compiled]:
    """Each shape's step, compiled and kept. A helper that fails, or is late, costs time and nothing else."""
    todo, done, num_helped = Todo(shapes), SimpleQueue(), 0

    def compile(shape: BatchShape, lowered: Lowered) -> Compiled:
        program = lowered.compile(programs.compiler_options(shape))
        store.save(repr(shape), program)
        return program

    def receive(shape: BatchShape, data: bytes) -> Compiled:
        program = store.unpacked(data)
        store.save(repr(shape), data)
        return program

    jobs: dict[BatchShape, Future] = {}
    with no_garbage_collection(), pool_of_threads() as pool, _helpers(programs, todo, done, num_helpers) as helpers:
        while len(jobs) < len(shapes):
            shape, data = _next(todo, done, [shape for shape in shapes if shape not in jobs])
            if shape in jobs:  # it was late, and is done already
                continue
            if data is None:  # tracing holds the interpreter, compiling does not: they go side by side
                jobs[shape] = pool.submit(compile, shape, programs.lower(shape))
            else:
                num_helped += 1
                jobs[shape] = pool.submit(receive, shape, data)
        wait(jobs.values())
    compiled = {}
    for shape, job in jobs.items():
        if error := job.exception():  # many at a time may need more processes or memory than there are
            logger.warning("%r could not be compiled beside others (%s): once more, alone", shape, error)
        compiled[shape] = compile(shape, programs.lower(shape)) if error else job.result()
    if helpers:
        logger.info("%d processes have compiled %d of %d programs", len(helpers), num_helped, len(shapes))
    if compiled and gc.isenabled():
        gc.collect()  # half a second, once: else it comes while requests run, as JAX keeps most of these objects
    return compiled


def _next(todo: Todo, done: SimpleQueue, missing: list[BatchShape]) -> tuple[BatchShape, bytes | None]:
    """What a helper has ready; else what nobody has begun; else what a helper comes up with, if it does."""
    with suppress(Empty):
        return done.get_nowait()
    if shape := todo.first():
        return shape, None
    with suppress(Empty):
        return done.get(timeout=PATIENCE)
    todo.put_back(missing[1:])
    return missing[0], None


@contextmanager
def _helpers(programs: StepPrograms, todo: Todo, done: SimpleQueue, number: int) -> Iterator[list["Helper"]]:
    """As many helpers as there are room and rights for, ended at the end."""
    helpers = []
    try:
        for _ in range(number):
            with suppress(Exception):
                helpers.append(Helper(programs, todo, done))
        yield helpers
    finally:
        for helper in helpers:
            helper.process.kill()
        for helper in helpers:
            helper.end()


class Helper(Thread):
    """A process that compiles, and the thread that talks to it: it takes from `todo` and puts into `done`."""

    def __init__(self, programs: StepPrograms, todo: Todo, done: SimpleQueue):
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
        """Hand out one shape after another, each when the one before is lowered, and take in what is compiled."""
        begun = []
        try:
            self._send(self.job)
            asks = True
            while asks or begun:
                shape, data = self._receive()
                if shape is None:  # it asks for one
                    if shape := self.todo.largest():
                        begun.append(shape)
                        self._send(shape)
                    asks = shape is not None
                else:
                    begun.remove(shape)
                    self.done.put((shape, data))
        except Exception as error:  # it has died, it has been ended, or it says so
            logger.debug("a helper process is of no use: %r", error)
            for shape in begun:
                self.done.put((shape, None))

    def _send(self, question: object) -> None:
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()

    def _receive(self) -> tuple[BatchShape | None, bytes | None]:
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
    questions, answers, lock = sys.stdin.buffer, os.fdopen(os.dup(1), "wb"), Lock()
    os.dup2(2, 1)  # whatever prints does not print into an answer
    gc.disable()

    def answer(what: tuple[BatchShape | None, bytes | None] | str) -> None:
        with lock:
            pickle.dump(what, answers)
            answers.flush()

    def compile(shape: BatchShape, lowered: Lowered) -> None:
        data = None
        with suppress(Exception):  # the other process meets what is wrong itself
            data = packed(lowered.compile(programs.compiler_options(shape)))
        answer((shape, data))

    try:
        programs = _programs_of(*pickle.load(questions))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while True:
                answer((None, None))
                shape = pickle.load(questions)
                pool.submit(compile, shape, programs.lower(shape))
    except EOFError:
        pass  # whoever asked is gone
    except Exception as error:
        answer(repr(error))


def _programs_of(source: str, version: str, values: dict, settings: tuple) -> StepPrograms:
    """What the asking process has, in this one. Raises RuntimeError where that has other modules than this one."""
    if (source, version) != (source_digest(), jax.__version__):
        raise RuntimeError(f"this is nanovllm_jax {source_digest()} and jax {jax.__version__}, not {source}, {version}")
    for name, value in values.items():
        if value != jax.config.values[name]:
            jax.config.update(name, value)
    return StepPrograms.of(settings)
