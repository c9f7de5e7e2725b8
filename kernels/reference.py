"""The kernels' oracles in plain jnp, float32 throughout. They are what a CPU runs.

Shapes: T tokens, B sequences, N query heads, K kv heads, G = N / K, H head_dim, S tokens of a block, or of a tile.
"""

import math
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import lax

from .common import NEG_INF, prefill_tiles, with_rank

ROWS_PER_TILE = 32  # where a row's result must not depend on how many there are
KEYS_PER_TILE = 32  # attention goes through its keys in tiles of so many, and through no more than there are
QUERIES_PER_TILE = 64  # prefill goes through its tokens in tiles, so that its memory stays small


def norm_rope_store(qkv, q_gain, k_gain, cos, sin, slot_mapping, kv_cache, layer, *, eps, fixed=False):
    """See nanovllm_jax.kernels.norm_rope_store."""

    def norm_rope(qkv, cos, sin):
        heads, cos, sin = qkv[:, :, :-1], cos[:, None, None], sin[:, None, None]
        gains = jnp.stack([q_gain] * (heads.shape[2] - 1) + [k_gain])
        heads = rope(rms_norm(heads, gains, eps), cos, sin)
        # Reshaped last: cut, reshaped and then normalised, XLA (0.11.2, on an H100) has read other heads' numbers.
        return heads[:, :, :-1].reshape(len(qkv), -1, qkv.shape[-1]), heads[:, :, -1]

    q, k = _in_tiles(norm_rope, qkv, cos, sin) if fixed else norm_rope(qkv, cos, sin)
    _, _, num_blocks, _, block_size, _ = kv_cache.shape
    block = jnp.where(slot_mapping < 0, num_blocks, slot_mapping // block_size)  # past the end: the write is dropped
    for part, new in enumerate((k, qkv[:, :, -1])):
        kv_cache = kv_cache.at[part, layer, block, :, slot_mapping % block_size].set(new, mode="drop")
    return q, kv_cache


def add_norm(x, delta, gain, *, eps, fixed=False):
    """See nanovllm_jax.kernels.add_norm."""

    def add_norm(x, delta):
        total = _rounded(x + delta, x.dtype)
        return total, rms_norm(total, gain, eps)

    delta = whole(delta, x.dtype)
    return _in_tiles(add_norm, x, delta) if fixed else add_norm(x, delta)


def all_reduce_norm(x, delta, gain, peers, *, eps, axis):
    """See nanovllm_jax.kernels.all_reduce_norm."""
    return add_norm(x, lax.psum(whole(delta, x.dtype), axis)[None], gain, eps=eps)


def whole(parts, dtype):
    """Parts [S, ...], float32 where there are several -> [...]: their sum, rounded to dtype."""
    return _rounded(sum(parts, jnp.zeros(parts.shape[1:], parts.dtype)), dtype).astype(dtype)


def row_linear(x, weight):
    """See nanovllm_jax.kernels.row_linear."""
    return _product(x, weight).astype(x.dtype)


def row_norm_linear(x, delta, gain, weight, *, eps):
    """See nanovllm_jax.kernels.row_norm_linear."""
    total, normed = add_norm(x, delta[None], gain, eps=eps)
    return total, swiglu(normed, weight) if len(weight) == 2 else row_linear(normed, weight[0])


def few_linear(x, weight, *, parts=1, dtype):
    """See nanovllm_jax.kernels.few_linear."""
    if len(weight) == 2:
        return swiglu(x, weight)[None].astype(dtype)
    # Parts of one size: zeros add nothing.
    x, weight = (jnp.pad(array, ((0, 0), (0, -array.shape[1] % parts))) for array in (x, weight[0]))
    x, weight = (array.reshape(len(array), parts, -1).swapaxes(0, 1) for array in (x, weight))
    return jax.vmap(_product)(x, weight).astype(dtype)


def swiglu(x, weight):
    """See nanovllm_jax.kernels.swiglu."""
    gate, up = (_rounded(_product(x, part), x.dtype) for part in weight)
    return (_rounded(jax.nn.silu(gate), x.dtype) * up).astype(x.dtype)


def fixed_matmul(x, weight, *, dtype):
    """See nanovllm_jax.kernels.fixed_matmul."""

    def product(tile):
        # Barriers: a single tile is no loop any more, and then XLA's CPU products of float16 are others.
        x, w = lax.optimization_barrier((tile.astype(jnp.float32), weight.astype(jnp.float32)))
        return lax.optimization_barrier(_product(x, w))

    return _in_tiles(product, x).astype(dtype)


def _product(x, weight):
    return jnp.matmul(x, weight.T, precision="highest", preferred_element_type=jnp.float32)


def _in_tiles(function, *arrays):
    """function of arrays, row by row, in tiles that all have one shape and so are computed alike."""
    rows = len(arrays[0])

    def cut(x):
        padded = jnp.pad(x, ((0, -rows % ROWS_PER_TILE), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(-1, ROWS_PER_TILE, *x.shape[1:])

    tiles = lax.map(lambda tile: function(*tile), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tiles)


def split(x, sizes):
    """See nanovllm_jax.kernels.split."""
    return jnp.split(x, list(accumulate(sizes))[:-1])


def rms_norm(x, gain, eps):
    """x [..., D], its RMS norm times gain [D], rounded to x's dtype before the gain and after, as transformers does."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = _rounded(wide * scale, x.dtype)
    return _rounded(normed * with_rank(gain.astype(jnp.float32), x.ndim), x.dtype).astype(x.dtype)


def _rounded(x, dtype):
    """x with dtype's precision: in compiled code a conversion to 16 bits and back would be left out."""
    if dtype == jnp.float32:  # it has that: XLA for a CPU would compile longer, and round nothing
        return x
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


def rope(x, cos, sin):
    """Rotate x [..., H] by cos and sin [..., H / 2] float32; pairs are (i, i + H / 2)."""
    cos, sin = (with_rank(angles, x.ndim) for angles in (cos, sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return _rounded(rotated, x.dtype).astype(x.dtype)


def paged_decode_attention(q, kv_cache, layer, block_tables, context_lens, *, scale):
    """See nanovllm_jax.kernels.paged_decode_attention."""
    batch, positions = len(context_lens), context_lens[:, None] - 1  # -1 for a padded row, which then sees no key
    out = _attend(q[:batch, None], kv_cache, layer, block_tables, positions, scale)[:, 0]
    return out if len(q) == batch else jnp.zeros_like(q).at[:batch].set(out)


def store_and_decode(
    qkv, q_gain, k_gain, cos, sin, slot_mapping, kv_cache, layer, block_tables, context_lens, *, scale, eps
):
    """See nanovllm_jax.kernels.store_and_decode."""
    q, kv_cache = norm_rope_store(qkv, q_gain, k_gain, cos, sin, slot_mapping, kv_cache, layer, eps=eps)
    return paged_decode_attention(q, kv_cache, layer, block_tables, context_lens, scale=scale), kv_cache


def paged_prefill_attention(q, kv_cache, layer, block_tables, query_starts, context_lens, out=None, *, scale):
    """See nanovllm_jax.kernels.paged_prefill_attention."""
    tiles = prefill_tiles(query_starts, context_lens, len(q), QUERIES_PER_TILE)
    in_tile = jnp.arange(QUERIES_PER_TILE)

    def attend_tile(out, tile):
        sequence, row, count, position = tile
        rows = jnp.where(in_tile < count, row + in_tile, len(q))  # past the end: zeros come in, nothing goes out
        positions = jnp.where(in_tile < count, position + in_tile, -1)
        table = block_tables.at[sequence].get(mode="clip")
        tile_q = q.at[rows].get(mode="fill", fill_value=0)
        tile_out = _attend(tile_q[None], kv_cache, layer, table[None], positions[None], scale)[0]
        return out.at[rows].set(tile_out, mode="drop"), None

    return lax.scan(attend_tile, jnp.zeros_like(q) if out is None else out, tiles)[0]


def _attend(q, kv_cache, layer, block_tables, positions, scale):
    """Attention of query [b, t] (q [B, T, N, H]) over keys 0 to positions[b, t] of sequence b, tile after tile of them.

    Time goes with the longest context in the call, not with the table's width or the pool. Returns [B, T, N, H].
    """
    _, _, num_blocks, kv_heads, block_size, head_dim = kv_cache.shape
    rows, queries, heads, _ = q.shape
    group = heads // kv_heads
    by_head = q.astype(jnp.float32).reshape(rows, queries, kv_heads, group, head_dim).swapaxes(1, 2)
    q32 = by_head.reshape(rows, kv_heads, queries * group, head_dim) * scale  # [B, K, T * G, H]
    last = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [B, 1, T * G, 1]
    keys = math.gcd(KEYS_PER_TILE, block_size)

    def take_in_tile(i, state):
        acc, m, l = state
        w, offset = i * keys // block_size, i * keys % block_size
        entry = lax.dynamic_index_in_dim(block_tables, w, axis=1, keepdims=False)
        block = jnp.clip(entry, 0, num_blocks - 1)

        def tile_of(part):
            cut = partial(lax.dynamic_slice, kv_cache, slice_sizes=(1, 1, 1, kv_heads, keys, head_dim))
            return jax.vmap(lambda b: cut((part, layer, b, 0, offset, 0))[0, 0, 0].astype(jnp.float32))(block)

        key_position = i * keys + jnp.arange(keys)
        seen = key_position[None, None, None] <= last  # [B, 1, T * G, S]
        used = seen.any(axis=2)[..., None]  # [B, 1, S, 1]
        k, v = tile_of(0), jnp.where(used, tile_of(1), 0)  # [B, K, S, H]; 0 * NaN of an unused slot would be NaN
        scores = jnp.where(seen, jnp.einsum("bkqh,bksh->bkqs", q32, k, precision="highest"), NEG_INF)
        m_new = jnp.maximum(m, scores.max(axis=-1))
        p = jnp.where(seen, jnp.exp(scores - m_new[..., None]), 0)
        alpha = jnp.exp(m - m_new)
        values = jnp.einsum("bkqs,bksh->bkqh", p, v, precision="highest")
        return acc * alpha[..., None] + values, m_new, l * alpha + p.sum(axis=-1)

    m = jnp.full(q32.shape[:-1], NEG_INF, jnp.float32)
    tiles = (positions.max() + keys) // keys
    acc, _, l = lax.fori_loop(0, tiles, take_in_tile, (jnp.zeros_like(q32), m, jnp.zeros_like(m)))
    out = (acc / jnp.maximum(l, 1e-30)[..., None]).reshape(by_head.shape).swapaxes(1, 2)
    return out.astype(q.dtype).reshape(q.shape)
