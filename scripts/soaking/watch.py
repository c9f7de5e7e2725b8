"""What a long run must not do: compile, and grow."""

import ctypes
import gc
import os
from pathlib import Path

import jax
import numpy as np

# The C library keeps what was freed, in pieces, and these pile up for a long while: that is no leak.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: _compiled.append(event) if "backend_compile" in event else None
)


def num_compiles() -> int:
    """Programs that XLA has compiled, or read from the cache on disk, in this process."""
    return len(_compiled)


class Memory:
    """This process' own memory on the host over the requests done.

    What it shares with the system does not count: a GPU's pinned memory lies there, of which JAX takes a piece twice as
    large as the last when it runs out.
    """

    def __init__(self):
        self.samples: list[tuple[int, int]] = []

    def sample(self, requests: int) -> None:
        gc.collect()
        _trim(0)
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        self.samples.append((requests, (resident - shared) * os.sysconf("SC_PAGE_SIZE")))

    @property
    def now(self) -> int:
        """KiB at the last sample."""
        return self.samples[-1][1] // 1024

    def slope(self) -> float | None:
        """KiB for 1000 requests, in a typical round of the second half; None with fewer than four samples there.

        The fifth of the rounds that grew most, and that which grew least, are left out: a leak grows in all, but a
        buffer that becomes larger once and for all in one.
        """
        half = np.array(self.samples[len(self.samples) // 2 :], float).reshape(-1, 2)
        if len(half) < 4:
            return None
        requests, size = np.diff(half, axis=0).T
        growth, out = np.sort(size / requests), len(requests) // 5
        return float(growth[out : len(growth) - out].mean()) * 1000 / 1024
