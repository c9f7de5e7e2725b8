"""The policy, case by case. Numbers in docstrings are issues of nano-vllm (or ATOM) that a test stands for."""

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import SIZE, chunks, prompt, rows, simulate

from nanovllm_jax.engine.sequence import Sequence, Status

# A few that begin alike, for up to three blocks, or are the beginnings themselves; and whether they are scored.
PROMPTS = st.lists(
    st.tuples(
        st.builds(
            lambda number, shared, own: prompt(number, shared) + own,
            st.sampled_from([1, 2]),
            st.sampled_from([4, 8]) | st.integers(1, 14),
            st.just([]) | st.lists(st.sampled_from([3, 4]), max_size=6),
        ),
        st.sampled_from([False, False, True]),
    ),
    max_size=5,
)

# Life of a request


def test_a_request_prefills_then_decodes_until_max_len():
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), max_tokens=3)
    schedule = simulation.dispatch()
    assert (chunks(schedule), rows(schedule), schedule.admitted) == ([(0, 0, 6)], [], [seq])
    assert simulation.collect() == []
    schedule = simulation.dispatch()
    assert (chunks(schedule), rows(schedule), schedule.admitted) == ([], [0], [])
    assert simulation.collect() == []
    simulation.dispatch()
    assert simulation.collect() == [seq]
    assert (seq.finish_reason, seq.num_completion_tokens) == ("length", 3)
    assert not simulation.scheduler.has_unfinished
    assert not simulation.scheduler.schedule()


@pytest.mark.parametrize("other", [-1, 1000])
def test_each_of_several_stop_tokens_ends_a_sequence(other):
    """nano-vllm honours one EOS id; Qwen3 has two."""
    alone = simulate()
    tokens = alone.add(prompt(1, 6), max_tokens=8)
    alone.drain()
    stop = tokens.completion_token_ids[3]
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), 8, frozenset({stop, other}))
    simulation.drain()
    assert seq.finish_reason == "stop"
    assert seq.completion_token_ids[-1] == stop


def test_a_stop_token_in_the_prompt_does_not_end_it():
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), 1, frozenset({1}))
    simulation.drain()
    assert seq.num_completion_tokens == 1


def test_a_stop_token_at_max_len_counts_as_stop():
    alone = simulate()
    first = alone.add(prompt(1, 6), max_tokens=1)
    alone.drain()
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), 1, frozenset(first.completion_token_ids))
    simulation.drain()
    assert seq.finish_reason == "stop"


@pytest.mark.parametrize("max_len", [6, 61])
def test_what_can_never_run_is_refused(max_len):
    with pytest.raises(AssertionError):
        simulate().scheduler.add(Sequence(0, "r", prompt(1, 6), None, max_len=max_len))


def test_a_sequence_larger_than_the_pool_is_refused():
    """nano-vllm waits for ever for blocks that do not exist."""
    scheduler = simulate(num_blocks=2).scheduler
    with pytest.raises(AssertionError):
        scheduler.add(Sequence(0, "r", prompt(1, 6), None, max_len=2 * SIZE + 2))
    scheduler.add(Sequence(0, "r", prompt(1, 6), None, max_len=2 * SIZE + 1))  # the last token needs no place


def test_an_empty_prompt_and_a_repeated_id_are_refused():
    scheduler = simulate().scheduler
    with pytest.raises(AssertionError):
        scheduler.add(Sequence(0, "r", [], None, max_len=6))
    scheduler.add(Sequence(1, "r", [1], None, max_len=6))
    with pytest.raises(AssertionError):
        scheduler.add(Sequence(1, "r", [1], None, max_len=6))


# Steps: what goes into one


def test_running_sequences_decode_beside_a_long_prompt():
    """Prefill first starves decode: here every running sequence gets its token in every step."""
    simulation = simulate(max_num_batched_tokens=10)
    simulation.add(prompt(1, 4), max_tokens=20)
    simulation.step()
    simulation.add(prompt(2, 30), max_tokens=5)
    seen = []
    for _ in range(4):
        schedule = simulation.dispatch()
        assert rows(schedule)[0] == 0
        seen += chunks(schedule)
        simulation.collect()
    assert seen == [(1, 0, 9), (1, 9, 18), (1, 18, 27), (1, 27, 30)]


@pytest.mark.parametrize("budget", range(1, SIZE + 2))
def test_chunks_tile_the_prompt(budget):
    """212, 213: a chunk's context is what is computed plus what is scheduled, never the whole sequence."""
    simulation = simulate(max_num_batched_tokens=budget, max_num_seqs=1)
    seq = simulation.add(prompt(1, 11), max_tokens=4)
    position = 0
    while position < 11:
        assert seq.status in (Status.WAITING, Status.PREFILL)
        schedule = simulation.dispatch()
        computed = len(schedule.decodes) + schedule.num_prefill_tokens
        assert computed == min(budget, 11 - position)
        position += computed
        assert seq.num_computed == position
        assert seq.num_pending == (position == 11)
        simulation.collect()
    assert seq.num_completion_tokens == 1
    simulation.drain()


def test_the_last_token_of_a_prompt_alone_is_a_decode_row():
    simulation = simulate(max_num_batched_tokens=5)
    simulation.add(prompt(1, 6), max_tokens=3)
    schedule = simulation.dispatch()
    assert not schedule.prefills[0].samples
    simulation.collect()
    schedule = simulation.dispatch()
    assert (rows(schedule), chunks(schedule)) == ([0], [])
    simulation.collect()
    assert simulation.sequences[0].num_completion_tokens == 1


def test_a_token_that_completes_a_block_is_no_decode_row():
    """Others share the block in this very step: it is to be stored before any of them attends."""
    simulation = simulate(max_num_batched_tokens=8)
    for tokens in (prompt(9, 5), [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        simulation.add(tokens, max_tokens=3)
    assert chunks(simulation.dispatch()) == [(0, 0, 5), (1, 0, 3)]
    schedule = simulation.dispatch()
    assert (sorted(rows(schedule)), chunks(schedule)) == ([0, 2], [(1, 3, 4)])
    assert simulation.sequences[2].block_table[0] == simulation.sequences[1].block_table[0]
    simulation.drain()


def test_a_chunk_of_one_token_in_the_middle_is_no_decode_row():
    simulation = simulate(max_num_batched_tokens=1)
    simulation.add(prompt(1, 3), max_tokens=3)
    schedule = simulation.dispatch()
    assert (rows(schedule), chunks(schedule)) == ([], [(0, 0, 1)])


@pytest.mark.parametrize("length", [SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1])
def test_a_block_is_added_exactly_at_the_boundary(length):
    """30, 65, 66, 71, 91, 150, 152, 240: position p lies in block p // block_size, so that b blocks are full at
    position b * block_size, and not one token before or after."""
    simulation = simulate()
    seq = simulation.add(prompt(1, length), max_tokens=10)
    simulation.step()
    for _ in range(9):
        simulation.dispatch()
        assert len(seq.block_table) == -(-seq.num_computed // SIZE)
        simulation.collect()


def test_nobody_overtakes_the_first_in_the_queue():
    simulation = simulate(num_blocks=12)
    simulation.add(prompt(1, 30), max_tokens=10)
    simulation.step()
    large, small = simulation.add(prompt(2, 30), 2), simulation.add(prompt(3, 2), 2)
    while large.status is Status.WAITING:
        assert small.status is Status.WAITING
        simulation.step()
    assert small.status is Status.DECODE  # it fits beside
    simulation.drain()


def test_a_full_step_is_known_before_all_are_there():
    simulation = simulate(max_num_batched_tokens=20)
    fills = []
    for tokens in (prompt(1, 8), [*prompt(1, 8), 2], prompt(3, 8), prompt(4, 3), prompt(4, 1)):
        simulation.add(tokens, max_tokens=1)
        fills.append(simulation.scheduler.fills_a_step())
    assert fills == [False, False, False, False, True], "the second may share the first one's blocks"
    simulation.drain()
    for number in (3, 5):  # cached but for the block that ends it, and new
        simulation.add(prompt(number, 8), max_tokens=1)
    simulation.add(prompt(6, 7), max_tokens=1)
    assert not simulation.scheduler.fills_a_step()
    simulation.add(prompt(7, 1), max_tokens=1)
    assert simulation.scheduler.fills_a_step()
    simulation.drain()
    for number in (1, 2, 2):  # all of these may share a block, if not all of it can be found
        seq = simulation.add(prompt(8, 4) + [number] * 7, max_tokens=1)
        simulation.score_prompt(seq)
    simulation.add(prompt(8, 4), max_tokens=1)
    assert not simulation.scheduler.fills_a_step()


@settings(deadline=None, max_examples=300)
@given(
    before=PROMPTS,
    prompts=PROMPTS,
    options=st.fixed_dictionaries(
        {"max_num_batched_tokens": st.integers(1, 30), "enable_prefix_caching": st.sampled_from([True, True, False])}
    ),
)
def test_what_is_added_later_does_not_change_a_full_step(before, prompts, options):
    schedules = []
    for stops_early in (True, False):
        simulation = simulate(**options)
        for tokens, _ in before:
            simulation.add(tokens, max_tokens=2)
        simulation.drain()
        for tokens, is_scored in prompts:
            seq = simulation.add(tokens, max_tokens=2)
            if is_scored:
                simulation.score_prompt(seq)
            if stops_early and simulation.scheduler.fills_a_step():
                break
        schedule = simulation.dispatch()
        schedules.append((chunks(schedule), rows(schedule)))
        simulation.drain()
    assert schedules[0] == schedules[1]


def test_slots_limit_the_running_sequences():
    simulation = simulate(max_num_seqs=2)
    for i in range(3):
        simulation.add(prompt(i, 3), max_tokens=4)
    simulation.step()
    assert [seq.slot >= 0 for seq in simulation.sequences] == [True, True, False]
    slots = {seq.slot for seq in simulation.sequences[:2]}
    assert slots == {0, 1}
    simulation.abort(simulation.sequences[0])
    simulation.step()
    assert {seq.slot for seq in simulation.sequences[1:]} == slots


# The rest


def test_tokens_must_match_the_schedule():
    scheduler = simulate().scheduler
    scheduler.add(Sequence(0, "r", prompt(1, 6), None, max_len=9))
    schedule = scheduler.schedule()
    with pytest.raises(ValueError, match="zip"):
        scheduler.update(schedule, [1], [1])


def test_two_schedulers_live_side_by_side():
    """nano-vllm keeps block size and sequence counter on the class: two engines in one process clash."""
    small, large = simulate(block_size=2, num_blocks=60), simulate(block_size=16, num_blocks=8)
    for simulation in (small, large):
        simulation.add(prompt(1, 21), max_tokens=20)
    while small.scheduler.has_unfinished or large.scheduler.has_unfinished:
        for simulation in (small, large):
            simulation.step()
    assert small.sequences[0].token_ids == large.sequences[0].token_ids


def test_aborting_a_waiting_sequence_does_not_search_the_queue():
    """deque.remove is linear in the queue; here the middle of a long queue goes as fast as that of a short one."""

    def seconds(num_waiting: int) -> float:
        scheduler = simulate().scheduler
        seqs = [Sequence(i, "r", [1], None, max_len=2) for i in range(num_waiting)]
        for seq in seqs:
            scheduler.add(seq)
        middle = seqs[num_waiting // 2 - 250 : num_waiting // 2 + 250]
        start = time.process_time()
        for seq in middle:
            scheduler.finish(seq, "abort")
        return time.process_time() - start

    assert min(seconds(30_000) for _ in range(2)) < 20 * min(seconds(500) for _ in range(3))


def test_scheduling_works_without_jax_and_numpy():
    code = """if True:
        import importlib.util, sys, types
        package = types.ModuleType("nanovllm_jax")  # without the __init__, which imports the whole engine
        package.__path__ = importlib.util.find_spec("nanovllm_jax").submodule_search_locations
        sys.modules |= {"nanovllm_jax": package, "jax": None, "flax": None, "numpy": None, "transformers": None}
        from nanovllm_jax.engine import block_manager, scheduler, sequence
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# Broken books


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lambda s, seq: s._free_slots.append(seq.slot), "each slot"),
        (lambda s, seq: s.waiting.update({9: seq}), "DECODE"),
        (lambda s, seq: setattr(seq, "num_computed", 99), "computed=99"),
        (lambda s, seq: setattr(seq, "num_pending", 1), "pending=1"),
        (lambda s, seq: setattr(seq, "status", Status.WAITING), "WAITING"),
        (lambda s, seq: seq.block_table.pop(), "ref count"),
        (lambda s, seq: s.running.update({0: s.running.pop(0)}), "arrival order"),
    ],
)
def test_check_notices_broken_books(corrupt, complaint):
    simulation = simulate()
    seq = simulation.add(prompt(1, 6), max_tokens=9)
    simulation.add(prompt(2, 6), max_tokens=9)
    simulation.step()
    corrupt(simulation.scheduler, seq)
    with pytest.raises(AssertionError, match=complaint):
        simulation.scheduler.check()
