"""LLM: what users touch."""

import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nanovllm_jax.chat import Message, chat_prompt
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.engine.door import named_each
from nanovllm_jax.engine.llm_engine import LLMEngine
from nanovllm_jax.engine.metrics import EngineMetrics
from nanovllm_jax.engine.one_thread import by_one_thread, is_in_the_middle_of
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.requests import Request
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.values import plain

ProgressBar = bool | Callable[..., tqdm]
"""Whether to show one, or what makes it, of tqdm's arguments."""


class LLM(LLMEngine):
    """A model ready to generate.

    `LLM(model, **options)`: `model` is a Hugging Face directory or Hub id, or by default a tiny Qwen3 that comes with
    the package; the options are the fields of EngineConfig, under vLLM's and nano-vllm's names.
    """

    def __init__(self, model: str | Path = TINY_MODEL, **options: Any):
        """Load the weights, size the KV cache and compile.

        Raises TypeError for unknown options, ValueError for what does not fit together or into memory, and RuntimeError
        in a forked process and where other processes, or the GPU's allocator, do not answer.
        """
        super().__init__(model, **options)
        self._alone = Alone("nothing runs", [])  # the call that has the engine for itself

    @by_one_thread
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: ProgressBar = True,
    ) -> list[RequestOutput]:
        """Complete one or many prompts, each a string, a list of token ids, or {"prompt_token_ids": [...]}.

        `sampling_params`: one for all, or one for each prompt; None takes `get_default_sampling_params()`. Returns the
        outputs in the order of the prompts. Raises TypeError or ValueError, before anything runs, when any prompt or
        setting is refused, and RuntimeError while other requests are unfinished.
        """
        self._check_idle("generate()")
        return self._run(Alone("generate() runs", self._check(prompts, sampling_params)), "Generating", use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: ProgressBar = True,
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Continue one or many conversations, each a list of messages, through the tokenizer's chat template.

        The options after `use_tqdm` are `chat_prompt`'s, and go for every conversation; the rest is as in `generate`.
        """
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"messages must be a list of messages, or a list of such lists, not {messages!r}")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        options = dict(
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
        )
        prompts = named_each("conversation", lambda c: chat_prompt(self.tokenizer, c, **options), conversations)
        return self.generate(prompts, sampling_params, use_tqdm)

    @by_one_thread
    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: str | Sequence[int] | Sequence[str | Sequence[int]],
        use_tqdm: ProgressBar = True,
    ) -> list[list[float]]:
        """Natural log probabilities of each completion's tokens, each given the prompt and the tokens before it.

        `prompts` as in `generate`, and a completion for each: a text, tokenised on its own and without special tokens,
        or token ids (of what was generated, give the ids: its text may be tokenised another way). Completions of one
        prompt share its keys and values through the prefix cache. Where logits are NaN, so are these numbers, and the
        log says so. Raises as `generate` does.
        """
        self._check_idle("score()")
        prompts, completions = _as_list(prompts), _as_list(completions, "completions")
        if len(prompts) != len(completions):
            raise ValueError(f"score() needs as many completions as prompts, not {len(completions)} for {len(prompts)}")
        requests = named_each("prompt", self.door.check_score, prompts, completions)
        self._run(Alone("score() runs", requests), "Scoring", use_tqdm)
        return [request.scores() for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Like `generate`, but an iterator of what has come: each output's texts and token_ids are increments.

        A request's last output has `finished` set (one that is aborted has no such output); its request_id tells it
        from the others, and counts up in the order of the prompts. The first `next` starts the requests, and closing
        the iterator aborts what is left of them. Until then the engine takes nothing else. Raises as `generate` does,
        at the call, and RuntimeError at the first `next` where other requests have been started since: then ask anew.
        """
        self._check_idle("stream()")
        alone = Alone("a stream() is open", self._check(prompts, sampling_params, stream=True))
        stream = self._stream(alone)
        alone.stream = weakref.ref(stream)
        return stream

    def get_tokenizer(self) -> Any | None:
        """transformers' tokenizer; None where the checkpoint has none."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What applies where no SamplingParams are given: the model's generation_config.json, else vLLM's defaults."""
        return self.default_sampling_params

    def start_request(self, request: Request) -> str:
        """LLMEngine's, and raises RuntimeError while generate(), score() or a stream() is under way: it would join."""
        self._check_alone("add_request()")
        return super().start_request(request)

    def step(self) -> list[RequestOutput]:
        """LLMEngine's, and raises RuntimeError while one of these is under way, whose outputs it would take."""
        self._check_alone("step()")
        return super().step()

    def _check_idle(self, caller: str) -> None:
        self._check_alone(caller)
        unfinished = {*self._requests, *(output.request_id for output in self._ready)}
        if unfinished:
            raise RuntimeError(
                f"{caller} needs the engine for itself, and requests from add_request() are unfinished "
                f"({len(unfinished)}): call step() until they are done, or abort_request()"
            )

    def _call_itself(self, method: Callable, *args: Any) -> Any:
        """For the call that has the engine for itself: `_check_alone` finds this on the stack and lets it pass."""
        return method(*args)

    @by_one_thread  # or it would forget another thread's call, as one that has ended
    def _check_alone(self, caller: str) -> None:
        """Raises RuntimeError in the middle of a call that has the engine for itself.

        One that has ended has left something if a second Ctrl-C came while it ended its requests: they are ended here.
        """
        if not self._alone.requests or is_in_the_middle_of(LLM._call_itself.__code__, self):
            return
        left = [request for request in self._alone.requests if self._has(request) or not request.completions]
        if (left or self._alone.stream is None) and self._alone.goes_on(self):
            raise RuntimeError(
                f"{caller} was called while {self._alone.what}, which needs the engine for itself: wait for its end, "
                "or close the stream"
            )
        self._abort(left)
        self._alone.requests = []

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            if self._has(request):
                self.abort_request(request.request_id)

    def _check(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        stream: bool = False,
    ) -> list[Request]:
        prompts = _as_list(prompts)
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need one SamplingParams or {len(prompts)}, not {len(params)}")
        return named_each("prompt", partial(self.door.check_request, stream=stream), prompts, params)

    def _stream(self, alone: "Alone") -> Generator[RequestOutput, None, None]:
        self._check_idle("stream()")  # again: time has passed since the call
        try:
            for request in alone.requests:
                self._call_itself(self.start_request, request)
                self._alone = alone  # not before the engine let it in: another thread's call may be running
            while any(map(self._has, reversed(alone.requests))):  # the last ones are most often the last to end
                yield from self._wait_and_call_itself(self.step)
        finally:
            if any(map(self._has, alone.requests)):
                self._wait_and_call_itself(self._abort, alone.requests)
            alone.requests = []

    def _wait_and_call_itself(self, method: Callable, *args: Any) -> Any:
        """Another thread may just be in here, to be told that this stream is open."""
        self.check_process()
        with self._at_work:
            return self._call_itself(method, *args)

    def _run(self, alone: "Alone", description: str, use_tqdm: ProgressBar) -> list[RequestOutput]:
        self._alone, requests, outputs = alone, alone.requests, {}
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        use_tqdm = bool(use_tqdm) and self.runner.is_first_process
        options = dict(total=len(requests), desc=description, dynamic_ncols=True, disable=not use_tqdm)
        rates = _Rates(self.metrics)
        try:
            request_ids = self._start_all(requests)
            with closing(make_bar(**options)) as bar:
                while self._requests or self._ready:
                    for output in self._call_itself(self.step):
                        outputs[output.request_id] = output
                        bar.update(1)
                    if use_tqdm and (recent := rates.recent()):
                        bar.set_postfix(recent)
                bar.set_postfix(rates.overall())
        finally:
            self._abort(requests)  # what an exception or Ctrl-C has left
            alone.requests = []
        for request_id in request_ids:
            if request_id not in outputs:  # by a signal's handler
                raise RuntimeError(f"request {request_id!r} was aborted while it ran")
        return [outputs[request_id] for request_id in request_ids]

    def _start_all(self, requests: list[Request]) -> list[str]:
        """Start requests and begin the first step, as soon as it is full: the device does not wait for all of them."""
        request_ids, num_tokens, has_begun = [], 0, not requests
        ask_at = self.runner.max_num_batched_tokens * self.runner.config.data_parallel_size
        for request in requests:
            request_ids.append(self._call_itself(self.start_request, request))
            num_tokens += len(request.token_ids)
            if num_tokens >= ask_at and not has_begun:
                ask_at *= 2  # the answer takes a look at all that wait
                if has_begun := self.scheduler.fills_a_step():
                    self._call_itself(self.step)  # which only begins it: no other request is there to have outputs
        if not has_begun:
            self._call_itself(self.step)
        return request_ids


class Alone:
    """A call that has the engine for itself: what it says of itself, and what it was asked for."""

    def __init__(self, what: str, requests: list[Request]):
        self.what, self.requests = what, requests
        self.stream: Callable[[], Generator | None] | None = None  # a weak reference to it

    def goes_on(self, llm: LLM) -> bool:
        """Whether the stream is open, or else whether this is in the middle of the engine's `_run`."""
        if self.stream is not None:
            stream = self.stream()
            return stream is not None and stream.gi_frame is not None
        return is_in_the_middle_of(LLM._run.__code__, llm)


class _Rates:
    """Prefill and decode tokens per second, for the progress bar."""

    def __init__(self, metrics: EngineMetrics):
        self.metrics = metrics
        self.start = self.last = self._now()

    def recent(self, every: float = 0.5) -> dict[str, str] | None:
        """The rates since the last call that gave any, `every` so many seconds; None in between."""
        last, now = self.last, self._now()
        if now[0] - last[0] < every:
            return None
        self.last = now
        return self._between(last, now)

    def overall(self) -> dict[str, str]:
        """The rates from start to end."""
        return self._between(self.start, self._now())

    def _now(self) -> tuple[float, int, int]:
        return time.perf_counter(), self.metrics.num_prefill_tokens, self.metrics.num_decode_tokens

    @staticmethod
    def _between(first: tuple[float, int, int], last: tuple[float, int, int]) -> dict[str, str]:
        seconds, prefill, decode = (b - a for a, b in zip(first, last))
        return {"Prefill": f"{prefill / seconds:.0f}tok/s", "Decode": f"{decode / seconds:.0f}tok/s"}


def _as_list(prompts: Prompt | Sequence[Prompt], what: str = "prompts") -> list[Prompt]:
    """One prompt or many as a list: a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = plain(prompts)
    if not isinstance(prompts, (list, tuple)):
        kinds = "a string, a dict, token ids" if what == "prompts" else "a string, token ids"
        raise TypeError(f"{what} must be {kinds} or a list of those, not {prompts!r}")
    return [list(prompts)] if prompts and isinstance(plain(prompts[0]), Integral) else list(prompts)
