"""Compiled programs on disk: what an earlier start has left there is neither traced nor compiled again.

JAX's own compilation cache is asked with a traced program, and tracing takes a GPU engine longer than all else. Here a
program's name is a digest of everything that it is made from: this package's source, the versions of what compiles it,
the card, the engine's settings and JAX's. The files are as trustworthy as the directory: loading one runs what is in
it.
"""

import gc
import hashlib
import logging
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled, Lowered

from nanovllm_jax.kernels import load_runtime

logger = logging.getLogger(__name__)
# Settings of JAX that say where it keeps things and what it tells, but make no other program.
OF_NO_EFFECT = re.compile("cache|logging|_log_|explain|traceback|dump|platforms")
SOURCES = (Path(__file__).parents[1], Path(__file__).parents[2] / "kernels")


class ProgramStore:
    """The programs of one engine. A file that cannot be read or written costs a compilation and nothing else."""

    def __init__(self, directory: Path | None, devices: list[jax.Device], settings: str):
        """`directory`: None keeps nothing. `settings`: all that decides what a name's program is, beside the source,
        the versions and the devices.
        """
        self.directory, self.devices = directory, devices
        of_jax = sorted(item for item in jax.config.values.items() if not OF_NO_EFFECT.search(item[0]))
        about = [source_digest(), jax.__version__, os.environ.get("XLA_FLAGS", ""), repr(of_jax), settings]
        about += [devices[0].client.platform_version, *(f"{device.device_kind} {device.id}" for device in devices)]
        self._digest = hashlib.sha256("\n".join(about).encode())

    def load_all(self, names: list[Hashable]) -> dict[Hashable, Compiled]:
        """The programs of these names that are there and can be used."""
        with _pool() as pool, _no_garbage_collection():
            programs = dict(zip(names, pool.map(self.load, map(repr, names))))
        return {name: program for name, program in programs.items() if program is not None}

    def compile_all(
        self, lowered: Iterable[tuple[Hashable, Lowered]], options: Callable[[Any], dict[str, Any]]
    ) -> dict[Hashable, Compiled]:
        """Each name's program, compiled with its XLA options and kept."""

        def compile(name: Hashable, program: Lowered) -> Compiled:
            compiled = program.compile(options(name))
            self.save(repr(name), compiled)
            return compiled

        programs, jobs = {}, {}
        with _pool() as pool, _no_garbage_collection():
            for name, program in lowered:  # tracing holds the interpreter, compiling does not: they go side by side
                jobs[name] = program, pool.submit(compile, name, program)
            wait([job for _, job in jobs.values()])
        for name, (program, job) in jobs.items():
            if error := job.exception():  # many at a time may need more processes or memory than there are
                logger.warning("%r could not be compiled beside others (%s): once more, alone", name, error)
            programs[name] = compile(name, program) if error else job.result()
        if programs and gc.isenabled():
            gc.collect()  # half a second, once: else it comes while requests run, as JAX keeps most of these objects
        return programs

    def load(self, name: str) -> Compiled | None:
        """The program of this name, None where there is none that can be used."""
        path = self._path(name)
        try:
            if path is None or not path.exists():
                return None
            load_runtime()
            binary, *trees = pickle.loads(path.read_bytes())
            trees = map(jax.tree.structure, trees)
            client = self.devices[0].client
            return deserialize_and_load(binary, *trees, backend=client, execution_devices=self.devices)
        except Exception as error:  # cut short, or of a driver that has changed: the loaders raise what they like
            logger.warning("%s cannot be used (%s: %s): compiling anew", path, type(error).__name__, error)
            return None

    def save(self, name: str, program: Compiled) -> None:
        """Keep a program, whole or not at all: another engine may read at any time."""
        path = self._path(name)
        if path is None:
            return
        try:
            binary, *trees = serialize(program)
            # A tree's structure cannot be pickled, a tree of that structure can.
            trees = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees]
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
                part = Path(scratch) / path.name
                part.write_bytes(pickle.dumps((binary, *trees)))
                part.replace(path)
        except Exception as error:
            logger.warning("a compiled program cannot be kept in %s: %s", self.directory, error)

    def _path(self, name: str) -> Path | None:
        if self.directory is None:
            return None
        digest = self._digest.copy()
        digest.update(name.encode())
        return self.directory / f"{digest.hexdigest()}.program"


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core. On Ctrl-C what has not begun is left."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes many objects and hardly a cycle of them, yet the collector looks through all, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def source_digest() -> str:
    """Of all the source that programs are made from: this package's."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
