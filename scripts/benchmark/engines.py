"""One face for the engines that are compared. Each is imported only in its own process, as none shares a GPU."""

import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

TEMPERATURE = 0.6


class Engine(Protocol):
    """An engine that is ready to generate."""

    MODULE: str
    """What is imported."""
    PACKAGES: tuple[str, ...]
    """Distributions whose versions are reported, its own first."""
    INSTALL: str
    """How to get it."""
    READS_DUMMY: bool
    """Whether it can do with random weights and a config.json."""
    capacity: int
    """Tokens that the KV cache holds."""
    max_num_seqs: int
    """Sequences that run at a time."""
    flags: dict[str, Any]
    """Its settings, defaults included where it tells them."""
    device: str

    def __init__(self, model: str, options: dict[str, Any]): ...

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[tuple[int, int | None]]:
        """For each prompt: tokens generated, and prompt tokens found in the prefix cache (None: it does not tell)."""

    def add(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """Queue a request for `step`."""

    def step(self) -> dict[str, int]:
        """Do one step; returns how many tokens requests have by now. Those that got none may be left out."""

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""


class NanoVllmJax:
    """This project."""

    MODULE = "nanovllm_jax.llm"
    PACKAGES = ("nanovllm-jax", "jax", "jaxlib", "flax")
    INSTALL = 'pip install -e ".[cuda13]" in a clone of this repository'
    READS_DUMMY = True

    def __init__(self, model: str, options: dict[str, Any]):
        import jax

        from nanovllm_jax import LLM, SamplingParams
        from nanovllm_jax.engine.pacing import PAUSE

        self.llm, self.params, self.pause = LLM(model, **options), SamplingParams, PAUSE
        runner = self.llm.runner
        self.capacity, self.max_num_seqs = runner.num_blocks * runner.config.block_size, runner.max_num_seqs
        resolved = dict(
            dtype=runner.dtype.name,
            max_num_seqs=runner.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
            max_model_len=runner.max_model_len,
            num_kvcache_blocks=runner.num_blocks,
            num_scheduler_steps=runner.buckets.run_ahead.num_steps,
            num_scheduler_steps_rows=runner.buckets.run_ahead.rows,
        )
        settings = asdict(runner.config) | resolved
        self.flags = {name: value if value is None else str(value) for name, value in settings.items()}
        self.device = jax.devices()[0].device_kind

    def _params(self, max_tokens: int):
        return self.params(temperature=TEMPERATURE, ignore_eos=True, max_tokens=max_tokens)

    def generate(self, prompts, max_tokens):
        outputs = self.llm.generate(prompts, [self._params(n) for n in max_tokens], use_tqdm=False)
        return [(len(out.outputs[0].token_ids), out.num_cached_tokens) for out in outputs]

    def add(self, request_id, prompt, max_tokens):
        self.llm.add_request(prompt, self._params(max_tokens), request_id)

    def step(self):
        if spare := self.llm.spare_seconds():  # as AsyncLLM does: who comes meanwhile is in the next step
            time.sleep(min(spare, self.pause))
            return {}
        finished = {out.request_id: len(out.outputs[0].token_ids) for out in self.llm.step()}
        running = {request.request_id: request.num_generated for request in self.llm._requests.values()}
        return running | finished

    def reset_prefix_cache(self):
        self.llm.reset_prefix_cache()


class NanoVllm:
    """PyTorch nano-vllm."""

    MODULE = "nanovllm"
    PACKAGES = ("nano-vllm", "torch", "triton", "flash-attn", "transformers")
    INSTALL = "pip install git+https://github.com/GeeeekExplorer/nano-vllm.git (it needs flash-attn)"
    READS_DUMMY = False

    def __init__(self, model: str, options: dict[str, Any]):
        import torch
        from nanovllm import LLM, SamplingParams

        self.llm, self.params = LLM(model, **options), SamplingParams
        scheduler = self.llm.scheduler
        blocks = scheduler.block_manager
        self.capacity, self.max_num_seqs = len(blocks.blocks) * blocks.block_size, scheduler.max_num_seqs
        self.flags = dict(
            options, max_num_batched_tokens=scheduler.max_num_batched_tokens, block_size=blocks.block_size
        )
        self.device = torch.cuda.get_device_name()
        self.request_ids: dict[int, str] = {}

    def _params(self, max_tokens: int):
        return self.params(temperature=TEMPERATURE, ignore_eos=True, max_tokens=max_tokens)

    def generate(self, prompts, max_tokens):
        outputs = self.llm.generate(prompts, [self._params(n) for n in max_tokens], use_tqdm=False)
        return [(len(out["token_ids"]), None) for out in outputs]

    def add(self, request_id, prompt, max_tokens):
        self.llm.add_request(prompt, self._params(max_tokens))
        self.request_ids[self.llm.scheduler.waiting[-1].seq_id] = request_id

    def step(self):
        finished, _ = self.llm.step()
        counts = {seq.seq_id: seq.num_completion_tokens for seq in self.llm.scheduler.running}
        counts |= {seq_id: len(tokens) for seq_id, tokens in finished}
        return {self.request_ids[seq_id]: count for seq_id, count in counts.items()}

    def reset_prefix_cache(self):  # it has no call for this
        blocks = self.llm.scheduler.block_manager
        blocks.hash_to_block_id.clear()
        for block in blocks.blocks:
            block.hash, block.token_ids = -1, []


class Vllm:
    """vLLM. No tokenizer and no text, as token ids go in and come out."""

    MODULE = "vllm"
    PACKAGES = ("vllm", "torch", "triton", "transformers")
    INSTALL = "pip install vllm"
    READS_DUMMY = True

    def __init__(self, model: str, options: dict[str, Any]):
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        self.llm, self.params = LLM(model, **{"skip_tokenizer_init": True, "seed": 0} | options), SamplingParams
        config = self.llm.llm_engine.vllm_config
        cache, scheduler = config.cache_config, config.scheduler_config
        self.capacity, self.max_num_seqs = cache.num_gpu_blocks * cache.block_size, scheduler.max_num_seqs
        self.flags = dict(
            options,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            block_size=cache.block_size,
            enable_prefix_caching=cache.enable_prefix_caching,
            async_scheduling=getattr(scheduler, "async_scheduling", None),
        )
        self.device = current_platform.get_device_name()

    def _params(self, max_tokens: int):
        return self.params(temperature=TEMPERATURE, ignore_eos=True, max_tokens=max_tokens, detokenize=False)

    def generate(self, prompts, max_tokens):
        params = [self._params(n) for n in max_tokens]
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [(len(out.outputs[0].token_ids), out.num_cached_tokens) for out in outputs]

    def add(self, request_id, prompt, max_tokens):
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, self._params(max_tokens))

    def step(self):
        return {out.request_id: len(out.outputs[0].token_ids) for out in self.llm.llm_engine.step()}

    def reset_prefix_cache(self):
        if self.llm.reset_prefix_cache() is False:  # None: an older vLLM, which does not tell
            raise RuntimeError("vLLM did not empty its prefix cache: the next figures would be too good")


ENGINES: dict[str, type[Engine]] = {"ours": NanoVllmJax, "nanovllm": NanoVllm, "vllm": Vllm}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed; an engine may also run from a source tree."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
