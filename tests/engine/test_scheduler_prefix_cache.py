"""How sequences share blocks. Numbers in docstrings are issues of nano-vllm (or ATOM) that a test stands for."""

import pytest
from simulated_device import SIZE, chunks, prompt, simulate


@pytest.mark.parametrize("length", [SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1, 3 * SIZE])
def test_a_cached_prompt_is_computed_from_its_last_block_on(length):
    """114, 117, 144, 199: zero query tokens for a cached prompt of whole blocks. Fully cached, exact multiples too."""
    simulation = simulate()
    simulation.add(prompt(1, length), max_tokens=3)
    simulation.drain()
    again = simulation.add(prompt(1, length), max_tokens=3)
    schedule = simulation.dispatch()
    num_cached = (length - 1) // SIZE * SIZE
    computed = len(schedule.decodes) + schedule.num_prefill_tokens
    assert (again.num_cached_tokens, computed) == (num_cached, length - num_cached)
    simulation.drain()
    scheduler = simulation.scheduler
    assert (scheduler.num_prefix_query_tokens, scheduler.num_prefix_hit_tokens) == (2 * length, num_cached)


def test_the_budget_counts_tokens_after_the_prefix_lookup():
    """207, 211, 233: budget from the full length, then a hit: the chunk ended behind the sequence."""
    simulation = simulate(max_num_batched_tokens=10)
    simulation.add(prompt(1, 21), max_tokens=1)
    simulation.drain()
    simulation.add(prompt(1, 21) + prompt(2, 4), max_tokens=3)
    simulation.add(prompt(3, 10), max_tokens=3)
    schedule = simulation.dispatch()
    assert chunks(schedule) == [(1, 20, 25), (2, 0, 5)]
    simulation.drain()


def test_identical_prompts_in_one_step_share_their_blocks():
    """219, 243: each got its own blocks. Here the first computes, the others start at its last full block."""
    simulation = simulate()
    seqs = [simulation.add(prompt(1, 11), max_tokens=6) for _ in range(4)]
    schedule = simulation.dispatch()
    assert chunks(schedule) == [(0, 0, 11), (1, 8, 11), (2, 8, 11), (3, 8, 11)]
    assert len({tuple(seq.block_table[:2]) for seq in seqs}) == 1
    assert len({seq.block_table[2] for seq in seqs}) == 4
    assert simulation.scheduler.block_manager.num_used_blocks == 2 + 4
    simulation.drain()


def test_decodes_that_share_blocks_are_neighbours():
    """The longest first, and with each those that share its first block: what more they share is side by side too."""
    simulation = simulate(max_num_batched_tokens=400, max_num_seqs=8)
    short, shared, more = prompt(9, SIZE + 1), prompt(1, 2 * SIZE), prompt(2, 2 * SIZE)
    prompts = [short, shared + prompt(3, 2), prompt(4, 40), shared + more + prompt(5, 3), shared, shared + more + [6]]
    seqs = [simulation.add(ids, max_tokens=9) for ids in prompts]
    simulation.dispatch()
    order = [seqs.index(seq) for seq in simulation.dispatch().decodes]
    assert order[0] == 2
    assert {*order[1:5]} == {1, 3, 4, 5}
    assert abs(order.index(3) - order.index(5)) == 1
    assert order[5] == 0
    simulation.drain()


def test_a_block_is_shared_only_once_it_is_scheduled():
    """ATOM 902: the hash was published before the keys and values were computed."""
    simulation = simulate(max_num_batched_tokens=6)
    simulation.add(prompt(1, 18), max_tokens=2)
    for computed in (6, 12):
        simulation.dispatch()
        assert simulation.scheduler.block_manager.num_cached_blocks == computed // SIZE
        simulation.collect()
    simulation.drain()


def test_generated_tokens_are_cached_for_the_next_turn():
    simulation = simulate()
    first = simulation.add(prompt(1, 5), max_tokens=12)
    simulation.drain()
    assert len(first.token_ids) == 17  # the last token is not computed: four full blocks
    second = simulation.add([*first.token_ids, 7, 7, 7], max_tokens=2)
    simulation.drain()
    assert second.num_cached_tokens == 16


def test_a_token_read_late_publishes_the_same_blocks():
    simulation = simulate()
    first = simulation.add(prompt(1, 5), max_tokens=12)
    simulation.drain(depth=3)
    second = simulation.add(first.token_ids, max_tokens=2)
    simulation.drain(depth=3)
    assert second.num_cached_tokens == 16
