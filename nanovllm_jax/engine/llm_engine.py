"""The loop: requests in, steps through the scheduler and the device, finished outputs out."""

import logging
import random
from collections import deque
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from nanovllm_jax.checkpoints.generation_config import default_sampling_params
from nanovllm_jax.checkpoints.load import find_checkpoint
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer, stop_token_ids
from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.batch import BatchPacker, adjusts_logits
from nanovllm_jax.engine.metrics import EngineMetrics, now
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.prompts import Prompt, check_params, check_token_ids, read_prompt
from nanovllm_jax.engine.requests import Completion, Request
from nanovllm_jax.engine.scheduler import Schedule, Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.tables import token_tables
from nanovllm_jax.outputs import EngineStats, RequestMetrics, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DispatchedStep:
    """A step that the device runs or has run, and whose results were not read yet."""

    schedule: Schedule
    decode_rows: int
    output: Any
    prompts: list[tuple[Sequence, int, Any]]
    """Chunks whose request asks for the prompt's log probabilities: the index of the first, and their arrays."""


class LLMEngine:
    """Continuous batching over one model, as a loop for one's own servers and experiments:

        engine.add_request("a prompt", SamplingParams(...), stream=True)
        while engine.has_unfinished_requests():
            for output in engine.step():
                ...

    Requests may be added and aborted between any two steps, from the thread that calls `step`.
    """

    def __init__(self, model: str | Path, **options: Any):
        """Options are EngineConfig's fields.

        Raises TypeError or ValueError for options, a checkpoint or memory that do not fit together.
        """
        config = EngineConfig.from_options(**options)
        directory = find_checkpoint(model)
        self.model_config = ModelConfig.from_pretrained(directory)
        self.tokenizer = load_tokenizer(directory)
        self.eos_token_ids = stop_token_ids(directory, self.tokenizer)
        self.default_sampling_params = default_sampling_params(directory)
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
        self.metrics = EngineMetrics()
        self._requests: dict[str, Request] = {}  # the unfinished ones,
        self._streaming: list[Request] = []  # those of them whose outputs tell what came in a step,
        self._stopping: list[Completion] = []  # and the texts in which stop strings are looked for
        self._in_flight: deque[DispatchedStep] = deque()
        self._request_numbers = count()
        self._seq_ids = count()
        self._seeds = random.Random(config.seed)

    # ------------------------------------------------------------ requests

    def check_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        stream: bool = False,
    ) -> Request:
        """A request ready to be added; nothing in the engine changes.

        Raises TypeError or ValueError, naming the value, for a prompt that the engine cannot run.
        """
        metrics = RequestMetrics(arrival_time=now())
        params = self.default_sampling_params if params is None else params
        check_params(params, self.model_config.vocab_size, self.tokenizer, self.eos_token_ids)
        if request_id is not None and not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string or None, not {request_id!r}")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by a request that has not finished")
        text, tokens = read_prompt(prompt, self.tokenizer)
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one")
        tokens = check_token_ids(tokens, self.model_config.vocab_size)
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; with one generated token it must fit in max_model_len="
                f"{self.max_model_len}. Shorten it, or raise max_model_len"
            )
        tokenizer = self.tokenizer if params.detokenize else None
        return Request(request_id, text, tokens, params, tokenizer, metrics, stream)

    def check_requests(
        self, prompts: Sequence_[Prompt], params: Sequence_[SamplingParams | None], stream: bool = False
    ) -> list[Request]:
        """`check_request` for each; an exception also says which prompt it is about."""
        requests = []
        for prompt, param in zip(prompts, params, strict=True):
            try:
                requests.append(self.check_request(prompt, param, stream=stream))
            except (TypeError, ValueError) as error:
                error.add_note(f"This is prompt {len(requests)} of {len(prompts)}, counted from 0; none was started.")
                raise
        return requests

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        stream: bool = False,
    ) -> str:
        """Queue a request and return its id, a new one where none is given.

        `params`: None takes the model's own defaults. `stream`: `step` returns what came of the text in each step, and
        not all of it at the end. Raises as `check_request` does.
        """
        return self.start_request(self.check_request(prompt, params, request_id, stream))

    def start_request(self, request: Request) -> str:
        """Queue a request from `check_request` and return its id."""
        number = next(self._request_numbers)
        request.request_id = str(number) if request.request_id is None else request.request_id
        # Drawn for every request, so that one with a seed of its own does not change the others' draws.
        drawn = self._seeds.getrandbits(63)
        if request.request_id in self._requests:  # a number that a caller chose as its own id
            request.request_id = f"{number}-{drawn:08x}"
        seed = drawn if request.params.seed is None else request.params.seed
        self._requests[request.request_id] = request
        for i in range(request.params.n):
            request.add(self._start_sequence(request, (seed + i) % 2**63))
        # The first of the n computes all of the prompt, if its log probabilities are wanted.
        request.completions[0].seq.reads_prefix_cache = request.params.prompt_logprobs is None
        if request.stream:
            self._streaming.append(request)
        if request.params.stop:
            self._stopping += request.completions
        return request.request_id

    def abort_request(self, request_id: str) -> None:
        """End a request in any state; its blocks are free at once. Unknown and finished ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.metrics.aborted(request)
            request.num_unfinished = 0
            for completion in request.completions:
                self.scheduler.abort(completion.seq)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._requests or self._in_flight)

    def stats(self) -> EngineStats:
        """What runs and waits, what the caches hold, totals and rates: from the thread that calls `step`."""
        return self.metrics.stats(self.scheduler, list(self._requests.values()))

    def _start_sequence(self, request: Request, seed: int) -> Sequence:
        params, length = request.params, len(request.prompt_token_ids)
        max_len = self.max_model_len
        if params.max_tokens is not None:
            max_len = min(length + params.max_tokens, max_len)
        seq = Sequence(
            next(self._seq_ids),
            request.request_id,
            request.prompt_token_ids,
            replace(params, seed=seed),
            stop_token_ids=frozenset(params.stop_token_ids).union(() if params.ignore_eos else self.eos_token_ids),
            min_len=min(length + params.min_tokens, max_len),
            max_len=max_len,
        )
        self.scheduler.add(seq)
        return seq

    # ------------------------------------------------------------ the loop

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, then read the one before it.

        Returns the outputs of requests that finished, and of those that stream what the step brought. If the device
        fails, every request is aborted, the exception is raised, and the engine is empty again.
        """
        self.metrics.before_step()
        try:
            schedule = self.scheduler.schedule()
            if schedule:
                self._dispatch(schedule)
            # While the device runs the step just dispatched, the host reads the one before.
            finished = self._collect() if len(self._in_flight) > bool(schedule) else []
            return self._outputs(finished)
        except BaseException:
            self._in_flight.clear()
            for request_id in list(self._requests):
                self.abort_request(request_id)
            self._streaming.clear()
            self._stopping.clear()
            self.scheduler.abort_all()
            self.runner.reset()
            raise

    def _dispatch(self, schedule: Schedule) -> None:
        for seq in schedule.admitted:
            self.metrics.admitted(self._requests[seq.request_id])
            if adjusts_logits(seq.params):
                self.runner.write_tables(seq.slot, *token_tables(seq, self.model_config.vocab_size))
        shape, buffer = self.packer.pack(schedule)
        output = self.runner.dispatch(shape, buffer)
        prompts = self._score_prompts(schedule, output)
        self._in_flight.append(DispatchedStep(schedule, shape.decode_rows, output, prompts))

    def _score_prompts(self, schedule: Schedule, output: Any) -> list[tuple[Sequence, int, Any]]:
        """Start on the log probabilities of the prompt tokens that the step's chunks predict."""
        scored, row = [], 0
        for chunk in schedule.prefills:
            seq, first = chunk.seq, chunk.seq.num_computed - chunk.num_tokens
            if not seq.reads_prefix_cache:
                tokens = seq.token_ids[first + 1 : min(seq.num_computed + 1, seq.num_prompt_tokens)]
                num_top = seq.params.prompt_logprobs
                scored.append((seq, first, self.runner.prompt_logprobs(output.hidden, row, tokens, num_top)))
            row += chunk.num_tokens
        return scored

    def _collect(self) -> list[Sequence]:
        """Read the oldest dispatched step; returns the sequences that finished with it."""
        step = self._in_flight.popleft()
        schedule, finished = step.schedule, []
        for seq, first, parts in step.prompts:
            if first == len(seq.prompt_logprobs):  # else it was preempted meanwhile, and they were computed twice
                seq.prompt_logprobs += self.runner.collect_prompt_logprobs(parts)
                seq.reads_prefix_cache = len(seq.prompt_logprobs) == seq.num_prompt_tokens - 1
        rows = [*enumerate(schedule.decodes)]
        rows += [(step.decode_rows + i, chunk.seq) for i, chunk in enumerate(schedule.prefills) if chunk.samples]
        wanting = {row: seq for row, seq in rows if seq.params.logprobs is not None}
        logprobs = self.runner.collect_logprobs(step.output, list(wanting)) if wanting else None
        decodes, prefills = len(schedule.decodes), len(schedule.prefills)
        for number, tokens in enumerate(self.runner.collect(step.output)):
            for row, seq in wanting.items():
                if not seq.is_finished:
                    seq.logprobs.append(logprobs[number][row])
            prefill_tokens = tokens[step.decode_rows : step.decode_rows + prefills]
            finished += self.scheduler.update(schedule, tokens[:decodes], prefill_tokens)
            finished += self._end_at_stop_strings()
        self.metrics.num_prefill_tokens += schedule.num_tokens - decodes
        self.metrics.num_decode_tokens += decodes * schedule.num_steps
        self.metrics.after_step()
        return finished

    def _end_at_stop_strings(self) -> list[Sequence]:
        """Finish the sequences whose newest token completes a stop string."""
        ended = []
        for completion in self._stopping:
            seq = completion.seq
            if completion.read() and not seq.is_finished:
                self.scheduler.finish(seq, "stop")
                ended.append(seq)
        self._stopping = [completion for completion in self._stopping if not completion.seq.is_finished]
        return ended

    def _outputs(self, finished: list[Sequence]) -> list[RequestOutput]:
        outputs = []
        for seq in finished:
            if seq.finish_reason == "error":
                logger.warning(
                    "request %r ends with finish_reason 'error' after %d tokens: the logits are NaN or infinite",
                    seq.request_id,
                    seq.num_completion_tokens,
                )
            request = self._requests[seq.request_id]
            request.num_unfinished -= 1
            if not request.num_unfinished:
                del self._requests[seq.request_id]
                self.metrics.finished(request)
                outputs.append(request.take_output())
        self._streaming = [request for request in self._streaming if request.num_unfinished]
        return outputs + [request.take_output() for request in self._streaming if request.has_news]
