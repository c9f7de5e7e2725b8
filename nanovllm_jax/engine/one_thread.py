"""An engine is for one process and one call at a time: another thread's, or one from within, is refused."""

import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import CodeType
from typing import Any


class OneThread:
    """What the decorators below need of a class."""

    def __init__(self):
        self._process = os.getpid()
        self._at_work = threading.RLock()
        self._keeper: threading.Thread | None = None

    @property
    def is_kept(self) -> bool:
        """Whether another thread, which has not ended, keeps this to itself."""
        keeper = self._keeper
        return keeper not in (None, threading.current_thread()) and keeper.is_alive()

    def keep(self) -> bool:
        """Refuse all other threads until this one calls `let_go`, or ends; False where another one is in here."""
        if not self._at_work.acquire(blocking=False):
            return False
        try:
            if self.is_kept:
                return False
            self._keeper = threading.current_thread()
            return True
        finally:
            self._at_work.release()

    def let_go(self) -> None:
        """The end of `keep`; a second time nothing happens."""
        if self._keeper is threading.current_thread():
            self._keeper = None

    def check_process(self) -> None:
        """Raise RuntimeError in a process that was forked from the engine's own, where anything might wait forever."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this engine belongs to process {self._process}, and this process {os.getpid()} was forked from it, "
                "which JAX does not survive. Start processes by multiprocessing's 'spawn' method, and make an LLM there"
            )


def is_in_the_middle_of(code: CodeType, owner: object) -> bool:
    """Whether code with this `self` is under way in this thread, the caller's own call aside.

    The stack forgets no call, and remembers none that Ctrl-C has ended.
    """
    # This call's own frame is in no variable: it would refer to itself, and keep what all its callers hold until
    # garbage is collected.
    frame = sys._getframe().f_back.f_back
    while frame and not (frame.f_code is code and frame.f_locals["self"] is owner):
        frame = frame.f_back
    return frame is not None


def by_one_thread(method: Callable) -> Callable:
    """Raises RuntimeError where another thread is in one of the class's methods of this kind."""

    @wraps(method)
    def call(self: OneThread, *args: Any, **options: Any) -> Any:
        self.check_process()
        # Written so that Ctrl-C, wherever it comes, leaves the lock free when all calls have ended.
        try:
            if self._at_work.acquire(blocking=False) and not self.is_kept:
                return method(self, *args, **options)
        finally:
            try:  # noqa: SIM105  (Ctrl-C has no place between here and the release)
                self._at_work.release()
            except RuntimeError:  # another thread's
                pass
        raise RuntimeError(
            "another thread is using this engine, which is for one thread at a time: use AsyncLLM, made for many "
            "callers, or a lock of your own"
        )

    return call


def not_from_within(method: Callable) -> Callable:
    """`by_one_thread`, and raises RuntimeError in the middle of another such call of the same thread."""

    @by_one_thread
    @wraps(method)
    def call(self: OneThread, *args: Any, **options: Any) -> Any:
        if is_in_the_middle_of(sys._getframe().f_code, self):
            raise RuntimeError(
                f"{method.__name__}() was called in the middle of another call of this engine, by a signal's handler "
                "or a tokenizer: call it when that one has returned"
            )
        return method(self, *args, **options)

    return call
