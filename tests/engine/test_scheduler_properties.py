"""Random work on the scheduler with a simulated device behind it: whatever happens, every request gets the tokens that
it gets alone, the books balance after every call, and nobody waits forever."""

import math
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated_device import VOCAB, Simulation

from nanovllm_jax.engine.schedule import RunAhead, all_of_them

MAX_DEPTH = 3


def tightest_pool(max_model_len: int, block_size: int) -> int:
    """Blocks of the longest possible request: its last token is never computed."""
    return -(-(max_model_len - 1) // block_size)


def some_of_them(decodes: int, tokens: int) -> int:
    """As if there were a batch shape for every multiple of five, and never the time to pad."""
    return max(decodes + 1, tokens // 5 * 5)


class SchedulerMachine(RuleBasedStateMachine):
    """Hypothesis chooses the calls, and shrinks a failure to the shortest one."""

    @initialize(
        block_size=st.integers(1, 6),
        max_model_len=st.integers(2, 40),
        spare_blocks=st.integers(0, 12),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 30),
        caching=st.booleans(),
        num_steps=st.integers(1, 5),
        fitting=st.sampled_from([all_of_them, some_of_them]),
    )
    def start(self, block_size, max_model_len, spare_blocks, max_num_seqs, budget, caching, num_steps, fitting):
        self.num_faults = 0
        self.simulation = Simulation(
            num_blocks=tightest_pool(max_model_len, block_size) + spare_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            enable_prefix_caching=caching,
            run_ahead=RunAhead(num_steps, rows=3),
            fitting=fitting,
        )
        self.simulation.device.is_faulty = self.take_fault
        self.max_model_len = max_model_len

    def take_fault(self):
        self.num_faults -= 1
        return self.num_faults >= 0

    @rule(
        family=st.integers(0, 1),
        shared=st.integers(0, 30),
        own=st.lists(st.integers(0, 1), max_size=8),
        max_tokens=st.integers(1, 40),
        stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
    )
    def add(self, family, shared, own, max_tokens, stop):
        prompt = ([family] * shared + own)[: self.max_model_len - 1] or [family]
        self.simulation.add(prompt, max_tokens, stop)

    @precondition(lambda self: self.simulation.sequences)
    @rule(data=st.data())
    def continue_the_chat(self, data):
        seq = data.draw(st.sampled_from(self.simulation.sequences))
        self.simulation.add(seq.token_ids[: self.max_model_len - 1], 5)

    @precondition(lambda self: self.simulation.sequences)
    @rule(data=st.data())
    def abort(self, data):
        self.simulation.abort(data.draw(st.sampled_from(self.simulation.sequences)))

    @rule(rarely=st.integers(0, 9))
    def fail(self, rarely):
        if rarely == 0:
            self.simulation.fail()

    @rule(count=st.integers(1, 3))
    def let_the_next_tokens_be_nan(self, count):
        self.num_faults = count

    @precondition(lambda self: len(self.simulation.in_flight) < MAX_DEPTH + 1)
    @rule()
    def dispatch(self):
        self.simulation.dispatch()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def collect(self):
        self.simulation.collect()

    @rule(depth=st.integers(0, MAX_DEPTH), count=st.integers(1, 10))
    def run_on(self, depth, count):
        for _ in range(count):
            self.simulation.step(depth)

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=400, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerMachine = SchedulerMachine.TestCase


def random_simulation(rng: random.Random) -> Simulation:
    block_size = rng.choice((1, 2, 3, 4, 4, 8, 16))
    max_model_len = rng.randint(2, 90)
    # From a pool that one request fills to one that holds all, and to one so large that a share of it is kept spare.
    extra = rng.choice((0, 1, rng.randint(0, 10), rng.randint(0, 200)))
    max_num_seqs = rng.randint(1, 12)
    return Simulation(
        num_blocks=tightest_pool(max_model_len, block_size) + extra,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice((rng.randint(1, max_num_seqs), rng.randint(1, 20), rng.randint(20, 150))),
        max_model_len=max_model_len,
        enable_prefix_caching=rng.random() < 0.85,
        run_ahead=RunAhead(
            num_steps=rng.choice((1, 2, 4, 7)),
            rows=rng.randint(1, max_num_seqs),
            tokens=math.inf if rng.random() < 0.8 else rng.randint(0, 200),
        ),
        fitting=rng.choice((all_of_them, some_of_them)),
    )


def random_prompt(rng: random.Random, simulation: Simulation, longest: int) -> list[int]:
    """New, or the start of another request's tokens, or all of them: a chat goes on."""
    prompt = []
    if simulation.sequences and rng.random() < 0.6:
        tokens = rng.choice(simulation.sequences[-20:]).token_ids.tolist()
        prompt = tokens[: rng.choice((len(tokens), rng.randint(0, len(tokens))))]
    if not prompt or rng.random() < 0.5:
        prompt = prompt + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 1 + longest // rng.choice((1, 4))))]
    return prompt[:longest]


def run_random_workload(seed: int, num_steps: int) -> dict[str, int]:
    """Drive one random simulation; returns how often the interesting things happened."""
    rng = random.Random(seed)
    simulation = random_simulation(rng)
    scheduler = simulation.scheduler
    arrival_rate, abort_rate = rng.choice((0.05, 0.2, 0.6)), rng.choice((0.0, 0.02, 0.1))
    fail_rate, nan_rate = rng.choice((0.0, 0.0, 0.02)), rng.choice((0.0, 0.0, 0.002, 0.02))
    end_rate, preempt_rate = rng.choice((0.0, 0.05)), rng.choice((0.0, 0.0, 0.02))
    simulation.device.is_faulty = lambda: rng.random() < nan_rate
    depth = rng.randint(0, MAX_DEPTH)
    for _ in range(num_steps):
        if not simulation.live or (rng.random() < arrival_rate and len(scheduler.waiting) < 10):
            for _ in range(rng.choice((1, 1, 3))):
                prompt = random_prompt(rng, simulation, scheduler.max_model_len - 1)
                stop = frozenset(rng.sample(range(VOCAB), rng.choice((0, 0, 0, 1, 3))))
                max_tokens = rng.randint(1, scheduler.max_model_len)
                for i in range(rng.choice((1, 1, 1, 3))):  # n texts of a prompt, of which the first may score it
                    seq = simulation.add(prompt, max_tokens, stop)
                    if i == 0 and rng.random() < 0.1:
                        simulation.score_prompt(seq)
        if simulation.live and rng.random() < abort_rate:
            simulation.abort(rng.choice(simulation.live))
        if simulation.live and rng.random() < end_rate:
            simulation.end(rng.choice(simulation.live))
        if rng.random() < preempt_rate:
            scheduler.preempt_all()
            simulation.check()
        if rng.random() < 0.05:
            depth = rng.randint(0, MAX_DEPTH)
        if rng.random() < fail_rate:
            simulation.fail()
        simulation.step(depth)
    simulation.drain(depth)
    scheduler.block_manager.reset_prefix_cache()
    assert not scheduler.block_manager.num_cached_blocks
    simulation.check()
    return {
        "steps": simulation.num_steps,
        "steps ahead": simulation.num_steps_ahead,
        "failures": simulation.num_failures,
        "errors": simulation.num_errors,
        "preemptions": scheduler.num_preemptions,
        "hit tokens": scheduler.num_prefix_hit_tokens,
        "stops": sum(seq.finish_reason == "stop" for seq in simulation.sequences),
        "lengths": sum(seq.finish_reason == "length" for seq in simulation.sequences),
        "aborts": sum(seq.finish_reason == "abort" for seq in simulation.sequences),
    }


def run_random_workloads(seeds: range, num_steps: int) -> dict[str, int]:
    totals: dict[str, int] = {}
    for seed in seeds:
        for name, count in run_random_workload(seed, num_steps).items():
            totals[name] = totals.get(name, 0) + count
    return totals


def test_random_workloads():
    totals = run_random_workloads(range(440), 150)
    # The workloads are worth something only while they reach what they are for.
    assert totals["steps"] > 100_000
    assert min(totals["preemptions"], totals["stops"], totals["lengths"], totals["aborts"]) > 1_000, totals
    assert totals["hit tokens"] > 20_000, totals
    assert totals["steps ahead"] > 5_000, totals
    assert totals["failures"] > 200, totals
    assert totals["errors"] > 1_000, totals


@pytest.mark.slow
def test_random_workloads_for_long():
    assert run_random_workloads(range(1_000, 7_000), 200)["steps"] > 1_000_000
