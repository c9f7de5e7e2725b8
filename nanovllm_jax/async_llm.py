"""AsyncLLM: many callers in one event loop."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.engine.llm_engine import LLMEngine
from nanovllm_jax.engine.metrics import now
from nanovllm_jax.engine.pacing import PAUSE
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.requests import Request
from nanovllm_jax.outputs import EngineStats, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


class Mailbox:
    """What has come for one caller: a single output, however long the caller does not look."""

    def __init__(self, lock: threading.Lock):
        self.request_id: str | None = None
        self.is_over = False  # the last output was taken,
        self.is_left = False  # or the caller is gone
        self._lock = lock
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._news: asyncio.Future | None = None  # made, set and waited for in the event loop alone

    def put(self, output: RequestOutput) -> None:
        """Join increments with those that nobody has taken; under the lock."""
        if self._output is None:
            self._output = output
        else:
            self._output.add(output)

    def fail(self, reason: str, cause: BaseException | None) -> None:
        """Raise at the caller, once it has taken what came."""
        self._error = RuntimeError(reason)
        self._error.__cause__ = cause

    def wake(self) -> None:
        """In the event loop: let the caller look again."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def take(self) -> RequestOutput:
        """Wait for an output, or for the end with an exception."""
        while True:
            error = self._error  # looked at first, as what came before it is taken first
            if self._output is not None:
                break
            if error is not None:
                raise error
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        with self._lock:
            output, self._output = self._output, None
        self.is_over = output.finished
        return output


class AsyncLLM:
    """A model that generates for many callers in one event loop:

        async with AsyncLLM(model, **options) as llm:
            async for output in llm.generate("a prompt", SamplingParams(...)):
                ...

    One thread owns the engine. It makes steps while there are requests, and between two steps whatever the event loop
    asks of it, in order. Only what it reads comes back: a caller that is slow or has stopped holds up nobody.
    """

    def __init__(self, model: str | Path | LLMEngine = TINY_MODEL, **options: Any):
        """`model` and options are LLM's; or `model` is an engine, which nobody else can use until `shutdown`.

        Loads and compiles before it returns: in a running event loop, call it through asyncio.to_thread. Raises as LLM
        does, and ValueError for an engine with requests or options beside it, and for several processes.
        """
        if isinstance(model, LLMEngine):
            if options or model._requests or model._ready:  # a last step in flight has no request
                raise ValueError("an engine is taken as it is: without options, and with no request under way")
            self._engine = model
        else:
            self._engine = LLMEngine(model, **options)
        if self._engine.runner.num_processes > 1:
            raise ValueError(
                "AsyncLLM runs in one process: several must all ask the same, in the same order, of an LLM"
            )
        self.tokenizer = self._engine.tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="AsyncLLM")
        if not self._thread.submit(self._engine.keep).result():
            raise ValueError("this engine is at work for another thread, or for another AsyncLLM")
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first call
        self._is_shut_down = False
        self._mailboxes: dict[str, Mailbox] = {}  # of unfinished requests, by id: the thread's
        self._is_stepping = False  # whether a step waits for its turn: the thread's
        self._lock = threading.Lock()
        self._fresh: set[Mailbox] = set()  # with news, for the event loop to wake their callers; under the lock

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt, as `add_request` takes it: an output for each increment, or one for all if not `stream`.

        Increments that come faster than the caller takes them are joined. A caller that is cancelled, or closes the
        generator, aborts its request. Raises TypeError or ValueError for a bad request, as LLM.generate does, and
        RuntimeError if the engine fails, is shut down, or is used from a second event loop.
        """
        check = partial(self._engine.check_request, prompt, sampling_params, request_id, stream)
        async with self._started(check) as (_, mailbox):
            while not mailbox.is_over:
                yield await mailbox.take()

    async def score(self, prompt: Prompt, completion: str | Sequence[int]) -> list[float]:
        """Natural log probabilities of a completion's tokens, each given the prompt and the tokens before it.

        As LLM.score's of one pair; many callers' pairs share steps. Raises as `generate` does.
        """
        async with self._started(partial(self._engine.door.check_score, prompt, completion)) as (request, mailbox):
            await mailbox.take()
        return request.scores()

    async def update_weights(
        self, weights: Any, in_flight: Literal["finish", "recompute"] | None = None, donate: bool = False
    ) -> None:
        """Go on with other weights, between two steps: LLM.update_weights, by which `in_flight` goes for all callers.

        While requests "finish", their callers have what comes, and may leave; all else waits for the end of that.
        Raises as that does, and leaves everybody's requests as they are; a device that fails meanwhile ends them.
        """
        await self._call(self._tell_if_it_fails, self._update_weights, weights, in_flight, donate)

    async def stats(self) -> EngineStats:
        """The engine's `stats`, between two of its steps."""
        return await self._call(self._engine.stats)

    def shutdown(self) -> None:
        """Abort all requests, whose callers get a RuntimeError, and end the thread, once its step is over.

        From any thread; a second call does nothing. To give back the memory, drop the object too.
        """
        self._is_shut_down = True
        with suppress(RuntimeError):  # the thread has ended, or does after the one that another call has submitted
            self._thread.submit(self._finish)
        self._thread.shutdown()

    async def __aenter__(self) -> "AsyncLLM":
        self._check_usable()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)

    # ------------------------------------------------------------ in the event loop

    def _check_usable(self) -> None:
        self._engine.check_process()
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        self._check_open()
        if self._loop is not loop:
            raise RuntimeError("this AsyncLLM belongs to another event loop, the first that used it: make a new one")

    def _check_open(self) -> None:
        if self._is_shut_down:
            raise RuntimeError("this AsyncLLM was shut down: make a new one")

    @asynccontextmanager
    async def _started(self, check: Callable[[], Request]) -> AsyncGenerator[tuple[Request, Mailbox], None]:
        """A request from `check`, under way in the engine, and its mailbox; left before its end, it is aborted."""
        arrival, mailbox = now(), Mailbox(self._lock)
        try:
            yield await self._call(self._start, mailbox, arrival, check), mailbox
        finally:
            if not mailbox.is_over:
                mailbox.is_left = True
                with suppress(RuntimeError):  # the thread has ended
                    self._thread.submit(self._abort, mailbox)

    async def _call(self, function: Callable, *args: Any) -> Any:
        """Call a function in the engine's thread; if the caller is cancelled before its turn, it is not called."""
        self._check_usable()
        return await asyncio.wrap_future(self._thread.submit(function, *args))

    def _wake(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, set()
        for mailbox in fresh:
            mailbox.wake()

    # ------------------------------------------------------------ in the engine's thread

    def _start(self, mailbox: Mailbox, arrival: float, check: Callable[[], Request]) -> Request:
        self._check_open()
        request = check()
        request.metrics.arrival_time = arrival
        mailbox.request_id = self._tell_if_it_fails(self._engine.start_request, request)
        self._mailboxes[mailbox.request_id] = mailbox
        self._keep_stepping()
        return request

    def _update_weights(self, weights: Any, in_flight: str | None, donate: bool) -> None:
        self._engine.check_update(weights, in_flight, donate)
        while in_flight == "finish" and self._mailboxes:
            self._check_open()
            self._deliver(self._engine.step())
            for mailbox in [mailbox for mailbox in self._mailboxes.values() if mailbox.is_left]:
                self._abort(mailbox)
        self._engine.update_weights(weights, in_flight, donate)

    def _tell_if_it_fails(self, function: Callable, *args: Any) -> Any:
        """Call what may leave the engine empty where it fails: then all callers are to know."""
        try:
            return function(*args)
        except BaseException as error:
            if not all(map(self._engine.knows, self._mailboxes)):
                self._abort_all("the engine failed, and all its requests were aborted", error)
            raise

    def _abort(self, mailbox: Mailbox) -> None:
        if self._mailboxes.get(mailbox.request_id) is mailbox:  # else it has ended, or never began
            del self._mailboxes[mailbox.request_id]
            self._engine.abort_request(mailbox.request_id)

    def _keep_stepping(self) -> None:
        if not self._is_stepping and not self._is_shut_down and self._engine.has_unfinished_requests():
            with suppress(RuntimeError):  # shut down a moment ago: `_finish` comes next
                self._thread.submit(self._step)
                self._is_stepping = True

    def _step(self) -> None:
        """A step, once it cannot be put off for who may come; and behind all that waits for the thread, the next."""
        self._is_stepping = False
        try:
            if spare := self._engine.spare_seconds():
                time.sleep(min(spare, PAUSE))
            else:
                self._deliver(self._engine.step())
            self._keep_stepping()
        except BaseException as error:
            self._abort_all("the engine failed, and all its requests were aborted", error)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        mailboxes = {output.request_id: self._mailboxes[output.request_id] for output in outputs}
        ended = [output.request_id for output in outputs if output.finished]  # before increments are joined
        with self._lock:
            for output in outputs:
                mailboxes[output.request_id].put(output)
        self._tell(mailboxes.values())
        for request_id in ended:
            del self._mailboxes[request_id]

    def _abort_all(self, reason: str, cause: BaseException | None = None) -> None:
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(reason, cause)
        with suppress(RuntimeError):  # the event loop was closed, and so nobody waits
            self._tell(mailboxes.values())
        for request_id in mailboxes:
            self._engine.abort_request(request_id)

    def _finish(self) -> None:
        try:
            self._abort_all("this AsyncLLM was shut down while the request was under way")
            with suppress(Exception):  # of a device that fails, when nobody waits for it any more
                while self._engine.has_unfinished_requests():  # steps that were dispatched
                    self._engine.step()
        finally:
            self._engine.let_go()

    def _tell(self, mailboxes: Iterable[Mailbox]) -> None:
        """Have the event loop wake these callers: with one message, however many steps it does not come to it."""
        with self._lock:
            is_told = bool(self._fresh)
            self._fresh.update(mailboxes)
            if self._fresh and not is_told:
                self._loop.call_soon_threadsafe(self._wake)
