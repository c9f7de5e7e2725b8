"""Random paged caches for the kernel tests, and attention in plain numpy float64 to hold everything against."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

LAYERS, LAYER = 3, 1  # of the cache, and the one that is looked at


class Paged(NamedTuple):
    """A cache whose unused slots hold NaN, and so do other layers, and tables whose unused entries are garbage."""

    kv_cache: np.ndarray
    layer: np.int32
    block_tables: np.ndarray
    context_lens: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """The layer's keys and values, a view: [2, num_blocks, K, block_size, H]."""
        return self.kv_cache[:, self.layer]


def in_layers(own: np.ndarray, fill: float = np.nan) -> tuple[np.ndarray, np.int32]:
    """A cache with these keys and values [2, num_blocks, K, block_size, H] in one layer, and its number."""
    kv_cache = np.full((2, LAYERS, *own.shape[1:]), fill, own.dtype)
    kv_cache[:, LAYER] = own
    return kv_cache, np.int32(LAYER)


def block_tables(rng, contexts, block_size, width, spare_blocks=2) -> tuple[np.ndarray, int]:
    """(tables [len(contexts), width] into a pool in random order, garbage where unused; the pool's size)."""
    used = [-(-context // block_size) for context in contexts]
    blocks = rng.permutation(sum(used) + spare_blocks)
    tables = rng.choice([-1, 2**30, -(2**31)], (len(contexts), width)).astype(np.int32)
    for table, start, end in zip(tables, np.cumsum([0, *used]), np.cumsum(used)):
        table[: end - start] = blocks[start:end]
    return tables, len(blocks)


def paged(rng, contexts, *, kv_heads, head_dim, block_size, width, spare_blocks=2) -> Paged:
    tables, num_blocks = block_tables(rng, contexts, block_size, width, spare_blocks)
    caches = np.full((2, num_blocks, kv_heads, block_size, head_dim), np.nan, np.float32)
    for table, context in zip(tables, contexts, strict=True):
        own = table[: -(-context // block_size)]
        caches[:, own] = rng.standard_normal(caches[:, own].shape, np.float32)
        if context % block_size:
            caches[:, own[-1], :, context % block_size :] = np.nan
    return Paged(*in_layers(caches), tables, np.array(contexts, np.int32))


def with_shared_blocks(case: Paged, prefixes) -> Paged:
    """The case with tables that begin alike: prefixes (first row, rows, blocks). Blocks that fall out become NaN."""
    tables = case.block_tables.copy()
    for first, rows, blocks in prefixes:
        assert (blocks * case.own.shape[3] < case.context_lens[first : first + rows]).all()
        tables[first : first + rows, :blocks] = tables[first, :blocks]
    used = -(-case.context_lens // case.own.shape[3])
    before, after = ({b for table, n in zip(t, used) for b in table[:n]} for t in (case.block_tables, tables))
    case.own[:, [*(before - after)]] = np.nan
    return case._replace(block_tables=tables)


class NewTokens(NamedTuple):
    """Projections of one new token per sequence, and where it goes in the cache: -1 for an empty context."""

    qkv: np.ndarray
    q_gain: np.ndarray
    k_gain: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    slot_mapping: np.ndarray


def new_tokens(rng, case: Paged, group: int) -> NewTokens:
    """New tokens that are their contexts' last ones; in `case` their slots become NaN, and so does what is padding."""
    (_, _, kv_heads, block_size, head_dim), batch = case.own.shape, len(case.context_lens)
    live, last = case.context_lens > 0, np.maximum(case.context_lens - 1, 0)
    block, offset = case.block_tables[np.arange(batch), last // block_size], last % block_size
    for cache in case.own:
        cache[block[live], :, offset[live]] = np.nan
    qkv = rng.standard_normal((batch, kv_heads, group + 2, head_dim))
    qkv[~live] = np.nan
    angles = rng.uniform(0, 100, (batch, head_dim // 2))
    floats = (qkv, *rng.uniform(0.5, 2, (2, head_dim)), np.cos(angles), np.sin(angles))
    slots = np.where(live, block * block_size + offset, -1).astype(np.int32)
    return NewTokens(*(x.astype(np.float32) for x in floats), slots)


def naive_attention(q, case: Paged, sequence: int, scale: float, positions=None) -> np.ndarray:
    """Causal attention of the last len(q) tokens of one sequence, or of those at `positions`, in float64.

    q [n, N, H] -> [n, N, H].
    """
    kv_heads, block_size = case.own.shape[2:4]
    context, (count, heads, _) = int(case.context_lens[sequence]), q.shape
    positions = np.arange(context - count, context) if positions is None else positions
    key = np.arange(context)
    block, offset = case.block_tables[sequence, key // block_size], key % block_size
    k, v = (cache[block, :, offset].astype(np.float64) for cache in case.own)
    out = np.zeros(q.shape)
    for n in range(heads):
        own = n // (heads // kv_heads)
        scores = q[:, n].astype(np.float64) @ k[:, own].T * scale
        scores[key > positions[:, None]] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, n] = p @ v[:, own] / p.sum(axis=1, keepdims=True)
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
