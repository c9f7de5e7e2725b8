"""Attention over a paged KV cache, a function each to write it, decode from it and prefill against it, and a norm.

On an NVIDIA GPU each runs its Pallas kernel, anywhere else its plain-jnp oracle (reference.py, same signature). Which
one is settled when a program is lowered, so a compiled step holds one of the two and never a branch. Each sits in a jit
of its own: the layers of a model share one trace and one lowering.

Shapes: T tokens, B sequences with one new token each, P sequences in prefill, N query heads, K kv heads, H head_dim,
W blocks in a row of a block table, D hidden.
"""

import functools

import jax

from . import decode, norm, prefill, reference, store
from .common import kernel

__all__ = ["add_norm", "norm_rope_store", "paged_decode_attention", "paged_prefill_attention"]


@functools.partial(kernel, static_argnames="eps")
def norm_rope_store(
    qkv: jax.Array,
    q_gain: jax.Array,
    k_gain: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise and rotate queries and keys, and write keys and values into the paged cache.

    qkv [T, K, G + 2, H]: for each kv head its G query heads, its key and its value. q_gain, k_gain [H]: the RMS norms'
    weights. cos, sin [T, H / 2] float32. slot_mapping [T] int32: block * block_size + offset in the block where a
    token's key and value go, no two in one place, or -1 for a padded row, which writes nothing. k_cache, v_cache
    [num_blocks, K, block_size, H], of qkv's dtype; donated caches are updated in place.
    Returns (q [T, K * G, H], k_cache, v_cache).
    """
    return jax.lax.platform_dependent(
        *(qkv, q_gain, k_gain, cos, sin, slot_mapping, k_cache, v_cache),
        cuda=functools.partial(store.norm_rope_store, eps=eps),
        default=functools.partial(reference.norm_rope_store, eps=eps),
    )


@functools.partial(kernel, static_argnames="scale")
def paged_decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention of one new token per sequence over that sequence's cached tokens, itself among them.

    q [B, N, H], query head n belonging to kv head n // (N / K); k_cache, v_cache [num_blocks, K, block_size, H];
    block_tables [B, W] int32, of which entries past a sequence's context may be anything; context_lens [B] int32 in
    tokens, 0 for a padded row. scale multiplies the scores. Returns [B, N, H] in q's dtype, zeros for padded rows.
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


@functools.partial(kernel, static_argnames="scale")
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
    query_starts[p + 1], and they are the last of its context_lens[p] cached tokens. So a first prefill, a chunk and a
    prefix hit are one case. query_starts [P + 1] int32 rises from 0 (a padded sequence is empty), context_lens [P]
    int32, block_tables [P, W] int32; caches and scale as in paged_decode_attention. Returns [T, N, H] in q's dtype,
    zeros in the rows past query_starts[P].
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def add_norm(x: jax.Array, delta: jax.Array, gain: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The residual sum, and its RMS norm as transformers rounds it: to x's dtype before the gain and after.

    x, delta [T, D], of one dtype; gain [D]. Returns (x + delta, its norm times gain), both [T, D]. Differentiable.
    """
    return _add_norm(x, delta, gain, eps=eps)


@functools.partial(kernel, static_argnames="eps")
def _add_norm(x, delta, gain, *, eps):
    return jax.lax.platform_dependent(
        *(x, delta, gain),
        cuda=functools.partial(norm.add_norm, eps=eps),
        default=functools.partial(reference.add_norm, eps=eps),
    )


@add_norm.defjvp
def _add_norm_jvp(eps, primals, tangents):
    return jax.jvp(functools.partial(reference.add_norm, eps=eps), primals, tangents)
