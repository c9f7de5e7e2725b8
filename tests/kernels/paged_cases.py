"""Random paged caches for the kernel tests, and attention in plain numpy float64 to hold everything against."""

from typing import NamedTuple

import numpy as np


class Paged(NamedTuple):
    """A cache [num_blocks, K, block_size, H] whose unused slots hold NaN, and tables whose unused entries are garbage."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    context_lens: np.ndarray


def paged(rng, contexts, *, kv_heads, head_dim, block_size, width, spare_blocks=2) -> Paged:
    used = [-(-context // block_size) for context in contexts]
    blocks = rng.permutation(sum(used) + spare_blocks)
    tables = rng.choice([-1, 2**30, -(2**31)], (len(contexts), width)).astype(np.int32)
    shape = (len(blocks), kv_heads, block_size, head_dim)
    k_cache, v_cache = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    at = 0
    for table, count, context in zip(tables, used, contexts, strict=True):
        table[:count] = blocks[at : at + count]
        at += count
        for i in range(context):
            slot = table[i // block_size], slice(None), i % block_size
            k_cache[slot], v_cache[slot] = rng.standard_normal((2, kv_heads, head_dim))
    return Paged(k_cache, v_cache, tables, np.array(contexts, np.int32))


def naive_attention(q, case: Paged, sequence: int, scale: float) -> np.ndarray:
    """Causal attention of the last len(q) tokens of one sequence, in float64: q [n, N, H] -> [n, N, H]."""
    kv_heads, block_size = case.k_cache.shape[1:3]
    context, (count, heads, _) = int(case.context_lens[sequence]), q.shape
    slots = [(case.block_tables[sequence, i // block_size], i % block_size) for i in range(context)]
    k, v = (np.array([c[block, :, offset] for block, offset in slots], np.float64) for c in case[:2])
    out = np.zeros(q.shape)
    for i in range(count):
        seen = context - count + i + 1
        for n in range(heads):
            scores = k[:seen, n // (heads // kv_heads)] @ q[i, n].astype(np.float64) * scale
            p = np.exp(scores - scores.max())
            out[i, n] = p @ v[:seen, n // (heads // kv_heads)] / p.sum()
    return out


def decode_expected(q, case: Paged, scale: float) -> np.ndarray:
    """What paged_decode_attention should return: q [B, N, H]."""
    rows = [naive_attention(q[b : b + 1], case, b, scale)[0] if n else 0 * q[b] for b, n in enumerate(case.context_lens)]
    return np.stack(rows)


def prefill_expected(q, case: Paged, query_starts, scale: float) -> np.ndarray:
    """What paged_prefill_attention should return: q [T, N, H]."""
    out = np.zeros(q.shape)
    for p, (start, end) in enumerate(zip(query_starts, query_starts[1:])):
        if end > start:
            out[start:end] = naive_attention(q[start:end], case, p, scale)
    return out
