"""The list of work of decode attention: each key is read once by whom it concerns, and results are found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_jax.kernels import decode, work

cut_contexts = jax.jit(work.cut_contexts, static_argnums=(1, 2))
cut_together = jax.jit(work.cut_together, static_argnums=(2, 3, 4))
shared_tiles = jax.jit(work.shared_tiles, static_argnums=(2, 3, 4))


@st.composite
def batches(draw):
    """(tables, contexts, block size, block_k): rows that share leading blocks or not, garbage where there are none."""
    batch, block_size = draw(st.sampled_from([2, 16, 40])), draw(st.sampled_from([16, 256]))
    contexts = draw(st.lists(st.integers(0, 3) | st.integers(0, 10_000), min_size=batch, max_size=batch))
    width = max(contexts) // block_size + 2
    tables = np.arange(batch * width).reshape(batch, width)
    for row in range(1, batch):
        same = draw(st.just(0) | st.integers(0, width))
        tables[row, :same] = tables[row - 1, :same]
    return tables.astype(np.int32), np.array(contexts, np.int32), block_size, draw(st.sampled_from([16, 64, 128]))


@settings(deadline=None, max_examples=60)  # each size is compiled anew
@given(
    contexts=st.sampled_from([1, 3, 40]).flatmap(
        lambda n: st.lists(st.integers(0, 3) | st.integers(0, 70_000), min_size=n, max_size=n)
    ),
    block_k=st.sampled_from([16, 64, 128]),
    extra=st.sampled_from([1, 16, 64]),
)
def test_each_key_is_in_one_item_of_work(contexts, block_k, extra):
    items, cut = jax.tree.map(np.asarray, cut_contexts(np.array(contexts), block_k, extra))
    used = items[items[:, 3] != work.UNUSED]
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
    np.testing.assert_array_equal(cut[cut[:, 0] < len(contexts)], np.reshape(parts, (-1, 3)))
    assert cut[:, 2].max(initial=0) <= extra, "as many as the kernel combines"


@settings(deadline=None, max_examples=40)  # each size is compiled anew
@given(batches(), st.sampled_from([2, 16, 64]), st.sampled_from([2, 4, 8]))
def test_each_key_is_read_once_alone_or_together(batch, extra, most):
    tables, contexts, block_size, block_k = batch
    rows, tiles = len(contexts), -(-contexts // block_k)
    shared = shared_tiles(tables, contexts, block_size, block_k, most)
    items, cut = map(np.asarray, cut_together(contexts, shared, block_k, extra, most))
    parts, read = {}, np.zeros((rows, max(1, tiles.max())), int)
    for row, first, last, kind, members, place in items[items[:, 3] != work.UNUSED]:
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
        assert cuts == (cut[:, 0] < rows).sum()
        if row < rows:
            assert num_own + num_apart <= extra, "as many as the kernel combines"
            found |= dict.fromkeys([*range(own, own + num_own)], row)
            found |= dict.fromkeys([apart + i * most for i in range(num_apart)], row)
    assert found == parts
    assert max(parts, default=0) < len(items) + (most - 1) * (rows // 2 + extra)


def test_neighbours_that_have_more_in_common_read_together():
    """All have a block in common, and four times three of them six."""
    tables = np.arange(12 * 8).reshape(12, 8)
    tables[:, 0] = 0
    for row in range(12):
        tables[row, 1:6] = tables[row - row % 3, 1:6]
    leader, members, tiles = shared_tiles(tables.astype(np.int32), np.full(12, 8 * 64, np.int32), 64, 32, 8)
    np.testing.assert_array_equal(leader, np.arange(12) // 3 * 3)
    np.testing.assert_array_equal(members[::3], [3] * 4)
    np.testing.assert_array_equal(tiles, [12] * 12)


@pytest.mark.parametrize("batch", [1, 8])  # more have 128 items uncut
def test_defaults_fill_the_gpu(batch):
    tiles = decode.default_tiles(batch, 8, 128, jnp.bfloat16)
    items, _ = cut_contexts(np.full(batch, 1000), tiles.block_k, tiles.extra)
    assert 8 * (items[:, 3] != work.UNUSED).sum() >= 128
