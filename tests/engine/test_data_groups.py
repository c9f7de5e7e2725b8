"""Several schedulers as one: where requests go, and how their steps are joined. No device, no jax."""

import random

import pytest
from simulated_device import SimulatedDevice, expected_completion, prompt

from nanovllm_jax.engine.buckets import Buckets
from nanovllm_jax.engine.data_groups import DataGroups, GroupPacker
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.schedule import RunAhead
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence

OPTIONS = dict(num_blocks=20, block_size=4, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=60)


def groups_of(count, **options):
    return DataGroups(count, lambda: Scheduler(**(OPTIONS | options)))


class Run:
    """Groups with a simulated device each."""

    def __init__(self, count, **options):
        options = OPTIONS | options
        self.front = groups_of(count, **options)
        sizes = options["num_blocks"], options["block_size"], options["max_num_seqs"]
        self.devices = [SimulatedDevice(*sizes) for _ in range(count)]
        self.sequences = []

    def add(self, tokens, max_tokens=5, request_id=None):
        number = len(self.sequences)
        seq = Sequence(number, request_id or f"r{number}", tokens, None, max_len=len(tokens) + max_tokens)
        self.front.add(seq)
        self.sequences.append(seq)
        return seq

    def step(self):
        schedule = self.front.schedule()
        outputs = [device.run(part) for device, part in zip(self.devices, schedule.groups)]
        for step in range(schedule.num_steps):
            own = [output[step] if part else ([], []) for output, part in zip(outputs, schedule.groups)]
            decodes, prefills = ([token for tokens in kind for token in tokens] for kind in zip(*own))
            self.front.update(schedule, decodes, prefills)
        self.front.check()
        return schedule

    def drain(self):
        while self.front.has_unfinished:
            self.step()
        for seq in self.sequences:
            expected = expected_completion(seq.prompt_token_ids, seq.max_len, seq.stop_token_ids)
            assert (seq.completion_token_ids, seq.finish_reason) == expected


def test_requests_go_where_least_waits():
    run = Run(3)
    assert [run.add(prompt(number, 8)).group for number in range(6)] == [0, 1, 2, 0, 1, 2]
    assert run.add(prompt(9, 20)).group == 0
    assert run.add(prompt(10, 4)).group == 1
    run.drain()


def test_the_longest_cached_prefix_wins():
    run = Run(3)
    for number in range(3):
        run.add(prompt(number, 16))
    run.drain()
    for number in (2, 0, 1):
        again = run.add([*prompt(number, 16), 7])
        assert again.group == number
    run.drain()
    assert run.front.num_prefix_hit_tokens == 3 * 16


def test_a_cached_prefix_does_not_outweigh_a_long_queue():
    run = Run(2)
    shared = prompt(1, 16)
    run.add(shared)
    run.drain()
    groups = [run.add([*shared, number]).group for number in range(2, 8)]
    assert set(groups) == {0, 1}, "one group would do everything, and the other nothing"
    run.drain()


def test_a_step_is_full_when_every_groups_part_is():
    run = Run(2)
    fills = []
    for number in range(4):
        run.add(prompt(number, 16))
        fills.append(run.front.fills_a_step())
    assert fills == [False, False, False, True]
    assert [len(part.prefills) for part in run.step().groups] == [2, 2]
    run.drain()


def test_texts_of_a_request_stay_together():
    run = Run(2)
    run.add(prompt(1, 8))
    assert {run.add(prompt(2, 8), request_id="n").group for _ in range(4)} == {1}
    run.drain()


def test_a_request_under_an_ended_ones_id_is_another():
    run = Run(2)
    first, second, third = run.add(prompt(1, 20)), run.add(prompt(2, 16)), run.add(prompt(3, 4), request_id="n")
    assert (first.group, second.group, third.group) == (0, 1, 1)
    run.front.finish(third, "abort")
    run.front.finish(first, "abort")
    assert run.add(prompt(4, 4), request_id="n").group == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_work_gives_every_sequence_its_own_tokens(seed):
    """Several tokens a program too, with preemption in a small pool."""
    rng = random.Random(seed)
    run = Run(rng.choice([2, 3]), num_blocks=14, run_ahead=RunAhead(rng.choice([1, 2, 3]), rows=rng.choice([1, 4])))
    for _ in range(30):
        if rng.random() < 0.5:
            run.add(prompt(rng.randrange(3), rng.randint(1, 30)), rng.randint(1, 20))
        if run.front.has_unfinished:
            run.step()
        if rng.random() < 0.1:
            run.front.finish(rng.choice(run.sequences or [run.add([1])]), "abort")
    run.sequences = [seq for seq in run.sequences if seq.finish_reason != "abort"]
    run.drain()


def test_steps_ahead_need_every_busy_group():
    run = Run(2, run_ahead=RunAhead(3, rows=1))
    run.add(prompt(1, 8), 20)
    run.step()
    assert run.step().num_steps == 3, "the other group is idle"
    run.add(prompt(2, 8), 20)
    assert run.step().num_steps == 1, "the other group prefills"
    assert run.step().num_steps == 3
    run.add(prompt(3, 8), 20)
    assert run.step().num_steps == 1
    assert run.step().num_steps == 1, "one group has two rows"


def test_all_groups_are_packed_in_one_shape():
    """One that holds each group's part; and rows of the output are where that begins."""
    front = groups_of(2)
    buckets = Buckets((1, 4), ((4, 32),), 15)
    packer, alone = GroupPacker(2, buckets), BatchPacker(buckets)
    params = type("Params", (), dict(
        temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, frequency_penalty=0, presence_penalty=0,
        min_tokens=0, logprobs=None, logit_bias=None,
    ))  # fmt: skip
    for number, length in enumerate((8, 20, 3)):
        front.add(Sequence(number, str(number), prompt(number, length), params, max_len=length + 5))
    schedule = front.schedule()
    shape, buffer = packer.pack(schedule)
    assert len(buffer) == 2 * shape.size
    for number, part in enumerate(schedule.groups):
        fits = buckets.shape_for(part.sizes)
        assert shape.tokens >= fits.tokens
        view = shape.views(buffer[number * shape.size : (number + 1) * shape.size])
        tokens = [token for chunk in part.prefills for token in chunk.seq.token_ids]
        assert view.tokens[: len(tokens)].tolist() == tokens
    decodes, prefills, _ = packer.places(schedule, shape)
    assert decodes == []
    first, second = (list(alone.places(part, shape)[1]) for part in schedule.groups)
    assert prefills == [*first, *(shape.rows + row for row in second)]
