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
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import jax
from jax.stages import Compiled, Lowered

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.models.programs import ProgramStore, packed, pool_of_threads
from nanovllm_jax.models.step_programs import ProgramSettings, StepPrograms

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
        """Take the one with most tokens, which compiles longest; None where there are none."""
        with self._lock:
            if not self._shapes:
                return None
            shape = max(self._shapes, key=lambda shape: shape.tokens)
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
    todo, done, compiled = Todo(shapes), SimpleQueue(), {}

    def compile(shape: BatchShape, lowered: Lowered) -> Compiled:
        program = lowered.compile(programs.compiler_options(shape))
        store.save(shape, program)
        return program

    jobs: dict[BatchShape, Future] = {}
    with pool_of_threads() as pool, _helpers(num_helpers, programs, todo, done, store) as helpers:
        while missing := [shape for shape in shapes if shape not in compiled and shape not in jobs]:
            shape, program = _next(todo, done, missing)
            if program is not None:
                compiled[shape] = program
            elif shape in missing:  # else it was late, and is done already
                # Tracing holds the interpreter, compiling does not: they go side by side.
                jobs[shape] = pool.submit(compile, shape, programs.lower(shape))
        wait(jobs.values())
    if helpers:
        logger.info("%d processes have compiled %d of %d programs", len(helpers), len(compiled), len(shapes))
    for shape, job in jobs.items():
        if error := job.exception():  # many at a time may need more processes or memory than there are
            logger.warning("%r could not be compiled beside others (%s): once more, alone", shape, error)
        compiled[shape] = compile(shape, programs.lower(shape)) if error else job.result()
    return compiled


def _next(todo: Todo, done: SimpleQueue, missing: list[BatchShape]) -> tuple[BatchShape, Compiled | None]:
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
def _helpers(
    number: int, programs: StepPrograms, todo: Todo, done: SimpleQueue, store: ProgramStore
) -> Iterator[list["Helper"]]:
    """As many helpers as there are room and rights for, ended at the end."""
    helpers = []
    try:
        for _ in range(number):
            try:
                helpers.append(Helper(programs, todo, done, store))
            except Exception as error:
                logger.debug("a helper process does not start: %r", error)
        yield helpers
    finally:
        for helper in helpers:
            helper.process.kill()
        for helper in helpers:
            helper.end()


class Helper(Thread):
    """A process that compiles, and the thread that talks to it.

    From `todo` it takes shapes, into `done` it puts (shape, program), or (shape, None) for another process to compile.
    """

    def __init__(self, programs: StepPrograms, todo: Todo, done: SimpleQueue, store: ProgramStore):
        super().__init__(daemon=True)
        self.job = jax.config.values, programs.settings, store.settings, store.about
        self.todo, self.done, self.store = todo, done, store
        # It finds the same modules (-P: and none in the working directory), and takes of a GPU's memory what it needs
        # for as long as it does: XLA's own pool would keep it from the others, which would wait a minute to be refused.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if isinstance(path, str))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import be_a_helper; be_a_helper()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        )
        try:
            self.start()
        except BaseException:
            self.process.kill()
            raise

    def run(self) -> None:
        """Hand out one shape after another, each when the one before is lowered, and load and keep what is compiled."""
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
                    program = data and self.store.unpacked(data)
                    begun.remove(shape)
                    self.done.put((shape, program))
                    if data:
                        self.store.save(shape, data)
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
        with pool_of_threads() as pool:
            while True:
                answer((None, None))
                shape = pickle.load(questions)
                pool.submit(compile, shape, programs.lower(shape))
    except EOFError:
        pass  # whoever asked is gone
    except Exception as error:
        answer(repr(error))


def _programs_of(of_jax: dict, settings: ProgramSettings, of_store: str, about: list[str]) -> StepPrograms:
    """What the asking process has, in this one. Raises RuntimeError where these would be other programs than there."""
    for setting, value in of_jax.items():
        if value != jax.config.values[setting]:
            jax.config.update(setting, value)
    programs = StepPrograms.of(settings)
    here = ProgramStore(None, list(programs.mesh.devices.flat), of_store).about
    if here != about:
        raise RuntimeError(f"this process has {set(here) - set(about)}, not {set(about) - set(here)}")
    return programs
