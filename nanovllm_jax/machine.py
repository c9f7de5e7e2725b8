"""This machine's memory, and this process's garbage."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

GIB = 1 << 30


def host_memory() -> int:
    """Bytes in all."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def garbage_collected_at_the_end() -> Iterator[None]:
    """For what makes many objects, and hardly a cycle of them, as imports and tracing do.

    The collector would look through all of them again and again, and once more, for half a second, when they have been
    made: a start looks once, so that it is not while requests run.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            gc.collect()
