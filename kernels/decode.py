"""Pallas kernels: attention of one token per sequence over the paged cache, long contexts cut into parts.

The same kernel may take the token in before it attends: normalise, rotate and store, what else is a kernel of its own.
Neighbours in the batch whose contexts begin with the same blocks read these once, for all of them (work.py): tensor
cores take 16 rows at least, of which one sequence fills but G.

Flash-decoding (Dao et al. 2023). The contexts of a batch are cut into parts of about one size, so few that most stay
whole: enough to fill the GPU at a small batch, and so that one long context does not keep a large batch waiting. A
program that has a whole context writes the result; those with parts leave a normalised partial result and the log2 of
its weights' sum each, and a second kernel combines them.
Shapes: B sequences, N query heads, K kv heads, G = N / K, H head_dim, I items of work (contexts and parts of them), R
sequences at most that read together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import (
    LOG2E,
    NEG_INF,
    Paging,
    as_tiles,
    dot,
    load_tile,
    log2,
    named_pallas_call,
    norm_rope,
    pallas_call,
    softmax_end,
    softmax_start,
    softmax_step,
    spread,
    tile_and_row,
)
from .work import PART, SHARED, UNUSED, WHOLE, list_work

LARGE_BATCH = 1024  # programs without any cut: from here on the GPU is full
COMBINED = 16  # at least so many parts are added up at a time
COMBINING = 64  # programs a head: where more sequences have parts, each adds up those of several


class Tiles(NamedTuple):
    """How the work is cut: keys to a tile, items beyond one a context, a program's warps and pipeline depth."""

    block_k: int
    extra: int
    num_warps: int
    num_stages: int


def default_tiles(batch: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Tiles:
    """Settings for an H200: small programs and hardly a cut where the batch fills the GPU."""
    size, programs = jnp.dtype(dtype).itemsize, batch * kv_heads
    large = programs >= LARGE_BATCH
    tile_bytes = 8192 if large and size == 2 else 16384
    block_k = max(16, min(128, tile_bytes // (head_dim * size)))
    extra = 16 if large else 64
    if size == 4 or not large:
        return Tiles(block_k, extra, num_warps=8 if size == 4 else 4, num_stages=3)
    # With a deep pipeline an SM has room for fewer programs at a time, which is faster where there are few in all and
    # their contexts differ.
    return Tiles(block_k, extra, num_warps=2, num_stages=5 if programs < 2 * LARGE_BATCH else 3)


def _decode_kernel(ref, *, rows: int, most: int, scale: float, eps: float, paging: Paging, block_k: int, on_gpu: bool):
    """most: how many sequences may read together; 1: none do, and items have four columns."""
    cache_ref, table_ref, item_ref = (ref[name] for name in ("kv_cache", "tables", "items"))
    o_ref, part_ref, lse_ref = (ref[name] for name in ("out", "part", "lse"))
    head, item = pl.program_id(0), pl.program_id(1)
    group, head_dim, layer = o_ref.shape[1] // paging.kv_heads, o_ref.shape[2], ref["layer"][0]
    b, first, last, kind = (item_ref[item, i] for i in range(4))
    members, place = (item_ref[item, i] for i in (4, 5)) if most > 1 else (1, item)
    row = jnp.arange(rows, dtype=jnp.int32)  # the G query heads of this kv head, padded to what tensor cores take

    def attend(q, context):
        def step(i, state):
            start = i * block_k
            valid = start + jnp.arange(block_k, dtype=jnp.int32) < context
            keys = paging.tile(layer, table_ref, b, head, start, context, block_k=block_k)
            scores = dot(q, load_tile(cache_ref, keys, block_k, valid), trans_b=True)
            scores = jnp.where(valid[None, :], scores, NEG_INF)
            v = load_tile(cache_ref, keys + paging.values, block_k, valid)
            return softmax_step(state, scores, v, scale=scale, fused_exp2=on_gpu)

        return lax.fori_loop(first, last, step, softmax_start(rows, head_dim))

    def log_sum(state):
        _, m, l = state
        return m * (scale * LOG2E) + jnp.log2(l)

    @pl.when(kind != UNUSED if most == 1 else (kind == WHOLE) | (kind == PART))
    def _():
        live, own, context = row < group, pl.ds(head * group, rows), ref["context_lens"][b]
        owns = last * block_k >= context
        q = _queries(ref, b, head, rows, group, eps=eps)
        if "q" not in ref:
            _store_token(ref, b, head, q, owns, paging, layer)
            if on_gpu:  # a program's threads are to see what others of them have stored
                plgpu.debug_barrier()
        state = attend(q, context)
        result = softmax_end(state)

        @pl.when(kind == WHOLE)
        def _():
            plgpu.store(o_ref.at[b, own, :], result.astype(o_ref.dtype), mask=live[:, None])

        @pl.when(kind == PART)
        def _():
            plgpu.store(part_ref.at[place, own, :], result, mask=live[:, None])
            plgpu.store(lse_ref.at[place, own], log_sum(state), mask=live)

    if most > 1:

        @pl.when(kind == SHARED)
        def _():
            number, member, shape = row >> log2(most), row & (most - 1), (rows, head_dim)

            def with_one_more(i, q):
                one = _queries(ref, b + i, head, rows // most, group, eps=eps)
                each = jnp.broadcast_to(one[:, None], (len(one), most, head_dim)).reshape(shape)
                return jnp.where(spread(member == i, shape), each, q)

            q = lax.fori_loop(0, members, with_one_more, jnp.zeros(shape, o_ref.dtype))
            state = attend(q, last * block_k)
            at, heads, live = place + member, head * group + number, (number < group) & (member < members)
            column = lax.broadcasted_iota(jnp.int32, shape, 1)
            to = part_ref.at[spread(at, shape), spread(heads, shape), column]
            plgpu.store(to, softmax_end(state), mask=live[:, None])
            plgpu.store(lse_ref.at[at, heads], log_sum(state), mask=live)


def _queries(ref, b, head, rows: int, group: int, *, eps: float) -> jax.Array:
    """[rows, H]: sequence b's queries of a kv head, then 0. A new token's are normalised and rotated, and its key too,
    which comes after them.
    """
    row = jnp.arange(rows, dtype=jnp.int32)
    if "q" in ref:
        return plgpu.load(ref["q"].at[b, pl.ds(head * group, rows), :], mask=(row < group)[:, None], other=0)
    qkv_ref = ref["qkv"]
    key, head_dim = group, qkv_ref.shape[3]
    half, shape = head_dim // 2, (rows, head_dim)
    column, line = lax.broadcasted_iota(jnp.int32, shape, 1), spread(row, shape)
    low = jnp.where(column < half, column, column - half)
    sequence, heads = jnp.full(shape, b, jnp.int32), jnp.full(shape, head, jnp.int32)

    def both(load):
        """Of each number of a head the one that it is rotated with too: first half, second half."""
        return [load(low + start) for start in (0, half)]

    halves = both(lambda at: plgpu.load(qkv_ref.at[sequence, heads, line, at], mask=line <= key, other=0))
    gains = both(lambda at: jnp.where(line < key, ref["q_gain"][at], ref["k_gain"][at]))
    angles = ref["cos"][sequence, low], ref["sin"][sequence, low]
    first, second = norm_rope(halves, gains, *angles, eps=eps, dtype=qkv_ref.dtype)
    return jnp.where(column < half, first, second).astype(qkv_ref.dtype)


def _store_token(ref, b, head, rotated, owns, paging: Paging, layer) -> None:
    """Store sequence b's new key, the row after the queries, and value: by the one that owns the context's end."""
    qkv_ref, cache_ref, slot = ref["qkv"], ref["kv_cache"], ref["slots"][b]
    key = qkv_ref.shape[2] - 2

    @pl.when(owns & (slot >= 0))
    def _():
        row = paging.row_of_slot(layer, slot, head)
        line = lax.broadcasted_iota(jnp.int32, rotated.shape, 0)
        new_key = jnp.where(line == key, rotated.astype(jnp.float32), 0).sum(axis=0)
        cache_ref[*tile_and_row(cache_ref, row), :] = new_key.astype(cache_ref.dtype)
        cache_ref[*tile_and_row(cache_ref, row + paging.values), :] = qkv_ref[b, head, key + 1, :]


def _combine_kernel(part_ref, lse_ref, cut_ref, _, o_ref, *, programs: int, **sizes: int):
    """Sum a query head's partial results of the cut sequences: one to a program, or more where there are more."""
    head, cut = pl.program_id(0), pl.program_id(1)
    num_cut = cut_ref[cut, 5] if cut_ref.shape[0] > programs else 1
    _combine(part_ref, lse_ref, cut_ref, o_ref, head, cut, **sizes)
    if cut_ref.shape[0] > programs:

        def another(turn, _):
            _combine(part_ref, lse_ref, cut_ref, o_ref, head, cut + turn * programs, **sizes)

        lax.fori_loop(1, pl.cdiv(num_cut - cut, programs), another, None)


def _combine(part_ref, lse_ref, cut_ref, o_ref, head, cut, *, apart: int, batch: int, most: int, at_once: int):
    """Sum the partial results of one cut sequence, at most so many, weighted by their share of the denominator.

    apart: of results that it shares, which follow its own, each is so far from the next; 1: it shares none.
    """
    b, first, count = (cut_ref[cut, i] for i in range(3))
    num_own, head_dim = count, o_ref.shape[2]
    if apart > 1:
        shared, num_shared = (cut_ref[cut, i] for i in (3, 4))
        count = num_own + num_shared

    def load(start, number):
        part = start + jnp.arange(number, dtype=jnp.int32)
        live = part < count
        if apart == 1:
            at = pl.ds(first + start, number)
            return plgpu.load(lse_ref.at[at, head], mask=live, other=NEG_INF), live, (at, head, slice(None))
        at = jnp.where(part < num_own, first + part, shared + (part - num_own) * apart)
        lse = plgpu.load(lse_ref.at[at, jnp.full_like(at, head)], mask=live, other=NEG_INF)
        shape = number, head_dim
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        return lse, live, (spread(at, shape), jnp.full(shape, head, jnp.int32), column)

    def load_parts(start):
        lse, live, at = load(start, at_once)
        return lse, plgpu.load(part_ref.at[at], mask=live[:, None], other=0)

    @pl.when(b < batch)
    def _():
        some = load_parts(0)  # on their way before `top` is waited for: most contexts have no more
        lse = some[0] if at_once == most else load(0, most)[0]
        top = lse.max(axis=0)

        def weighted(lse, part):
            return (part * jnp.exp2(lse - top)[:, None]).sum(axis=0)

        acc = weighted(*some)
        if at_once < most:

            def step(i, acc):
                return acc + weighted(*load_parts(i * at_once))

            acc = lax.fori_loop(1, pl.cdiv(count, at_once), step, acc)
        o_ref[b, head, :] = (acc / jnp.exp2(lse - top).sum(axis=0)).astype(o_ref.dtype)


def paged_decode_attention(
    q: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """nanovllm_jax.kernels.paged_decode_attention as two kernels, and one that all layers share."""
    cached = kv_cache, layer, block_tables, context_lens
    return _decode({"q": q}, *cached, q.shape, scale=scale, tiles=tiles, interpret=interpret)[0]


def store_and_decode(
    qkv: jax.Array,
    q_gain: jax.Array,
    k_gain: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.store_and_decode as paged_decode_attention's kernels, which take the tokens in too."""
    batch, kv_heads, parts, head_dim = qkv.shape
    new = {"qkv": qkv, "q_gain": q_gain, "k_gain": k_gain, "cos": cos, "sin": sin, "slots": slot_mapping}
    cached, shape = (kv_cache, layer, block_tables, context_lens), (batch, kv_heads * (parts - 2), head_dim)
    return _decode(new, *cached, shape, scale=scale, eps=eps, tiles=tiles, interpret=interpret)


def _decode(
    new: dict[str, jax.Array], kv_cache, layer, tables, context_lens, shape, *, scale, eps=0.0, tiles, interpret
) -> tuple[jax.Array, jax.Array]:
    """The output, of `shape` [B or more, N, H], and the cache, which is written unless `new` is queries alone.

    new: the arguments that the two functions above do not share, by the names that the kernel knows them by.
    """
    batch, dtype, (_, heads, head_dim), paging = len(context_lens), kv_cache.dtype, shape, Paging.of(kv_cache)
    tiles = tiles or default_tiles(batch, paging.kv_heads, head_dim, dtype)
    group, fused = heads // paging.kv_heads, "qkv" in new
    rows = max(16, pl.next_power_of_2(group + fused))
    together = rows // pl.next_power_of_2(group) if batch > 1 and tiles.extra > 1 else 1
    sizes = {"block_size": paging.block_size, "block_k": tiles.block_k, "extra": tiles.extra, "most": together}
    (items, cut), num_parts = list_work(tables, context_lens, **sizes, interpret=interpret)
    cached = {"kv_cache": as_tiles(kv_cache, tiles.block_k), "layer": layer[None]}
    batched = {"tables": tables, "context_lens": context_lens, "items": items}
    part = jax.ShapeDtypeStruct((num_parts, heads, head_dim), jnp.float32)
    outs = {"out": jax.ShapeDtypeStruct(shape, dtype), "part": part}
    outs |= {"lse": jax.ShapeDtypeStruct(part.shape[:-1], jnp.float32)}
    if fused:
        outs["kv_cache"] = jax.ShapeDtypeStruct(cached["kv_cache"].shape, dtype)
    results = named_pallas_call(
        _decode_kernel,
        new | cached | batched,
        outs,
        grid=(paging.kv_heads, len(items)),  # programs start in this order, the first index fastest
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        rows=rows,
        most=together,
        paging=paging,
        block_k=tiles.block_k,
        scale=scale,
        eps=eps,
        on_gpu=not interpret,
    )
    most, programs = pl.next_power_of_2(tiles.extra), min(len(cut), COMBINING)
    [out] = pallas_call(
        _combine_kernel,
        *(results["part"], results["lse"], cut, results["out"]),
        grid=(heads, programs),
        out_shape=[outs["out"]],
        aliases={3: 0},
        num_warps=4,
        interpret=interpret,
        programs=programs,
        apart=together,
        batch=batch,
        most=most,
        at_once=min(most, max(COMBINED, most // pl.next_power_of_2(batch))),  # a context's at a mean, or more
    )
    return out, (cached | results)["kv_cache"].reshape(kv_cache.shape)
