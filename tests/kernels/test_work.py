"""The list of work of decode attention: each key is read once by whom it concerns, and results are found again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_jax.kernels import decode, work

NAMES = ("block_size", "block_k", "extra", "most")
interpreted = jax.jit(functools.partial(work.list_work, interpret=True), static_argnames=NAMES)


def list_work(tables, contexts, **sizes):
    """As NumPy arrays (items in use, cut sequences), and the room for partial results."""
    (items, cut), room = jax.tree.map(np.asarray, interpreted(tables, contexts, **sizes))
    return items[items[:, 3] != work.UNUSED], cut[cut[:, 0] < len(contexts)], room


# Each size is compiled anew, so there are few: batch, block size, block_k, extra, most. Alone, each two go together.
ALONE = [(1, 256, 16, 1, 1), (1, 256, 64, 16, 1), (1, 256, 128, 64, 1), (3, 256, 16, 16, 1), (3, 256, 64, 64, 1)]
ALONE += [(3, 256, 128, 1, 1), (40, 256, 16, 64, 1), (40, 256, 64, 1, 1), (40, 256, 128, 16, 1)]
TOGETHER = [(2, 16, 16, 2, 8), (2, 256, 64, 64, 2), (17, 16, 128, 16, 4), (40, 256, 128, 16, 8), (40, 256, 16, 64, 2)]
LONGEST = 70_000


@st.composite
def batches(draw, sizes):
    """(tables, contexts, sizes by name): rows that share leading blocks or not, garbage where there are none."""
    batch, *sizes = draw(st.sampled_from(sizes))
    contexts = draw(st.lists(st.integers(0, 3) | st.integers(0, LONGEST), min_size=batch, max_size=batch))
    width = LONGEST // sizes[0] + 2
    tables = np.arange(batch * width).reshape(batch, width)
    for row in range(1, batch):
        same = draw(st.just(0) | st.integers(0, width))
        tables[row, :same] = tables[row - 1, :same]
    return tables.astype(np.int32), np.array(contexts, np.int32), dict(zip(NAMES, sizes))


@settings(deadline=None, max_examples=60)
@given(batches(ALONE))
def test_each_key_is_in_one_item_of_work(batch):
    tables, contexts, sizes = batch
    block_k, extra = sizes["block_k"], sizes["extra"]
    used, cut, room = list_work(tables, contexts, **sizes)
    assert len(used) <= room == len(contexts) + extra
    share = max(1, -(-sum(-(-c // block_k) for c in contexts) // extra))
    assert (used[:, 2] - used[:, 1] <= share).all(), "items of about one size"
    for b, context in enumerate(contexts):
        _, first, last, kind = used[used[:, 0] == b].T
        assert (first[1:] == last[:-1]).all()
        assert (first[0], last[-1]) == (0, -(-context // block_k))
        assert (first < last).all() or context == 0
        assert set(kind) == {work.PART if len(kind) > 1 else work.WHOLE}
    parts = [
        (b, np.flatnonzero(used[:, 0] == b)[0], (used[:, 0] == b).sum())
        for b in np.unique(used[used[:, 3] == work.PART, 0])
    ]
    np.testing.assert_array_equal(cut, np.reshape(parts, (-1, 3)))
    assert cut[:, 2].max(initial=0) <= extra, "as many as the kernel combines"


@settings(deadline=None, max_examples=40)
@given(batches(TOGETHER))
def test_each_key_is_read_once_alone_or_together(batch):
    tables, contexts, sizes = batch
    block_size, block_k, extra, most = (sizes[name] for name in NAMES)
    rows, tiles = len(contexts), -(-contexts // block_k)
    items, cut, room = list_work(tables, contexts, **sizes)
    parts, read = {}, np.zeros((rows, max(1, tiles.max())), int)
    for row, first, last, kind, members, place in items:
        assert first < last or contexts[row] == 0
        assert members == 1 if kind != work.SHARED else 1 < members <= most
        for i in range(members):
            read[row + i, first:last] += 1
            if kind == work.SHARED:
                blocks = -(-last * block_k // block_size)
                assert (tables[row + i, :blocks] == tables[row, :blocks]).all()
                assert last * block_k < contexts[row + i], "the newest token is nobody else's"
            if kind == work.WHOLE:
                assert (first, last) == (0, tiles[row])
            else:
                assert place + i not in parts
                parts[place + i] = row + i
    np.testing.assert_array_equal(read, np.arange(read.shape[1]) < tiles[:, None])
    found = {}
    for row, own, num_own, apart, num_apart, cuts in cut:
        assert cuts == len(cut)
        assert num_own + num_apart <= extra, "as many as the kernel combines"
        found |= dict.fromkeys([*range(own, own + num_own)], row)
        found |= dict.fromkeys([apart + i * most for i in range(num_apart)], row)
    assert found == parts
    assert max(parts, default=0) < room


def test_neighbours_that_have_more_in_common_read_together():
    """All have a block in common, and four times three of them six."""
    tables = np.arange(12 * 8).reshape(12, 8)
    tables[:, 0] = 0
    for row in range(12):
        tables[row, 1:6] = tables[row - row % 3, 1:6]
    sizes = dict(block_size=64, block_k=32, extra=8, most=8)
    items, *_ = list_work(tables.astype(np.int32), np.full(12, 8 * 64, np.int32), **sizes)
    together = items[items[:, 3] == work.SHARED, :5]
    np.testing.assert_array_equal(together, [[row, 0, 12, work.SHARED, 3] for row in (0, 3, 6, 9)])


@pytest.mark.parametrize("batch", [1, 8])  # more have 128 items uncut
def test_defaults_fill_the_gpu(batch):
    tiles = decode.default_tiles(batch, 8, 128, jnp.bfloat16)
    sizes = dict(block_size=256, block_k=tiles.block_k, extra=tiles.extra, most=min(batch, 8))
    tables = np.arange(batch * 4, dtype=np.int32).reshape(batch, 4)
    items, *_ = list_work(tables, np.full(batch, 1000, np.int32), **sizes)
    assert 8 * len(items) >= 128
