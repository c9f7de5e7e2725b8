"""nanovllm-jax: a small, fast LLM inference engine in JAX."""

from typing import TYPE_CHECKING

from nanovllm_jax.logs import set_up_logging
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm_jax.llm import LLM

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

set_up_logging()


def __getattr__(name: str):
    if name == "LLM":  # on first use: the scheduler and the kernels are of use without the rest
        from nanovllm_jax.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
