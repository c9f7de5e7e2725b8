"""From logits to tokens in the compiled step: each feature of SamplingParams, in vLLM's order.

Bias and least length, penalties, temperature, min_p, top_k, top_p. Which features a row uses is data: the kernels leave
rows alone that do not ask. R rows, V vocabulary, S slots (one for each sequence that may run, and one for padding).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nanovllm_jax.engine.batch import FLOAT_COLUMNS, SamplingRows
from nanovllm_jax.kernels import adjust_logits
from nanovllm_jax.layers.sampler import sample
from nanovllm_jax.parallel import vocabulary
from nanovllm_jax.parallel.sharding import DATA_AXIS, first_of_shard, local_index


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


class LogprobArrays(NamedTuple):
    """Log probabilities of the raw logits."""

    logprob: jax.Array
    """[R] float32: the token's own."""
    rank: jax.Array
    """[R] int32: 1 for the most likely token."""
    top_ids: jax.Array
    """[R, MAX_LOGPROBS] int32: the most likely ones, of which as many are valid as the row asked for."""
    top_logprobs: jax.Array
    """[R, MAX_LOGPROBS] float32."""


def draw(
    logits: jax.Array,
    rows: SamplingRows,
    slots: jax.Array,
    context_lens: jax.Array,
    state: DeviceState,
    *,
    fixed: bool = False,
) -> tuple[jax.Array, LogprobArrays, DeviceState]:
    """Draw each row's next token, which goes to position context_lens [R] of its sequence.

    logits [R, V] float32 (or a device's part of V); rows: from `columns`; slots [R] int32. Returns tokens [R] int32,
    their log probabilities, and the state with the tokens taken in. A row whose best logit is NaN or infinite has no
    token to draw: it returns -1, and the state has some token of the vocabulary.
    """
    seeds = jnp.stack((rows.seed_low, rows.seed_high), axis=1).astype(jnp.uint32)
    ends_too_early = (context_lens < rows.min_len).astype(jnp.int32)
    penalties = rows.repetition, rows.frequency, rows.presence
    logits, raw = adjust_logits(
        logits, slots, rows.adjusts, ends_too_early, *penalties, state.token_counts, state.logit_bias
    )
    threshold = vocabulary.threshold(logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, fixed=fixed)
    tokens, scores = sample(logits, rows.temperature, seeds, context_lens, threshold)
    logprobs = LogprobArrays(*vocabulary.logprobs(logits, raw, rows.adjusts, tokens, rows.num_top, fixed=fixed))
    entries = local_index(tokens, logits.shape[1])
    state = state._replace(
        last_tokens=state.last_tokens.at[slots].set(tokens),
        token_counts=state.token_counts.at[slots, entries].add(rows.adjusts, mode="drop"),
    )
    return jnp.where(jnp.isfinite(scores), tokens, -1), logprobs, state  # NaN and infinity are drawn, where they are


def write_tables(state: DeviceState, line: jax.Array, token_counts: jax.Array, logit_bias: jax.Array) -> DeviceState:
    """The state with one line [V] of each table set; lines are counted through all data groups."""
    slots, size = state.token_counts.shape
    slot, first = local_index(line, slots, DATA_AXIS), first_of_shard(size)
    counts, bias = (lax.dynamic_slice_in_dim(x, first, size) for x in (token_counts, logit_bias))
    return state._replace(
        token_counts=state.token_counts.at[slot].set(counts, mode="drop"),
        logit_bias=state.logit_bias.at[slot].set(bias, mode="drop"),
    )


def columns(sampling: jax.Array) -> SamplingRows:
    """BatchView.sampling [R, 12] int32 as columns [R] of their own types."""
    bits = SamplingRows(*sampling.T)
    return bits._replace(**{name: lax.bitcast_convert_type(getattr(bits, name), jnp.float32) for name in FLOAT_COLUMNS})
