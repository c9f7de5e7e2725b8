"""Several steps in flight, and requests that end while they are."""

import pytest
from simulated_device import prompt, simulate

from nanovllm_jax.engine.schedule import RunAhead
from nanovllm_jax.engine.sequence import Status


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_no_step_is_scheduled_beyond_max_len(depth):
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), max_tokens=5)
    simulation.drain(depth)
    assert (seq.num_completion_tokens, simulation.num_steps) == (5, 5)


def test_several_steps_in_one_program_only_while_few_tokens_are_cached():
    simulation = simulate(run_ahead=RunAhead(num_steps=2, rows=2, tokens=18))
    for number in (1, 2):
        simulation.add(prompt(number, 6), max_tokens=10)
    simulation.drain()
    # The first step makes one token of each. Then 12, 16 and 20 are cached: two programs of two steps, five of one.
    assert (simulation.num_steps, simulation.num_steps_ahead) == (1 + 2 + 5, 2)


def test_a_sequence_alone_takes_several_steps_in_one_program():
    simulation = simulate(run_ahead=RunAhead(num_steps=4, rows=1))
    simulation.add(prompt(1, 6), max_tokens=20)
    simulation.add(prompt(2, 6), max_tokens=6)
    simulation.drain()
    # One token of each, then five of both to the shorter one's end. Of the 14 tokens that the other one has left then,
    # three programs of four: the last two end it.
    assert (simulation.num_steps, simulation.num_steps_ahead) == (1 + 5 + 3 + 2, 3 * 3)


def test_tokens_after_the_end_are_ignored():
    alone = simulate()
    reference = alone.add(prompt(1, 6), max_tokens=10)
    alone.drain()
    stop = frozenset(reference.completion_token_ids[:1])
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), 10, stop)
    for _ in range(4):
        simulation.dispatch()
    assert simulation.collect() == [seq]
    assert [simulation.collect() for _ in range(3)] == [[], [], []]
    assert (seq.num_completion_tokens, seq.finish_reason) == (1, "stop")


def test_blocks_freed_with_a_step_in_flight_serve_the_next_step():
    simulation = simulate(num_blocks=2, max_model_len=8)
    first = simulation.add(prompt(1, 7), max_tokens=1)
    simulation.dispatch()
    simulation.abort(first)
    second = simulation.add(prompt(2, 7), max_tokens=1)
    simulation.dispatch()
    assert second.status is Status.DECODE
    assert simulation.collect() == []
    assert simulation.collect() == [second]


# Abort


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("depth", [0, 2])
def test_abort_frees_everything_at_once_in_any_state(num_steps, depth):
    simulation = simulate(max_num_batched_tokens=5)
    seq, other = simulation.add(prompt(1, 9), max_tokens=9), simulation.add(prompt(2, 9), max_tokens=9)
    for _ in range(num_steps):
        simulation.step(depth)
    simulation.abort(seq)
    assert seq.finish_reason == "abort"
    simulation.abort(other)
    assert not simulation.scheduler.has_unfinished
    assert simulation.scheduler.block_manager.num_used_blocks == 0
    simulation.drain()


def test_aborting_what_has_finished_changes_nothing():
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), max_tokens=1)
    simulation.drain()
    simulation.abort(seq)
    assert seq.finish_reason == "length"


def test_the_engine_may_finish_a_sequence_for_its_own_reason():
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), max_tokens=9)
    simulation.step()
    simulation.scheduler.finish(seq, "stop")
    assert (seq.status, seq.finish_reason) == (Status.FINISHED, "stop")
    assert not simulation.scheduler.has_unfinished


def test_abort_all_leaves_no_cached_prefix_behind():
    """After a failed step, published blocks hold garbage."""
    simulation = simulate(max_num_seqs=2)
    seqs = [simulation.add(prompt(i, 9), max_tokens=9) for i in range(4)]
    simulation.step(depth=1)
    simulation.scheduler.abort_all()
    assert {seq.finish_reason for seq in seqs} == {"abort"}
    assert simulation.scheduler.block_manager.num_cached_blocks == 0
    simulation.drain()
    again = simulation.add(prompt(0, 9), max_tokens=9)
    simulation.drain()
    assert again.num_cached_tokens == 0
