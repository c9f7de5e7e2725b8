"""The loop: requests in, steps through the scheduler and the device, finished outputs out."""

import logging
import random
from collections import deque
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm_jax.checkpoints.load import find_checkpoint
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer, stop_token_ids
from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.batch import BatchPacker
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.scheduler import Schedule, Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

Prompt = str | list[int] | dict[str, Any]


@dataclass(slots=True)
class Request:
    """A request that was checked and accepted."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams


class LLMEngine:
    """Continuous batching over one model. `add_request`, then `step` until `has_unfinished_requests()` is false."""

    def __init__(self, model: str | Path, **options: Any):
        """Options are EngineConfig's fields.

        Raises TypeError or ValueError for options, a checkpoint or memory that do not fit together.
        """
        config = EngineConfig.from_options(**options)
        directory = find_checkpoint(model)
        self.model_config = ModelConfig.from_pretrained(directory)
        self.tokenizer = load_tokenizer(directory)
        self.eos_token_ids = stop_token_ids(directory, self.tokenizer)
        self.runner = runner = ModelRunner(directory, self.model_config, config)
        self.max_model_len = runner.max_model_len
        self.scheduler = Scheduler(
            num_blocks=runner.num_blocks,
            block_size=config.block_size,
            max_num_seqs=runner.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
            max_model_len=runner.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            num_steps=runner.buckets.num_steps,
            multi_step_rows=runner.buckets.multi_step_rows,
        )
        self.packer = BatchPacker(runner.buckets)
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self._requests: dict[str, tuple[Request, Sequence]] = {}
        self._in_flight: deque[tuple[Schedule, int, Any]] = deque()
        self._seq_ids = count()
        self._seeds = random.Random(config.seed)

    # ------------------------------------------------------------ requests

    def check_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> Request:
        """A request ready to be added; nothing in the engine changes.

        Raises TypeError or ValueError, naming the value, for a prompt that the engine cannot run.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, not {params!r}")
        if request_id is not None and not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string or None, not {request_id!r}")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by a request that has not finished")
        text, tokens = self._tokenize(prompt)
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one")
        tokens = _check_token_ids(tokens, self.model_config.vocab_size)
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; with one generated token it must fit in max_model_len="
                f"{self.max_model_len}. Shorten it, or raise max_model_len"
            )
        return Request(request_id, text, tokens, params)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a request and return its id. Raises as `check_request` does."""
        return self._add(self.check_request(prompt, params, request_id))

    def add_requests(self, prompts: Sequence_[Prompt], params: Sequence_[SamplingParams | None]) -> list[str]:
        """Queue all of these requests, or, where one of them is refused, none."""
        requests = []
        for prompt, param in zip(prompts, params, strict=True):
            try:
                requests.append(self.check_request(prompt, param))
            except (TypeError, ValueError) as error:
                error.add_note(f"This is prompt {len(requests)} of {len(prompts)}, counted from 0; none was started.")
                raise
        return [self._add(request) for request in requests]

    def abort_request(self, request_id: str) -> None:
        """End a request in any state; its blocks are free at once. Unknown and finished ids are ignored."""
        _, seq = self._requests.pop(request_id, (None, None))
        if seq is not None:
            self.scheduler.abort(seq)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._requests or self._in_flight)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, where it is given as text, and its token ids."""
        key, value = None, prompt
        if isinstance(prompt, dict):
            if set(prompt) not in ({"prompt_token_ids"}, {"prompt"}):
                raise ValueError(f"a prompt dict has the key 'prompt_token_ids' or 'prompt', not {list(prompt)}")
            ((key, value),) = prompt.items()
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, str) and key != "prompt_token_ids":
            return value, self._encode(value)
        if isinstance(value, (list, tuple)) and key != "prompt":
            return None, list(value)
        raise TypeError(f'a prompt is a string, a list of token ids or {{"prompt_token_ids": [...]}}, not {prompt!r}')

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: give the prompt as a list of token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which no tokenizer takes
            raise ValueError(f"the prompt {text!r} is not valid Unicode text: {error}") from error
        return self.tokenizer.encode(text)

    def _add(self, request: Request) -> str:
        seq_id = next(self._seq_ids)
        request.request_id = str(seq_id) if request.request_id is None else request.request_id
        if request.request_id in self._requests:  # a number that a caller chose as its own id
            request.request_id = f"{seq_id}-{self._seeds.getrandbits(32):08x}"
        params = request.params
        # Drawn for every request, so that one with a seed of its own does not change the others' draws.
        drawn = self._seeds.getrandbits(63)
        seq = Sequence(
            seq_id,
            request.request_id,
            request.prompt_token_ids,
            replace(params, seed=drawn if params.seed is None else params.seed),
            stop_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
            max_len=min(len(request.prompt_token_ids) + params.max_tokens, self.max_model_len),
        )
        self.scheduler.add(seq)
        self._requests[request.request_id] = (request, seq)
        return request.request_id

    # ------------------------------------------------------------ the loop

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, then read the one before it; returns the requests that finished.

        If the device fails, every request is aborted, the exception is raised, and the engine is empty again.
        """
        try:
            schedule = self.scheduler.schedule()
            if schedule:
                self._dispatch(schedule)
            # While the device runs the step just dispatched, the host reads the one before.
            finished = self._collect() if len(self._in_flight) > bool(schedule) else []
        except BaseException:
            self._in_flight.clear()
            self._requests.clear()
            self.scheduler.abort_all()
            self.runner.reset()
            raise
        return [self._output(seq) for seq in finished]

    def _dispatch(self, schedule: Schedule) -> None:
        shape, buffer = self.packer.pack(schedule)
        self._in_flight.append((schedule, shape.decode_rows, self.runner.dispatch(shape, buffer)))
        self.num_prefill_tokens += schedule.num_tokens - len(schedule.decodes)
        self.num_decode_tokens += len(schedule.decodes) * schedule.num_steps

    def _collect(self) -> list[Sequence]:
        schedule, decode_rows, handle = self._in_flight.popleft()
        finished, decodes, prefills = [], len(schedule.decodes), len(schedule.prefills)
        for tokens in self.runner.collect(handle):
            prefill_tokens = tokens[decode_rows : decode_rows + prefills]
            finished += self.scheduler.update(schedule, tokens[:decodes], prefill_tokens)
        return finished

    def _output(self, seq: Sequence) -> RequestOutput:
        request, _ = self._requests.pop(seq.request_id)
        tokens = seq.completion_token_ids
        shown = tokens[:-1] if seq.finish_reason == "stop" else tokens
        text = self.tokenizer.decode(shown, skip_special_tokens=True) if self.tokenizer else ""
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput(0, text, tokens, seq.finish_reason)],
            num_cached_tokens=seq.num_cached_tokens,
        )


def _check_token_ids(tokens: list, vocab_size: int) -> list[int]:
    """Python integers, all in the vocabulary. A prompt may have 100,000: the good ones never meet a Python loop."""
    if set(map(type, tokens)) != {int}:
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise TypeError(f"prompt token ids must be integers, not {token!r}")
        tokens = list(map(int, tokens))  # NumPy's
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise ValueError(f"prompt token id {wrong} is not in the vocabulary: 0 to {vocab_size - 1}")
    return tokens
