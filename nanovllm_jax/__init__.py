"""nanovllm-jax: a small, fast LLM inference engine in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING

from nanovllm_jax.logs import set_up_logging
from nanovllm_jax.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm_jax.async_llm import AsyncLLM
    from nanovllm_jax.llm import LLM
    from nanovllm_jax.probe import Probe

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineStats",
    "Probe",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]

set_up_logging()


# Imported on first use: the scheduler and the kernels are of use without them.
_LATE = {"LLM": "llm", "AsyncLLM": "async_llm", "Probe": "probe"}


def __getattr__(name: str):
    if name in _LATE:
        return getattr(import_module(f"nanovllm_jax.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
