"""What a long run must not do: compile, and grow."""

import ctypes
import gc
import os
from pathlib import Path

import jax
import numpy as np


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


_mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo is not None:
    _mallinfo.restype = _MallInfo

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: _compiled.append(event) if "backend_compile" in event else None
)


def num_compiles() -> int:
    """Programs that XLA has compiled, or read from the cache on disk, in this process."""
    return len(_compiled)


def allocated() -> int:
    """Bytes that this process has of the C library and has not given back; with PYTHONMALLOC=malloc Python's, too.

    What is resident tells less: the C library keeps what was freed, in pieces that pile up for a long while, and JAX
    takes a piece of pinned memory twice as large as the last when it runs out.
    """
    if _mallinfo is None:
        return resident()
    info = _mallinfo()
    return info.uordblks + info.hblkhd


def resident() -> int:
    """Bytes of this process that are in memory, and that it does not share."""
    _, pages, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE")


class Memory:
    """This process' memory on the host over the requests done."""

    def __init__(self):
        self.samples: list[tuple[int, int]] = []
        self.resident = 0

    def sample(self, requests: int) -> None:
        gc.collect()
        self.samples.append((requests, allocated()))
        self.resident = resident()

    def __str__(self) -> str:
        return f"{self.samples[-1][1] // 1024:,}, {self.resident // 1024:,} KiB" if self.samples else "not measured"

    def slope(self) -> float | None:
        """KiB allocated for 1000 requests, in a typical round of the second half; None with under four samples there.

        The fifth of the rounds that grew most, and that which grew least, are left out: a leak grows in all, but a
        buffer that becomes larger once and for all in one.
        """
        half = np.array(self.samples[len(self.samples) // 2 :], float).reshape(-1, 2)
        if len(half) < 4:
            return None
        requests, size = np.diff(half, axis=0).T
        growth, out = np.sort(size / requests), len(requests) // 5
        return float(growth[out : len(growth) - out].mean()) * 1000 / 1024
