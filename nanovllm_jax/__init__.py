"""nanovllm-jax: a small, fast LLM inference engine in JAX."""

from nanovllm_jax.llm import LLM
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
