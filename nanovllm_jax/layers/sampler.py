"""From whole rows of logits to tokens, inside the compiled step.

Noise is counter-based: a function of the request's seed, the token's position and the vocabulary entry, whatever else
is in the batch.
"""

import jax
import jax.numpy as jnp

from nanovllm_jax.kernels import noisy_argmax, sampling_threshold, token_logprobs


def sample(
    logits: jax.Array, raw: jax.Array, sampling: jax.Array, positions: jax.Array, *, fixed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row from softmax(logits / temperature), of what top_k, top_p and min_p leave, by the Gumbel-max
    trick; temperature 0 is argmax.

    logits [R, V] float32, and what they were before penalties: raw; sampling [R, 12] int32 (SamplingRows), positions
    [R] int32 (of the drawn token). Returns the tokens [R] int32, -1 where the best logit is NaN or infinite, and what
    kernels.token_logprobs says of them.
    """
    threshold = sampling_threshold(logits, sampling, fixed=fixed)
    tokens, scores = noisy_argmax(logits, sampling, positions, threshold)
    logprobs = token_logprobs(logits, raw, sampling, tokens, fixed=fixed)
    return jnp.where(jnp.isfinite(scores), tokens, -1), logprobs  # NaN and infinity are drawn, where they are
