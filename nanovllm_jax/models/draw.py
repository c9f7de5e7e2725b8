"""From logits to tokens in the compiled step: each feature of SamplingParams, in vLLM's order.

Bias and least length, penalties, temperature, min_p, top_k, top_p. Which features a row uses is data: the kernels leave
rows alone that do not ask. R rows, V vocabulary, S slots (one for each sequence that may run, and one for padding).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanovllm_jax.kernels import adjust_logits
from nanovllm_jax.layers.sampler import sample
from nanovllm_jax.parallel import vocabulary
from nanovllm_jax.parallel.sharding import DATA_AXIS, first_of_shard, local_index
from nanovllm_jax.sampling_rows import ADJUSTS


class DeviceState(NamedTuple):
    """What the device keeps of each running sequence, by slot."""

    last_tokens: jax.Array
    """[S] int32."""
    token_counts: jax.Array
    """[S, V] int32: how often a token was generated, and the flags of kernels.PROMPT and kernels.ENDS."""
    logit_bias: jax.Array
    """[S, V] float32. A line of these two holds something only where the sequence's params ask for it."""
    steering: jax.Array | None = None
    """[S, K] float32: what the requests bring for a probe to edit by; None without a probe."""


def draw(
    logits: jax.Array,
    sampling: jax.Array,
    slots: jax.Array,
    context_lens: jax.Array,
    state: DeviceState,
    *,
    fixed: bool = False,
) -> tuple[jax.Array, jax.Array, DeviceState]:
    """Draw each row's next token, which goes to position context_lens [R] of its sequence.

    logits [R, V] float32 (or a device's part of V); sampling [R, 12] and slots [R] int32. Returns tokens [R] int32,
    what kernels.token_logprobs says of them by the raw logits, and the state with the tokens taken in. A row whose best
    logit is NaN or infinite has no token to draw: it returns -1, and the state has the first of the vocabulary.
    """
    logits, raw = adjust_logits(logits, sampling, slots, context_lens, state.token_counts, state.logit_bias)
    tokens, logprobs = vocabulary.by_rows(partial(sample, fixed=fixed), (logits, raw), sampling, context_lens)
    taken_in = jnp.maximum(tokens, 0)
    entries = local_index(taken_in, logits.shape[1])
    state = state._replace(
        last_tokens=state.last_tokens.at[slots].set(taken_in),
        token_counts=state.token_counts.at[slots, entries].add(sampling[:, ADJUSTS], mode="drop"),
    )
    return tokens, logprobs, state


def write_tables(state: DeviceState, line: jax.Array, token_counts: jax.Array, logit_bias: jax.Array) -> DeviceState:
    """The state with one line [V] of each table set; lines are counted through all data groups."""
    slots, size = state.token_counts.shape
    slot, first = local_index(line, slots, DATA_AXIS), first_of_shard(size)
    counts, bias = (lax.dynamic_slice_in_dim(x, first, size) for x in (token_counts, logit_bias))
    return state._replace(
        token_counts=state.token_counts.at[slot].set(counts, mode="drop"),
        logit_bias=state.logit_bias.at[slot].set(bias, mode="drop"),
    )
