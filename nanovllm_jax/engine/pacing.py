"""When the next step is to be chosen: just before the device is done with the last, so that who comes is in it."""

import time
from collections import deque
from collections.abc import Callable

from nanovllm_jax.engine.batch import BatchShape

RECENT = 16  # steps: of these the one that took the host longest tells how early to choose the next,
MARGIN = 5e-4  # and so many seconds earlier
PAUSE = 5e-4  # seconds in which a loop that waits looks for nobody


class Pacer:
    """How long the device will still be at work, if a step of a shape takes as long as the last one of that shape."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._host = deque([0.0], RECENT)  # seconds in which it came round to the last steps, chose and dispatched them
        self._due: float | None = None  # when the next is to be chosen, where a loop waits for that
        self._took: dict[BatchShape, float] = {}  # seconds of the device's last step of each shape
        self._free_since = 0.0  # when the device was done with the last step that was read

    def dispatched(self, chosen_at: float) -> None:
        """A step that the host began to choose then is on its way.

        Where it was to choose earlier, and other threads had kept it, that counts as well.
        """
        self._host.append(self.clock() - min(chosen_at, self._due or chosen_at))

    def read(self, shape: BatchShape, dispatched_at: float, was_done: bool) -> None:
        """A step has just been waited for; or it `was_done` already, and nobody knows since when."""
        now = self.clock()
        took = now - self._start(dispatched_at)
        if not was_done or took < self._took.get(shape, 0):
            self._took[shape] = took
        self._free_since, self._due = now, None

    def spare(self, shape: BatchShape, dispatched_at: float) -> float:
        """Seconds until the next step is to be chosen, where this one is the only one on the device."""
        done_at = self._start(dispatched_at) + self._took.get(shape, 0)
        due, now = done_at - max(self._host) - MARGIN, self.clock()
        if due > now:
            self._due = due
        return max(0.0, due - now)

    def _start(self, dispatched_at: float) -> float:
        return max(dispatched_at, self._free_since)
