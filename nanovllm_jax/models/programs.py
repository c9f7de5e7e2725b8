"""Compiled programs on disk: what an earlier start has left there is neither traced nor compiled again.

JAX's own compilation cache is asked with a traced program, and tracing takes a GPU engine longer than all else. Here a
program's name is a digest of everything that it is made from: this package's source, the versions of what compiles it,
the card, the engine's settings and JAX's. The files are as trustworthy as the directory: loading one runs what is in
it.
"""

import hashlib
import logging
import os
import pickle
import re
import tempfile
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled

from nanovllm_jax import kernels

logger = logging.getLogger(__name__)
# Settings of JAX that say where it keeps things and what it tells, but make no other program.
OF_NO_EFFECT = re.compile("cache|logging|_log_|explain|traceback|dump|platforms")
SOURCES = (Path(__file__).parents[1], Path(kernels.__file__).parent)  # installed, the second is in the first


class ProgramStore:
    """The programs of one engine. A file that cannot be read or written costs a compilation and nothing else."""

    def __init__(self, directory: Path | None, devices: list[jax.Device], settings: str):
        """`directory`: None keeps nothing. `settings`: all that decides what a name's program is, beside the source,
        the versions and the devices.
        """
        self.directory, self.devices, self.settings = directory, devices, settings
        of_jax = sorted(item for item in jax.config.values.items() if not OF_NO_EFFECT.search(item[0]))
        about = [source_digest(), jax.__version__, os.environ.get("XLA_FLAGS", ""), repr(of_jax), settings]
        about += [devices[0].client.platform_version, *(f"{device.device_kind} {device.id}" for device in devices)]
        self.about = about  # who has the same makes the same programs
        self._digest = hashlib.sha256("\n".join(about).encode())

    def load_all(self, names: list[Hashable]) -> dict[Hashable, Compiled]:
        """The programs of these names that are there and can be used."""
        with pool_of_threads() as pool:
            programs = dict(zip(names, pool.map(self.load, names)))
        return {name: program for name, program in programs.items() if program is not None}

    def load(self, name: Hashable) -> Compiled | None:
        """The program of this name, None where there is none that can be used."""
        path = self._path(name)
        try:
            if path is None or not path.exists():
                return None
            return self.unpacked(path.read_bytes())
        except Exception as error:  # cut short, or of a driver that has changed: the loaders raise what they like
            logger.warning("%s cannot be used (%s: %s): compiling anew", path, type(error).__name__, error)
            return None

    def save(self, name: Hashable, program: Compiled | bytes) -> None:
        """Keep a program, packed or not, whole or not at all: another engine may read at any time."""
        path = self._path(name)
        if path is None:
            return
        try:
            data = program if isinstance(program, bytes) else packed(program)
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
                part = Path(scratch) / path.name
                part.write_bytes(data)
                part.replace(path)
        except Exception as error:
            logger.warning("a compiled program cannot be kept in %s: %s", self.directory, error)

    def unpacked(self, data: bytes) -> Compiled:
        """What `packed` made bytes of, loaded on this store's devices."""
        kernels.load_runtime()
        binary, *trees = pickle.loads(data)
        trees, client = map(jax.tree.structure, trees), self.devices[0].client
        return deserialize_and_load(binary, *trees, backend=client, execution_devices=self.devices)

    def _path(self, name: Hashable) -> Path | None:
        if self.directory is None:
            return None
        digest = self._digest.copy()
        digest.update(repr(name).encode())
        return self.directory / f"{digest.hexdigest()}.program"


def packed(program: Compiled) -> bytes:
    """A program for other processes."""
    binary, *trees = serialize(program)
    # A tree's structure cannot be pickled, a tree of that structure can.
    return pickle.dumps((binary, *(jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees)))


@contextmanager
def pool_of_threads() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core. On Ctrl-C what has not begun is left."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@cache
def source_digest() -> str:
    """Of all the source that programs are made from: this package's."""
    digest = hashlib.sha256()
    for path in sorted({path for folder in SOURCES for path in folder.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()
