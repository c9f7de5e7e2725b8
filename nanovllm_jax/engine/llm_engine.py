"""The loop: requests in, steps through the scheduler and the device, finished outputs out."""

import logging
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from nanovllm_jax.checkpoints.generation_config import default_sampling_params
from nanovllm_jax.checkpoints.load import find_checkpoint
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer, stop_token_ids, tokenizer_class
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.data_groups import DataGroups, GroupPacker
from nanovllm_jax.engine.dispatch import DispatchedStep, dispatch
from nanovllm_jax.engine.door import Door
from nanovllm_jax.engine.metrics import EngineMetrics
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.one_thread import OneThread, not_from_within
from nanovllm_jax.engine.pacing import Pacer
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.prompts import Prompt
from nanovllm_jax.engine.requests import Completion, Request
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.engine.tables import token_tables
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.machine import garbage_collected_at_the_end
from nanovllm_jax.outputs import EngineStats, RequestOutput
from nanovllm_jax.parallel.backend import prepare_backend
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.sampling_rows import adjusts_logits
from nanovllm_jax.values import check_switch

logger = logging.getLogger(__name__)


class LLMEngine(OneThread):
    """Continuous batching over one model, as a loop for one's own servers and experiments:

        engine.add_request("a prompt", SamplingParams(...), stream=True)
        while engine.has_unfinished_requests():
            for output in engine.step():
                ...

    Requests may be added and aborted between any two steps, from any thread; while one is at work in here, others are
    refused by a RuntimeError, and so is a signal's handler.
    """

    @garbage_collected_at_the_end()
    def __init__(self, model: str | Path, **options: Any):
        """Options are EngineConfig's fields.

        Raises TypeError or ValueError for options, a checkpoint or memory that do not fit together, and RuntimeError in
        a forked process and where other processes, or the GPU's allocator, do not answer.
        """
        super().__init__()
        config = EngineConfig.from_options(**options)
        directory = find_checkpoint(model)
        prepare_backend(config)
        self.model_config = ModelConfig.from_pretrained(directory)
        self.default_sampling_params = default_sampling_params(directory)
        self.eos_token_ids = stop_token_ids(directory)
        tokenizer_class(directory)  # refuses at once what it can tell without transformers
        with ThreadPoolExecutor(1) as thread:  # importing transformers takes a second, and with torch, as some do, six
            loading = thread.submit(load_tokenizer, directory)
            self.runner = runner = ModelRunner(directory, self.model_config, config)
            self.tokenizer = loading.result()
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self.eos_token_ids |= {self.tokenizer.eos_token_id}
        runner.check_agreement([sorted(self.eos_token_ids)])  # by which sequences end
        self.max_model_len = runner.max_model_len
        self.door = Door(
            self.model_config.vocab_size,
            self.max_model_len,
            self.tokenizer,
            self.eos_token_ids,
            self.default_sampling_params,
            config.probe,
        )
        make_scheduler = partial(
            Scheduler,
            num_blocks=runner.num_blocks,
            block_size=config.block_size,
            max_num_seqs=runner.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
            max_model_len=runner.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            run_ahead=runner.buckets.run_ahead,
        )
        groups = config.data_parallel_size
        if groups == 1:
            self.scheduler = make_scheduler(fitting=runner.buckets.fitting)
            self.packer = BatchPacker(runner.buckets)
        else:  # whose steps share a size
            self.scheduler, self.packer = DataGroups(groups, make_scheduler), GroupPacker(groups, runner.buckets)
        self.metrics, self.pacer = EngineMetrics(), Pacer()
        self._requests: dict[str, Request] = {}  # the unfinished ones,
        self._streaming: list[Request] = []  # those of them whose outputs tell what came in a step,
        self._stopping: list[Completion] = []  # and the texts in which stop strings are looked for
        self._in_flight: deque[DispatchedStep] = deque()
        self._ready: list[RequestOutput] = []  # for the next `step` to return
        self._request_numbers = count()
        self._seq_ids = count()
        self._seeds = random.Random(config.seed % 2**64)  # it takes -5 for 5
        self._calls: list[tuple] = []  # in several processes: what was asked since the last step
        self._is_broken = False  # something is half done, or was when an exception came

    # ------------------------------------------------------------ requests

    def check_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        stream: bool = False,
    ) -> Request:
        """A request ready to be started; nothing in the engine changes.

        Raises TypeError or ValueError, naming the value, for what the engine cannot run, and for an id in use.
        """
        request = self.door.check_request(prompt, params, request_id, stream)
        self._check_id(request_id)
        return request

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

    @not_from_within
    def start_request(self, request: Request) -> str:
        """Queue a request from `check_request` and return its id.

        Raises ValueError for one that was started before and for an id in use, and RuntimeError in a forked process,
        and where the device's memory cannot be had back after a failure.
        """
        if request.completions:
            raise ValueError(f"request {request.request_id!r} was started before: make another one by check_request()")
        self._check_id(request.request_id)
        self._check_usable()
        self.runner.weights.check_whole()
        with self._all_or_nothing():
            return self._start(request)

    def _start(self, request: Request) -> str:
        number = next(self._request_numbers)
        request.request_id = str(number) if request.request_id is None else request.request_id
        # Drawn for every request, so that one with a seed of its own does not change the others' draws.
        drawn = self._seeds.getrandbits(63)
        if self.knows(request.request_id):  # a number that a caller chose as its own id
            request.request_id = f"{number}-{drawn:08x}"
        seed = drawn if request.params.seed is None else request.params.seed
        self._requests[request.request_id] = request
        if self.runner.num_processes > 1:
            self._calls.append((request.request_id, seed, request.token_ids, request.params, request.scored))
        for i in range(request.params.n):
            own = next(self._seq_ids), (seed + i) % 2**63
            seq = request.new_sequence(*own, self.eos_token_ids, self.max_model_len)
            request.add(seq)  # before the scheduler looks at what is wanted of it
            self.scheduler.add(seq)
        if request.stream:
            self._streaming.append(request)
        if request.params.stop:
            self._stopping += request.completions
        return request.request_id

    @not_from_within
    def abort_request(self, request_id: str) -> None:
        """End a request in any state; its blocks are free at once. Unknown and finished ids are ignored.

        Raises TypeError for what is no id.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, that of one request, not {request_id!r}")
        self._clear_up()
        self._ready = [output for output in self._ready if output.request_id != request_id]
        request = self._requests.get(request_id)
        if request is None:
            return
        with self._all_or_nothing():
            if self.runner.num_processes > 1:
                self._calls.append(("abort", request_id))
            for completion in request.completions:
                self.scheduler.finish(completion.seq, "abort")
            request.num_unfinished = 0
            self.metrics.aborted(request)
            del self._requests[request_id]

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._requests or self._in_flight or self._ready)

    def knows(self, request_id: str | None) -> bool:
        """Whether this is a request that is unfinished, or has outputs that the next `step` returns."""
        return request_id in self._requests or any(output.request_id == request_id for output in self._ready)

    def _has(self, request: Request) -> bool:
        """Whether `knows` speaks of this very request: after its end another may have its id."""
        is_ready = any(output.metrics is request.metrics for output in self._ready)
        return is_ready or self._requests.get(request.request_id) is request

    @not_from_within
    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, as between two runs of a benchmark.

        Raises RuntimeError while requests are unfinished: they hold blocks.
        """
        self._check_usable()
        if self._requests:
            raise RuntimeError(
                f"the prefix cache cannot be reset while {len(self._requests)} requests are unfinished: let them "
                "finish, or abort them"
            )
        if self.runner.num_processes > 1:
            self._calls.append(("reset_prefix_cache",))
        self.scheduler.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """What runs and waits, what the caches hold, totals and rates: from the thread that calls `step`."""
        return self.metrics.stats(self.scheduler, list(self._requests.values()))

    def _check_id(self, request_id: str | None) -> None:
        if self.knows(request_id):
            raise ValueError(f"request_id {request_id!r} is in use by a request that has not finished")

    # ------------------------------------------------------------ the loop

    @not_from_within
    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, then read the one before it.

        Returns the outputs of requests that finished, and of those that stream what the step brought. If the device
        fails, every request is aborted, the exception is raised, and the engine is empty again.
        """
        outputs = self._step()
        outputs, self._ready = self._ready + outputs, []
        return outputs

    def spare_seconds(self) -> float:
        """For how long `step` can be put off, and the device still find the next step in time.

        A step that is chosen has no place for who comes after. So a loop to which requests come waits for them until
        this says 0, looking again every half a millisecond or so, and then calls `step`. From the thread that does.
        Always 0 on a CPU, where the host's work and the device's are one.
        """
        if self._ready or not self._in_flight or not self.runner.on_gpu:
            return 0.0
        step = self._in_flight[-1]
        return 0.0 if self.runner.is_done(step.output) else self.pacer.spare(step.shape, step.dispatched_at)

    def _step(self) -> list[RequestOutput]:
        self._check_usable()
        self.metrics.before_step()
        try:
            with self._all_or_nothing():
                return self._outputs(self._advance())
        except BaseException as error:
            if self.runner.num_processes > 1:
                error.add_note("Several processes run this engine: another one may have ended, which its output shows.")
            raise

    def _advance(self) -> list[Sequence]:
        """One step further; returns the sequences that finished."""
        if self._calls:
            self.runner.check_agreement(self._calls)
            self._calls.clear()
        chosen_at = self.pacer.clock()
        schedule = self.scheduler.schedule()
        if schedule:
            self._dispatch(schedule)
            self.pacer.dispatched(chosen_at)
        # While the device runs the step just dispatched, the host reads the one before.
        return self._collect() if len(self._in_flight) > bool(schedule) else []

    def _dispatch(self, schedule: Schedule) -> None:
        for seq in schedule.admitted:
            self.metrics.admitted(self._requests[seq.request_id])
            if adjusts_logits(seq.params):
                tables = token_tables(seq, self.eos_token_ids, self.model_config.vocab_size)
                self.runner.write_tables(seq.group, seq.slot, *tables)
            if self.runner.config.probe:
                self.runner.write_steering(seq.slot, seq.params.steering)
        self._in_flight.append(dispatch(schedule, self.packer, self.runner))

    def _collect(self) -> list[Sequence]:
        """Read the oldest dispatched step; returns the sequences that finished with it."""
        step = self._in_flight.popleft()
        schedule, finished = step.schedule, []
        was_done = self.runner.is_done(step.output)
        self.runner.wait(step.output)
        self.pacer.read(step.shape, step.dispatched_at, was_done)
        for drawn in step.read(self.runner):
            finished += self.scheduler.update(schedule, *drawn)
            finished += self._end_at_stop_strings()
        self.metrics.num_prefill_tokens += schedule.num_prefill_tokens
        self.metrics.num_decode_tokens += len(schedule.decodes) * schedule.num_steps
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

    # ------------------------------------------------------------ weights

    @property
    def model(self) -> Any:
        """The Qwen3ForCausalLM that is served. Its arrays are the engine's own: to be read, and never donated."""
        return self.runner.weights.model

    @not_from_within
    def update_weights(
        self, weights: Any, in_flight: Literal["finish", "recompute"] | None = None, donate: bool = False
    ) -> None:
        """Go on with other weights, from the next step on; nothing is compiled anew, and cached prefixes are dropped.

        `weights`: a Qwen3ForCausalLM, or a dict of all its arrays by path (models/parameters.py), of any float dtype
        and on any devices; with more devices than kv heads a dict has their copies (`with_heads`). An array with the
        engine's own dtype and sharding is shared, not copied: the engine fails if a jitted function donates it later,
        unless other weights have come in meanwhile. Others are cast and moved one by one. `donate`: the engine may take
        the memory of `weights`, which are of no use to the caller afterwards.

        `in_flight` says what becomes of unfinished requests. "finish": they are run to their end on the old weights,
        and the next `step` returns their outputs. "recompute": they keep their tokens, and go on from them with the
        new weights, by which all their keys and values are computed again.

        Each of several processes gives the same: NumPy arrays and arrays of its own devices whole, of which it takes
        its part, or arrays that are spread over the devices of all.

        Raises TypeError or ValueError, naming the array, for weights that do not fit, and RuntimeError with unfinished
        requests and no `in_flight`, and for other weights than another process has: the engine is then as it was.
        """
        with self._refusal_is_told():
            arrays = self.check_update(weights, in_flight, donate)
        if self.runner.num_processes > 1:
            self.runner.check_agreement([*self._calls, in_flight], arrays)
        while self._requests and in_flight == "finish":
            self._ready += self._step()
        with self._all_or_nothing():  # there may be no memory for the next array: nothing may run on what is half new
            self.scheduler.preempt_all()  # what dispatched steps have drawn will still be read
            for request in self._requests.values():
                request.read_prompt_again()
            self.runner.weights.update(arrays, donate)

    def check_update(self, weights: Any, in_flight: str | None, donate: bool) -> Any:
        """The arrays of an update. Raises as `update_weights` does in this process, and changes nothing."""
        if in_flight not in (None, "finish", "recompute"):
            raise ValueError(f"in_flight must be None, 'finish' or 'recompute', not {in_flight!r}")
        check_switch("donate", donate)
        self._check_usable()
        arrays = self.runner.weights.check(weights)
        if self._requests and in_flight is None:
            raise RuntimeError(
                f"{len(self._requests)} requests are unfinished: say what becomes of them, by in_flight='finish' (they "
                "are run to their end on the old weights) or in_flight='recompute' (they go on with the new ones)"
            )
        return arrays

    @contextmanager
    def _refusal_is_told(self) -> Iterator[None]:
        """To the other processes, which wait for this one's word, and go on without the weights as well."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            if self.runner.num_processes > 1:
                with suppress(RuntimeError):  # they were given others, or refuse them in other words
                    self.runner.check_agreement([*self._calls, repr(error)])
            raise

    # ------------------------------------------------------------ failures

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Give all up where an exception leaves something half done: now, or after a second Ctrl-C in the next call.

        To be entered cleared up, so that a failure before this one is not forgotten.
        """
        self._is_broken = True
        try:
            yield
        except BaseException:
            self._give_up()
            raise
        self._is_broken = False

    def _check_usable(self) -> None:
        self._clear_up()
        self.runner.restore()

    def _clear_up(self) -> None:
        if self._is_broken:
            self._give_up()

    def _give_up(self) -> None:
        """After a failure: end every request, and begin anew."""
        self._in_flight.clear()
        self._ready = [output for output in self._ready if output.request_id not in self._requests]
        for request in self._requests.values():
            self.metrics.aborted(request)
            request.num_unfinished = 0
        for part in (self._requests, self._streaming, self._stopping, self._calls):
            part.clear()
        self.scheduler.abort_all()
        self.runner.reset()
        self._is_broken = False
