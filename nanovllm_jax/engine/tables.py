"""A sequence's lines of the device's tables: what its SamplingParams do to the logits of single tokens."""

import numpy as np

from nanovllm_jax.engine.sequence import Sequence

# Flags beside the count of a token, which has the bits below. kernels/ has the same numbers, and a test says so.
PROMPT = 1 << 24
ENDS = 1 << 25


def token_tables(seq: Sequence, eos_token_ids: frozenset[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """token_counts [V] int32 and logit_bias [V] float32 of a sequence all of whose tokens were read.

    A token's count is how often it was generated, with PROMPT where it is in the prompt and ENDS where min_tokens puts
    it off: end-of-sequence tokens too where they are ignored, as in vLLM.
    """
    counts = np.bincount(seq.completion_token_ids, minlength=vocab_size).astype(np.int32)
    counts[np.unique(seq.prompt_token_ids)] |= PROMPT
    counts[[token for token in seq.stop_token_ids | eos_token_ids if token < vocab_size]] |= ENDS
    bias = np.zeros(vocab_size, np.float32)
    for token, value in (seq.params.logit_bias or {}).items():
        bias[token] = value
    return counts, bias
