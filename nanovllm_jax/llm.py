"""LLM: what users touch."""

import time
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.engine.llm_engine import LLMEngine, Prompt
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


class LLM(LLMEngine):
    """A model ready to generate.

    `LLM(model, **options)`: `model` is a Hugging Face directory or Hub id, or by default a tiny Qwen3 that comes with
    the package; the options are the fields of EngineConfig, under vLLM's and nano-vllm's names.
    """

    def __init__(self, model: str | Path = TINY_MODEL, **options: Any):
        """Load the weights, size the KV cache and compile.

        Raises TypeError for unknown options and ValueError for what does not fit together or into memory.
        """
        super().__init__(model, **options)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one or many prompts, each a string, a list of token ids, or {"prompt_token_ids": [...]}.

        `sampling_params`: one for all, or one for each prompt. Returns the outputs in the order of the prompts.
        Raises TypeError or ValueError, before anything runs, when any prompt or setting is refused, and RuntimeError
        while requests of `add_request` are unfinished.
        """
        if self._requests:
            raise RuntimeError(
                f"generate() needs the engine for itself, and {len(self._requests)} requests from add_request() are "
                "unfinished: call step() until they are done, or abort_request()"
            )
        prompts = _as_list(prompts)
        params = sampling_params
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need one SamplingParams or {len(prompts)}, not {len(params)}")
        try:
            request_ids = self.add_requests(prompts, params)
            outputs = self._run(len(request_ids), use_tqdm)
        finally:
            for request_id in list(self._requests):  # left by an exception or Ctrl-C
                self.abort_request(request_id)
        return [outputs[request_id] for request_id in request_ids]

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        with tqdm(total=num_requests, desc="Generating", dynamic_ncols=True, disable=not use_tqdm) as bar:
            rates = _Rates(self)
            while len(outputs) < num_requests:
                for output in self.step():
                    outputs[output.request_id] = output
                    bar.update(1)
                if use_tqdm and (recent := rates.recent()):
                    bar.set_postfix(recent)
            bar.set_postfix(rates.overall())
        return outputs


class _Rates:
    """Prefill and decode tokens per second, for the progress bar."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine
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
        return time.perf_counter(), self.engine.num_prefill_tokens, self.engine.num_decode_tokens

    @staticmethod
    def _between(first: tuple[float, int, int], last: tuple[float, int, int]) -> dict[str, str]:
        seconds, prefill, decode = (b - a for a, b in zip(first, last))
        return {"Prefill": f"{prefill / seconds:.0f}tok/s", "Decode": f"{decode / seconds:.0f}tok/s"}


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many as a list: a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts must be a string, a dict, token ids or a list of those, not {prompts!r}")
    return [list(prompts)] if prompts and isinstance(prompts[0], Integral) else list(prompts)
