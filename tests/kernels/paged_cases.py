"""Random paged caches for the kernel tests, and attention in plain numpy float64 to hold everything against."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Paged(NamedTuple):
    """A cache [num_blocks, K, block_size, H] whose unused slots hold NaN, tables whose unused entries are garbage."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    context_lens: np.ndarray


def paged(rng, contexts, *, kv_heads, head_dim, block_size, width, spare_blocks=2) -> Paged:
    used = [-(-context // block_size) for context in contexts]
    blocks = rng.permutation(sum(used) + spare_blocks)
    tables = rng.choice([-1, 2**30, -(2**31)], (len(contexts), width)).astype(np.int32)
    caches = np.full((2, len(blocks), kv_heads, block_size, head_dim), np.nan, np.float32)
    at = 0
    for table, count, context in zip(tables, used, contexts, strict=True):
        own = table[:count] = blocks[at : at + count]
        at += count
        caches[:, own] = rng.standard_normal(caches[:, own].shape)
        if context % block_size:
            caches[:, own[-1], :, context % block_size :] = np.nan
    return Paged(*caches, tables, np.array(contexts, np.int32))


def naive_attention(q, case: Paged, sequence: int, scale: float) -> np.ndarray:
    """Causal attention of the last len(q) tokens of one sequence, in float64: q [n, N, H] -> [n, N, H]."""
    kv_heads, block_size = case.k_cache.shape[1:3]
    context, (count, heads, _) = int(case.context_lens[sequence]), q.shape
    block, offset = np.divmod(np.arange(context), block_size)
    block = case.block_tables[sequence, block]
    k, v = (cache[block, :, offset].astype(np.float64) for cache in (case.k_cache, case.v_cache))
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
    starts = np.concatenate([[0], np.cumsum(case.context_lens > 0)])  # a padded row has no query
    out = np.zeros(q.shape)
    out[case.context_lens > 0] = prefill_expected(q[case.context_lens > 0], case, starts, scale)
    return out


def prefill_expected(q, case: Paged, query_starts, scale: float) -> np.ndarray:
    """What paged_prefill_attention should return: q [T, N, H]."""
    out = np.zeros(q.shape)
    for p, (start, end) in enumerate(pairwise(query_starts)):
        if end > start:
            out[start:end] = naive_attention(q[start:end], case, p, scale)
    return out
