"""The block pool and its prefix cache. Numbers in names or comments are issues of nano-vllm that a test stands for."""

import time

import pytest

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.sequence import Sequence

SIZE = 4


def sequence(tokens) -> Sequence:
    return Sequence(0, "r", list(tokens), None, max_len=10_000)


def allocate(manager: BlockManager, tokens, published: bool = True) -> Sequence:
    """A sequence with blocks; its full blocks are published, as after a prefill."""
    seq = sequence(tokens)
    seq.num_computed = manager.allocate(seq)
    if published:
        manager.publish(seq, 0, len(tokens) // manager.block_size)
    return seq


def release(manager: BlockManager, *sequences: Sequence) -> None:
    for seq in sequences:
        manager.free(seq)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_allocation_covers_every_token_and_no_more(num_tokens, num_blocks):
    manager = BlockManager(8, SIZE)
    seq = allocate(manager, range(num_tokens))
    assert len(seq.block_table) == len(set(seq.block_table)) == num_blocks
    assert (manager.num_used_blocks, manager.num_free_blocks) == (num_blocks, 8 - num_blocks)
    manager.check([seq])
    manager.free(seq)
    assert (seq.block_table, manager.num_used_blocks) == ([], 0)
    manager.check([])


@pytest.mark.parametrize(
    ("num_tokens", "num_hit"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12), (16, 12)]
)
def test_a_fully_cached_prompt_leaves_a_token_to_compute(num_tokens, num_hit):
    """114, 117, 144, 199: a prompt of whole blocks that were all cached had no query token."""
    manager = BlockManager(16, SIZE)
    first = allocate(manager, range(num_tokens))
    again = allocate(manager, range(num_tokens))
    assert again.num_computed == num_hit
    assert again.block_table[: num_hit // SIZE] == first.block_table[: num_hit // SIZE]
    assert set(again.block_table[num_hit // SIZE :]).isdisjoint(first.block_table)
    manager.check([first, again])


def test_a_hash_lives_until_its_block_is_reused():
    """153, 163: a stale hash pointed to a block with new content. It is forgotten at reuse, not when freed."""
    manager = BlockManager(2, SIZE)
    release(manager, allocate(manager, range(8)))
    assert manager.num_cached_blocks == 2
    revived = allocate(manager, range(8))  # its second block is taken for new content: the last token's
    assert revived.num_computed == 4
    release(manager, revived)
    release(manager, allocate(manager, range(100, 108)))
    assert allocate(manager, range(8)).num_computed == 0
    assert manager.num_cached_blocks == 2  # of the new content alone


def test_of_the_same_content_the_block_that_is_owned_and_published_stays():
    """219, 243: identical prompts overwrote each other's hash."""
    manager = BlockManager(8, SIZE)
    first, second = allocate(manager, range(5), published=False), allocate(manager, range(5), published=False)
    manager.publish(first, 0, 1)
    manager.publish(second, 0, 1)
    manager.check([first, second])
    assert allocate(manager, range(5)).block_table[0] == first.block_table[0]
    release(manager, first)
    assert allocate(manager, range(5)).block_table[0] != second.block_table[0]
    assert manager.num_cached_blocks == 1


def test_a_free_block_gives_its_place_to_one_of_the_same_content():
    """It is blank then: what it depends on may be NaN, and gone."""
    manager = BlockManager(4, SIZE)
    second, first = allocate(manager, range(5), published=False), allocate(manager, range(5))
    release(manager, first)
    manager.publish(second, 0, 1)
    manager.check([second])
    assert manager.num_cached_blocks == 1
    assert allocate(manager, range(5)).block_table[0] == second.block_table[0]


def test_hits_in_the_free_pool_are_charged():
    """ATOM 902: a hit on a free block takes it from the free pool, so it is no cheaper than a fresh one."""
    manager = BlockManager(4, SIZE)
    release(manager, allocate(manager, range(9)))
    other = allocate(manager, range(100, 105))
    assert manager.num_free_blocks == 2
    seq = sequence(range(9))
    assert manager.allocate(seq) is None
    manager.check([other])
    manager.free(other)
    assert manager.allocate(seq) == 8


def test_hits_on_owned_blocks_are_free_of_charge():
    manager = BlockManager(4, SIZE)
    first = allocate(manager, range(9))
    second = allocate(manager, range(9))
    assert manager.num_free_blocks == 0
    manager.check([first, second])
    release(manager, first)
    assert manager.num_free_blocks == 1
    manager.check([second])


def test_hits_are_not_evicted_by_their_own_allocation():
    manager = BlockManager(3, SIZE)
    release(manager, allocate(manager, range(8)))
    seq = allocate(manager, range(12))  # two hits, free and least recently used, and one fresh block
    assert seq.num_computed == 8
    assert len(set(seq.block_table)) == 3
    manager.check([seq])


def test_a_refused_allocation_changes_nothing():
    manager = BlockManager(3, SIZE)
    release(manager, allocate(manager, range(8)))
    seq = sequence(range(16))
    assert manager.allocate(seq) is None
    assert (seq.block_table, manager.num_free_blocks, manager.num_cached_blocks) == ([], 3, 2)
    manager.check([])


def test_spare_blocks_stay_free():
    manager = BlockManager(5, SIZE)
    seq = sequence(range(12))
    assert manager.allocate(seq, num_spare=3) is None
    assert manager.allocate(seq, num_spare=2) == 0
    assert manager.num_free_blocks == 2


def test_a_sequence_grows_until_the_pool_is_empty():
    manager = BlockManager(2, SIZE)
    seq = allocate(manager, range(4))
    assert manager.append_block(seq)
    assert not manager.append_block(seq)
    assert len(set(seq.block_table)) == 2
    manager.check([seq])


def test_the_same_tokens_after_another_prefix_are_another_block():
    manager = BlockManager(16, SIZE)
    allocate(manager, [1, 1, 1, 1, 5, 6, 7, 8, 9])
    assert allocate(manager, [2, 2, 2, 2, 5, 6, 7, 8, 9]).num_computed == 0
    assert allocate(manager, [5, 6, 7, 8, 9]).num_computed == 0
    assert allocate(manager, [1, 1, 1, 1, 5, 6, 7, 8, 9]).num_computed == 8


def test_large_token_ids_are_told_apart():
    manager = BlockManager(16, SIZE)
    allocate(manager, [2**31 - 1] * 5)
    assert allocate(manager, [2**15 - 1] * 5).num_computed == 0
    assert allocate(manager, [255] * 5).num_computed == 0
    assert allocate(manager, [2**31 - 1] * 5).num_computed == 4


def test_blank_blocks_are_taken_before_cached_ones():
    manager = BlockManager(4, SIZE)
    release(manager, allocate(manager, range(8)))
    release(manager, allocate(manager, range(100, 108), published=False))
    assert manager.num_cached_blocks == 2
    assert allocate(manager, range(9)).num_computed == 8


def test_the_least_recently_freed_prefix_is_evicted_first():
    manager = BlockManager(3, SIZE)
    old, new = allocate(manager, [1] * 4), allocate(manager, [2] * 4)
    release(manager, old, new, allocate(manager, [3] * 4))
    release(manager, allocate(manager, [1] * 5))  # used again; its fifth token took the block of 2
    assert allocate(manager, [3] * 5, published=False).num_computed == 4


def test_a_prefix_is_evicted_from_its_end():
    manager = BlockManager(4, SIZE)
    release(manager, allocate(manager, range(12)))
    taker = allocate(manager, range(100, 108), published=False)  # the blank block, and one of the three cached ones
    manager.free(taker)
    assert allocate(manager, range(13)).num_computed == 8


def test_only_what_was_published_is_found():
    """ATOM 902: blocks whose keys and values nobody has computed yet were shared."""
    manager = BlockManager(16, SIZE)
    owner = allocate(manager, range(13), published=False)
    assert allocate(manager, range(13), published=False).num_computed == 0
    manager.publish(owner, 0, 2)
    assert allocate(manager, range(13), published=False).num_computed == 8
    manager.publish(owner, 2, 3)
    assert allocate(manager, range(13), published=False).num_computed == 12


def test_each_block_is_hashed_once():
    manager = BlockManager(8, SIZE)
    seq = sequence(range(16))
    blocker = allocate(manager, range(100, 130))
    assert manager.allocate(seq) is None
    digests = list(seq.block_hashes)
    assert len(digests) == 3
    assert manager.allocate(seq) is None
    assert all(kept is digest for kept, digest in zip(seq.block_hashes, digests, strict=True))
    manager.free(blocker)


def test_caching_can_be_switched_off():
    manager = BlockManager(8, SIZE, enable_prefix_caching=False)
    seqs = [allocate(manager, range(9)) for _ in range(2)]
    assert [seq.num_computed for seq in seqs] == [0, 0]
    assert manager.num_cached_blocks == 0
    assert seqs[0].block_hashes == []  # nor does it cost anything
    manager.check(seqs)


def test_reset_forgets_every_prefix():
    manager = BlockManager(8, SIZE)
    release(manager, allocate(manager, range(9)))
    manager.reset_prefix_cache()
    assert (manager.num_cached_blocks, manager.num_free_blocks) == (0, 8)
    manager.check([])
    assert allocate(manager, range(9)).num_computed == 0


def test_reset_is_refused_while_blocks_are_owned():
    manager = BlockManager(8, SIZE)
    allocate(manager, range(9))
    with pytest.raises(RuntimeError, match="requests hold 3 blocks"):
        manager.reset_prefix_cache()


def test_managers_of_different_block_sizes_live_side_by_side():
    """nano-vllm keeps the block size on the class."""
    small, large = BlockManager(8, 2), BlockManager(8, 16)
    assert [len(allocate(manager, range(9)).block_table) for manager in (small, large)] == [5, 1]


def test_an_operation_does_not_cost_the_pool():
    """In a pool 300 times as large, all of it cached, eviction and lookup take about as long."""

    def seconds(num_blocks: int) -> float:
        manager = BlockManager(num_blocks, 1)
        release(manager, allocate(manager, range(num_blocks)))
        start = time.process_time()
        for i in range(2_000):
            release(manager, allocate(manager, [-1 - i] * 3))
        return time.process_time() - start

    assert min(seconds(300_000) for _ in range(2)) < 20 * min(seconds(1_000) for _ in range(3))


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lambda m, seq: m._ref_counts.__setitem__(seq.block_table[0], 2), "ref count"),
        (lambda m, seq: m._free_blank.append(seq.block_table[0]), "free or owned"),
        (lambda m, seq: m._free_blank.append(m._free_blank[-1]), "free or owned"),
        (lambda m, seq: m._free_blank.pop(), "free or owned"),
        (lambda m, seq: m._hashes.__setitem__(m._free_blank[0], b"x"), "blank block is published"),
        (lambda m, seq: m._free_cached.update({m._free_blank.pop(): None}), "not published"),
        (lambda m, seq: m._hashes.__setitem__(seq.block_table[0], b"x"), "disagree"),
        (lambda m, seq: m._published.clear(), "disagree"),
    ],
)
def test_check_notices_broken_books(corrupt, complaint):
    manager = BlockManager(8, SIZE)
    seq = allocate(manager, range(9))
    manager.check([seq])
    corrupt(manager, seq)
    with pytest.raises(AssertionError, match=complaint):
        manager.check([seq])
