"""nanovllm-jax: a small, fast LLM inference engine in JAX."""

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


def __getattr__(name: str):
    # On first use: the scheduler and the kernels are of use without the rest.
    if name == "LLM":
        from nanovllm_jax.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from nanovllm_jax.async_llm import AsyncLLM

        return AsyncLLM
    if name == "Probe":
        from nanovllm_jax.probe import Probe

        return Probe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
