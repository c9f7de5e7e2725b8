"""LLM: what users touch."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        Raises TypeError or ValueError, before anything runs, when any prompt or setting is refused.
        """
        prompts = _as_list(prompts)
        params = sampling_params
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need one SamplingParams or {len(prompts)}, not {len(params)}")
        request_ids = self.add_requests(prompts, params)
        try:
            outputs = self._run(set(request_ids), use_tqdm)
        finally:
            for request_id in request_ids:  # on an exception or Ctrl-C; finished ones are ignored
                self.abort_request(request_id)
        return [outputs[request_id] for request_id in request_ids]

    def _run(self, request_ids: set[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        with tqdm(total=len(request_ids), desc="Generating", dynamic_ncols=True, disable=not use_tqdm) as bar:
            rates = _Rates(self)
            while len(outputs) < len(request_ids):
                for output in self.step():
                    outputs[output.request_id] = output
                    bar.update(1)
                if use_tqdm and rates.update():
                    bar.set_postfix(rates.shown)
        return outputs


class _Rates:
    """Prefill and decode tokens per second over the last half second or so, for the progress bar."""

    def __init__(self, engine: LLMEngine, every: float = 0.5):
        self.engine, self.every = engine, every
        self.shown: dict[str, str] = {}
        self._mark()

    def _mark(self) -> None:
        self.time = time.perf_counter()
        self.counts = self.engine.num_prefill_tokens, self.engine.num_decode_tokens

    def update(self) -> bool:
        """Whether there are new figures to show."""
        elapsed, counts = time.perf_counter() - self.time, self.counts
        if elapsed < self.every:
            return False
        self._mark()
        for name, before, now in zip(("Prefill", "Decode"), counts, self.counts):
            self.shown[name] = f"{(now - before) / elapsed:.0f}tok/s"
        return True


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many as a list: a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts must be a string, a dict, token ids or a list of those, not {prompts!r}")
    return [list(prompts)] if prompts and isinstance(prompts[0], int) else list(prompts)
