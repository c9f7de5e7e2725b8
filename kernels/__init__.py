"""Attention over a paged KV cache: one function each to write it, to decode from it and to prefill against it.

On an NVIDIA GPU each runs its Pallas kernel, anywhere else its plain-jnp oracle (reference.py, same signature). Which one is
settled when a program is lowered, so a compiled step holds one of the two and never a branch. Each sits in a jit of its own:
the layers of a model share one trace and one lowering.
"""

import functools

import jax

from . import decode, prefill, reference, store

__all__ = ["paged_decode_attention", "paged_prefill_attention", "store_kv"]


@jax.jit
def store_kv(
    k: jax.Array, v: jax.Array, slot_mapping: jax.Array, k_cache: jax.Array, v_cache: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write the new tokens' keys and values into their cache slots; donated caches are updated in place.

    k, v [T, K, H]; slot_mapping [T] int32, block * block_size + offset in the block, or -1 for a padded row, which writes
    nothing. k_cache, v_cache [num_blocks, K, block_size, H], of k's dtype. Returns (k_cache, v_cache).
    """
    return jax.lax.platform_dependent(
        k, v, slot_mapping, k_cache, v_cache, cuda=store.store_kv, default=reference.store_kv
    )


@functools.partial(jax.jit, static_argnames="scale")
def paged_decode_attention(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, block_tables: jax.Array, context_lens: jax.Array, *, scale: float
) -> jax.Array:
    """Attention of one new token per sequence over that sequence's cached tokens, itself among them.

    q [B, N, H], query head n belonging to kv head n // (N / K); k_cache, v_cache [num_blocks, K, block_size, H];
    block_tables [B, W] int32, of which entries past a sequence's context may be anything; context_lens [B] int32 in tokens,
    0 for a padded row. scale multiplies the scores. Returns [B, N, H] in q's dtype, zeros for padded rows.
    """
    return jax.lax.platform_dependent(
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        cuda=functools.partial(decode.paged_decode_attention, scale=scale),
        default=functools.partial(reference.paged_decode_attention, scale=scale),
    )


@functools.partial(jax.jit, static_argnames="scale")
def paged_prefill_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_tables: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Causal attention of each sequence's newest tokens over all its cached tokens, the new ones among them.

    q [T, N, H], the sequences' new tokens one after another: those of sequence p are rows query_starts[p] to
    query_starts[p + 1], and they are the last of its context_lens[p] cached tokens. So a first prefill, a chunk and a prefix
    hit are one case. query_starts [P + 1] int32 rises from 0 (a padded sequence is empty), context_lens [P] int32,
    block_tables [P, W] int32; caches and scale as in paged_decode_attention. Returns [T, N, H] in q's dtype, zeros in the
    rows past query_starts[P].
    """
    return jax.lax.platform_dependent(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        cuda=functools.partial(prefill.paged_prefill_attention, scale=scale),
        default=functools.partial(reference.paged_prefill_attention, scale=scale),
    )
