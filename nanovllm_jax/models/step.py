"""One engine step as a pure function: the program that is compiled for each batch shape.

B decode rows, T prefill tokens, P prefill sequences, R = B + P, W table width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanovllm_jax.engine.batch import BatchShape, BatchView
from nanovllm_jax.layers.attention import KVCache, PagedAttention
from nanovllm_jax.layers.sampler import sample
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM


def engine_step(
    model: Qwen3ForCausalLM,
    caches: list[KVCache],
    last_tokens: jax.Array,
    buffer: jax.Array,
    *,
    shape: BatchShape,
    block_size: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, list[KVCache], jax.Array]:
    """Compute one batch and sample, once or several times over.

    last_tokens [max_num_seqs + 1] int32: each running sequence's last token, by slot; the last entry takes padding.
    buffer: the batch, packed by engine.batch.
    Returns tokens [S, R] int32 of the shape's S steps, the caches and last_tokens, both updated; both are donated when
    compiled.
    """
    batch = shape.views(buffer)

    def step(state, number):
        """Decode rows go on from the token that the step before left in last_tokens."""
        lens, tokens = batch.context_lens, batch.decode_tokens
        if shape.num_steps > 1:
            lens = jnp.where(lens > 0, lens + number, 0)
            tokens = jnp.where(number == 0, tokens, -1)
        return _one_step(model, *state, batch._replace(context_lens=lens, decode_tokens=tokens), block_size, mesh)

    if shape.num_steps == 1:
        (caches, last_tokens), tokens = step((caches, last_tokens), 0)
        return tokens[None], caches, last_tokens
    (caches, last_tokens), tokens = jax.lax.scan(step, (caches, last_tokens), jnp.arange(shape.num_steps))
    return tokens, caches, last_tokens


def _one_step(model, caches, last_tokens, batch: BatchView, block_size: int, mesh: Mesh | None):
    """Compute the batch's tokens and sample: ((caches, last_tokens), tokens [R])."""
    rows, slots = batch.decode_tokens.shape[0], batch.slots
    decode_tokens = jnp.where(batch.decode_tokens >= 0, batch.decode_tokens, last_tokens[slots[:rows]])
    tokens = jnp.concatenate((decode_tokens, batch.prefill_tokens))  # (B + T)
    positions, table_rows = _token_positions(batch, rows)
    attend = PagedAttention(
        slot_mapping=_slot_mapping(batch.tables, positions, table_rows, block_size),
        decode_tables=batch.tables[:rows],
        decode_context_lens=batch.context_lens[:rows],
        prefill_tables=batch.tables[rows:],
        prefill_context_lens=batch.context_lens[rows:],
        query_starts=batch.query_starts,
        mesh=mesh,
    )
    hidden, caches = model(tokens, jnp.maximum(positions, 0), caches, attend)  # (B + T, D)
    last_of_prefill = jnp.maximum(batch.query_starts[1:] - 1, 0) + rows
    sampled = jnp.concatenate((jnp.arange(rows), last_of_prefill)) if len(last_of_prefill) else jnp.arange(rows)
    with jax.named_scope("head"):
        logits = model.logits(hidden[sampled])  # (R, V)
    with jax.named_scope("sample"):
        temperatures = jax.lax.bitcast_convert_type(batch.temperatures, jnp.float32)
        seeds = jax.lax.bitcast_convert_type(batch.seeds, jnp.uint32)
        new_tokens = sample(logits, temperatures, seeds, batch.context_lens)
    return (caches, last_tokens.at[slots].set(new_tokens)), new_tokens


def _token_positions(batch: BatchView, rows: int) -> tuple[jax.Array, jax.Array]:
    """Each token's position in its sequence (-1 for padding) and its row in the tables: both [B + T]."""
    decode_positions = batch.context_lens[:rows] - 1
    starts, index = batch.query_starts, jnp.arange(batch.prefill_tokens.shape[0])
    if not index.size:
        return decode_positions, jnp.arange(rows)
    sequence = jnp.clip(jnp.searchsorted(starts, index, side="right") - 1, 0, starts.shape[0] - 2)
    before_chunk = batch.context_lens[rows:] - (starts[1:] - starts[:-1])  # (P) tokens computed earlier
    positions = jnp.where(index < starts[-1], before_chunk[sequence] + index - starts[sequence], -1)
    return jnp.concatenate((decode_positions, positions)), jnp.concatenate((jnp.arange(rows), rows + sequence))


def _slot_mapping(tables: jax.Array, positions: jax.Array, table_rows: jax.Array, block_size: int) -> jax.Array:
    """Where each token's key and value go: block * block_size + offset, -1 for padding."""
    at = jnp.maximum(positions, 0)
    slots = tables[table_rows, at // block_size] * block_size + at % block_size
    return jnp.where(positions >= 0, slots, -1)
