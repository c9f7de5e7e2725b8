"""One engine step as a pure function: the program that is compiled for each batch shape.

R rows, one a sequence, T tokens of all, W table width, D hidden, V vocabulary.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanovllm_jax.engine.batch import BatchShape, BatchView
from nanovllm_jax.kernels import Peers, token_logprobs
from nanovllm_jax.kernels.common import search
from nanovllm_jax.layers.attention import PagedAttention
from nanovllm_jax.models.draw import DeviceState, draw
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM, run_layer
from nanovllm_jax.models.watch import Watch
from nanovllm_jax.parallel import vocabulary
from nanovllm_jax.parallel.sharding import DATA_AXIS, from_group, local_index
from nanovllm_jax.probe import Probe
from nanovllm_jax.sampling_rows import NUM_TOP, SamplingRows


class StepOutput(NamedTuple):
    """What a program returns, beside the state that it was given; the first dimension is its steps."""

    tokens: jax.Array
    """[steps, R] int32; -1 where the logits have no finite best."""
    logprobs: jax.Array
    """[steps, R, 2, 1 + MAX_LOGPROBS] int32: kernels.token_logprobs of the tokens."""
    hidden: jax.Array | None
    """[1, T, D]: the tokens' hidden states, for `prompt_logprobs`, or what `prompt_hidden` makes them of, where the
    shape is `spared`; None where nothing prefills.
    """
    activations: dict[str, jax.Array]
    """What a probe takes out, by place: each [steps, T, ...], or [steps, R, ...] of logits."""


def engine_step(
    model: Qwen3ForCausalLM,
    cache: jax.Array,
    state: DeviceState,
    buffer: jax.Array,
    peers: Peers | None = None,
    *,
    shape: BatchShape,
    probe: Probe | None = None,
) -> tuple[StepOutput, jax.Array, DeviceState]:
    """Compute one batch and sample, once or several times over.

    buffer: the batch, packed by engine.batch. The cache and the state come back updated; compiled, they are donated.
    peers: as of Qwen3ForCausalLM. probe: for shapes that are not `spared`, as it needs all of each layer.
    """
    batch = shape.views(buffer)

    def step(carry, number):
        """Decode rows go on from the token that the step before left in last_tokens."""
        lens, tokens = batch.context_lens, batch.tokens
        if shape.num_steps > 1:
            lens = jnp.where(lens > 0, lens + number, 0)
            tokens = jnp.where(number == 0, tokens, -1)
        one = batch._replace(context_lens=lens, tokens=tokens)
        return _one_step(model, *carry, one, peers, probe, shape)

    if shape.num_steps == 1:
        (cache, state), output = step((cache, state), 0)
        return jax.tree.map(lambda array: array[None], output), cache, state
    (cache, state), output = jax.lax.scan(step, (cache, state), jnp.arange(shape.num_steps))
    return output, cache, state


def prompt_hidden(
    model: Qwen3ForCausalLM,
    cache: jax.Array,
    stream: jax.Array,
    buffer: jax.Array,
    *,
    shape: BatchShape,
) -> tuple[jax.Array, jax.Array]:
    """The tokens' hidden states [1, T, D], of a step of a `spared` shape: the last layer for all of them.

    cache: as it is after that step and before any other, and so it comes back; compiled, it is donated. stream: the
    step's output `hidden`; buffer: the step's batch.
    """
    batch = shape.views(buffer)
    positions, table_rows = _token_positions(batch, shape)
    attend = _attention(model, cache, batch, shape, positions, table_rows)
    attend = replace(attend, slot_mapping=jnp.full_like(attend.slot_mapping, -1))  # all is stored already
    hidden, cache = model.from_last_layer(stream[0], jnp.maximum(positions, 0), cache, attend)
    return hidden[None], cache


def prompt_rows(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """These rows [C] int32 of hidden states [1, T, D]: [C, D].

    Of several data groups, T counts the rows of all, of which each has its own.
    """
    own = local_index(rows, hidden.shape[1], DATA_AXIS)
    mine = own < hidden.shape[1]
    return from_group(mine, hidden[0, jnp.where(mine, own, 0)])


def prompt_logprobs(model: Qwen3ForCausalLM, hidden: jax.Array, tokens: jax.Array, num_top: jax.Array) -> jax.Array:
    """kernels.token_logprobs of tokens [C] int32, each predicted by its row of hidden states [C, D].

    num_top [C] int32: how many most likely tokens to name beside each, -1 for padding.
    """
    asks = jnp.zeros((len(tokens), len(SamplingRows._fields)), jnp.int32).at[:, NUM_TOP].set(num_top)

    def of_rows(logits, *args):
        return token_logprobs(logits, logits, *args, fixed=model.deterministic)

    return vocabulary.by_rows(of_rows, [model.logits(hidden)], asks, tokens)


def _one_step(model, cache: jax.Array, state: DeviceState, batch: BatchView, peers, probe, shape: BatchShape):
    """Compute the batch's tokens and sample: ((cache, state), output)."""
    positions, table_rows = _token_positions(batch, shape)
    slots, newest = batch.slots, jnp.maximum(batch.starts[1:] - 1, 0)  # (R)
    tokens = jnp.where(batch.tokens >= 0, batch.tokens, state.last_tokens[slots[table_rows]])
    attend = _attention(model, cache, batch, shape, positions, table_rows)
    watch = probe and Watch(probe, model, state.steering[slots[table_rows]])
    arguments = tokens, jnp.maximum(positions, 0), cache, attend
    if shape.spared:
        hidden, stream, cache = model.of_rows(newest, *arguments, replace(attend, newest=newest), peers)
    else:
        stream, cache = model(*arguments, watch.run_layer if watch else run_layer, peers)  # (T, D)
        hidden = stream[newest] if shape.prefill_rows else stream
    with jax.named_scope("head"):
        logits = model.logits(hidden)  # (R, V)
    if watch:
        watch.take("logits", logits)
    with jax.named_scope("sample"):
        settings = batch.sampling, slots, batch.context_lens
        new_tokens, logprobs, state = draw(logits, *settings, state, fixed=model.deterministic)
    prompts = stream if shape.prefill_rows else None
    return (cache, state), StepOutput(new_tokens, logprobs, prompts, watch.captured if watch else {})


def _attention(model: Qwen3ForCausalLM, cache: jax.Array, batch: BatchView, shape: BatchShape, positions, table_rows):
    """What the step's tokens attend with."""
    return PagedAttention(
        slot_mapping=_slot_mapping(batch.tables, positions, table_rows, block_size=cache.shape[4]),
        tables=batch.tables,
        context_lens=batch.context_lens,
        starts=batch.starts,
        num_decodes=batch.num_decodes if shape.decode_rows else None,
        prefill_rows=shape.prefill_rows,
        deterministic=model.deterministic,
    )


def _token_positions(batch: BatchView, shape: BatchShape) -> tuple[jax.Array, jax.Array]:
    """Each token's position in its sequence (-1 for padding) and its row in the tables: both [T]."""
    starts, index = batch.starts, jnp.arange(shape.tokens)
    if not shape.prefill_rows:  # a token each
        return batch.context_lens - 1, index
    row = jnp.clip(search(starts, index) - 1, 0, len(starts) - 2)
    before = batch.context_lens - (starts[1:] - starts[:-1])  # (R) tokens computed earlier
    return jnp.where(index < starts[-1], before[row] + index - starts[row], -1), row


def _slot_mapping(tables: jax.Array, positions: jax.Array, table_rows: jax.Array, block_size: int) -> jax.Array:
    """Where each token's key and value go: block * block_size + offset, -1 for padding."""
    at = jnp.maximum(positions, 0)
    slots = tables[table_rows, at // block_size] * block_size + at % block_size
    return jnp.where(positions >= 0, slots, -1)
