"""Preemption when blocks run out. Numbers in docstrings are issues of nano-vllm that a test stands for."""

import pytest
from simulated_device import SIZE, Simulation, chunks, prompt, simulate

from nanovllm_jax.engine.schedule import RunAhead
from nanovllm_jax.engine.sequence import Sequence, Status


def preempting(depth: int = 0) -> tuple[Simulation, Sequence, Sequence]:
    """Two sequences in a pool that cannot hold both; the second has just been preempted."""
    simulation = simulate(num_blocks=6, max_model_len=24)
    old, new = simulation.add(prompt(1, 7), max_tokens=15), simulation.add(prompt(2, 7), max_tokens=15)
    simulation.run_until(lambda: new.num_preemptions, depth)
    return simulation, old, new


def test_the_latest_arrival_is_preempted_and_prefills_again():
    """103, 144, 145: a preempted sequence was treated as decoding. The phase is state, not derived from counts."""
    simulation, old, new = preempting()
    assert (old.status, old.num_preemptions) == (Status.DECODE, 0)
    assert (new.status, new.num_preemptions) == (Status.WAITING, 1)
    assert (new.block_table, new.slot, new.num_computed) == ([], -1, 0)
    assert new.num_completion_tokens > 0
    simulation.run_until(lambda: old.is_finished)
    known = len(new.token_ids)
    schedule = simulation.dispatch()
    assert schedule.admitted == [new]
    start = new.num_computed - schedule.num_prefill_tokens
    assert start % SIZE == 0  # all but what the prefix cache still had
    assert chunks(schedule) == [(1, start, known)]
    simulation.drain()


def test_a_sequence_may_preempt_itself():
    simulation = simulate(num_blocks=5, max_model_len=20)
    old, new = simulation.add(prompt(1, 6), max_tokens=6), simulation.add(prompt(2, 7), max_tokens=9)
    simulation.run_until(lambda: new.num_preemptions)
    assert len(old.block_table) == 3  # the old one grew no more: the new one needed a block itself
    assert old.num_computed < 3 * SIZE
    simulation.drain()


def test_nobody_is_admitted_in_a_step_that_preempts():
    simulation = simulate(num_blocks=6, max_model_len=24)
    simulation.add(prompt(1, 8), max_tokens=15)
    simulation.add(prompt(2, 8), max_tokens=15)
    simulation.step()
    simulation.add(prompt(3, 1), max_tokens=1)
    for _ in range(5):  # position 12 of both needs a block
        assert simulation.scheduler.num_preemptions == 0
        schedule = simulation.dispatch()
        simulation.collect()
    assert simulation.scheduler.num_preemptions == 1
    assert schedule.admitted == []
    assert simulation.scheduler.block_manager.num_free_blocks > 0  # there was room
    simulation.drain()


def test_preempted_sequences_wait_in_arrival_order():
    simulation = simulate(num_blocks=14, max_model_len=50, max_num_seqs=6)
    for i in range(6):
        simulation.add(prompt(i, 7), max_tokens=40)
    simulation.add(prompt(6, 7), max_tokens=40)
    simulation.run_until(lambda: simulation.scheduler.num_preemptions == 3)
    assert list(simulation.scheduler.waiting) == [3, 4, 5, 6]
    simulation.drain()
    assert simulation.sequences[0].num_preemptions == 0


def test_a_preempted_sequence_waits_for_its_pending_tokens():
    simulation, old, new = preempting(depth=2)
    assert new.num_pending > 0
    simulation.abort(old)  # blocks are free now
    simulation.dispatch()
    assert (new.status, new.num_pending > 0) == (Status.WAITING, True)
    while simulation.in_flight:
        simulation.collect()
    assert new.num_pending == 0
    simulation.dispatch()
    assert new.status is Status.DECODE
    simulation.drain()


def test_a_preempted_sequence_can_finish_with_its_pending_tokens():
    simulation = simulate(num_blocks=5, max_model_len=20)
    old, new = simulation.add(prompt(1, 8), max_tokens=10), simulation.add(prompt(2, 7), max_tokens=2)
    for _ in range(6):  # position 12 of the old one needs a block
        simulation.dispatch()
    assert (new.status, new.num_pending) == (Status.WAITING, 2)
    while not new.is_finished:
        simulation.collect()
    assert list(simulation.scheduler.waiting) == []
    simulation.drain()
    assert old.num_preemptions == 0


def test_a_preempted_sequence_finds_its_own_blocks():
    simulation, old, new = preempting()
    simulation.abort(old)
    schedule = simulation.dispatch()
    assert new.status is Status.DECODE
    assert chunks(schedule) == [(1, 8, 13)]  # it had three full blocks; the old one took the last of them
    assert new.num_cached_tokens == 0  # that is told of the first admission
    assert simulation.scheduler.num_prefix_hit_tokens == 0


def test_a_sequence_in_prefill_can_be_preempted():
    simulation = simulate(num_blocks=8, max_num_batched_tokens=4, max_model_len=32)
    old, new = simulation.add(prompt(1, 4), max_tokens=28), simulation.add(prompt(2, 24), max_tokens=1)
    simulation.run_until(lambda: new.num_preemptions)
    assert new.num_completion_tokens == 0
    simulation.drain()
    assert old.num_preemptions == 0


def test_what_a_preempted_prompt_made_of_nan_is_computed_again():
    """It shares NaN, has blocks of its own that depend on it, and is preempted before it draws from them."""
    simulation = simulate(num_blocks=22, block_size=2, max_num_batched_tokens=18)
    faults = iter([True])
    simulation.device.is_faulty = lambda: next(faults, False)
    first = simulation.add([1] * 30, 2)
    simulation.dispatch()
    second = simulation.add([1] * 17 + [0] * 13, 9)
    simulation.dispatch()
    simulation.collect()
    simulation.drain()  # which sees that no NaN can be found
    assert (first.finish_reason, second.finish_reason) == ("error", "length")
    assert second.num_preemptions == 1


def test_a_share_of_the_pool_is_kept_for_those_who_run():
    simulation = simulate(num_blocks=100, max_model_len=400, max_num_batched_tokens=400)
    simulation.add(prompt(1, 4 * 50), max_tokens=50)
    simulation.step()
    second = simulation.add(prompt(2, 4 * 49), max_tokens=2)  # would leave one block; two are kept
    simulation.step()
    assert second.status is Status.WAITING
    simulation.abort(second)
    third = simulation.add(prompt(3, 4 * 47), max_tokens=2)
    simulation.step()
    assert third.status is Status.DECODE


def test_alone_a_sequence_may_fill_the_pool():
    simulation = simulate(num_blocks=100, max_model_len=401, max_num_batched_tokens=400)
    simulation.add(prompt(1, 400), max_tokens=1)
    simulation.drain()
    assert simulation.scheduler.num_preemptions == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_all_are_preempted_at_once(depth):
    """As for an update of the weights, at any time: in the middle of prompts, and with tokens still to be read."""
    simulation = simulate(num_blocks=30, max_num_batched_tokens=9, run_ahead=RunAhead(num_steps=3, rows=2))
    scheduler = simulation.scheduler
    for i in range(6):
        simulation.add([5] * 9 + [i] * i, max_tokens=4 * i + 1)
    while scheduler.has_unfinished:
        running, preempted = list(scheduler.running), scheduler.num_preemptions
        scheduler.preempt_all()
        simulation.check()
        assert scheduler.num_preemptions == preempted + len(running)
        assert list(scheduler.waiting)[: len(running)] == running
        assert not scheduler.running
        assert scheduler.block_manager.num_cached_blocks == scheduler.block_manager.num_used_blocks == 0
        while scheduler.waiting and not scheduler.running:  # until what was in flight has been read
            simulation.step(depth)
        for _ in range(5):
            if scheduler.has_unfinished:
                simulation.step(depth)
    simulation.drain(depth)
    assert scheduler.num_preemptions > 6
