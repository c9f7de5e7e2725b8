"""The next step is chosen just before the device is done with the last: neither earlier, nor too late for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.pacing import MARGIN, RECENT, Pacer

SHAPE, OTHER = (BatchShape(rows, 0, rows, 4) for rows in (4, 8))


class Clock:
    """Stands still until somebody sets it."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


def run_step(pacer, clock, shape, host, device, looks_after=0.0):
    """One step alone, chosen now; the host looks so long after its end, or waits for it."""
    chosen_at = clock.time
    clock.time += host
    pacer.dispatched(chosen_at)
    dispatched_at = clock.time
    clock.time += device + looks_after
    pacer.read(shape, dispatched_at, was_done=looks_after > 0)


def assert_forgotten_in_time(pacer, clock, host, steps):
    """That the host took so long once counts for so many steps, of one millisecond each, and then no more."""
    for _ in range(steps):
        run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    assert pacer.spare(SHAPE, clock.time) == pytest.approx(0.01 - host - MARGIN)
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    assert pacer.spare(SHAPE, clock.time) == pytest.approx(0.01 - 0.001 - MARGIN)


def test_what_was_never_seen_is_not_waited_for(clock):
    pacer = Pacer(clock)
    assert pacer.spare(SHAPE, clock.time) == 0
    run_step(pacer, clock, OTHER, host=0.001, device=0.02)
    assert pacer.spare(SHAPE, clock.time) == 0
    assert pacer.spare(OTHER, clock.time) == pytest.approx(0.02 - 0.001 - MARGIN)


def test_a_step_begins_when_the_device_has_done_the_one_before(clock):
    pacer = Pacer(clock)
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    dispatched_at = clock.time - 0.005  # while the device was busy
    assert pacer.spare(SHAPE, dispatched_at) == pytest.approx(0.01 - 0.001 - MARGIN)
    clock.time += 0.004
    assert pacer.spare(SHAPE, dispatched_at) == pytest.approx(0.01 - 0.001 - MARGIN - 0.004)
    clock.time += 0.006
    assert pacer.spare(SHAPE, dispatched_at) == 0


def test_the_slowest_of_the_last_steps_says_how_long_the_host_takes(clock):
    pacer = Pacer(clock)
    run_step(pacer, clock, SHAPE, host=0.003, device=0.01)
    assert_forgotten_in_time(pacer, clock, host=0.003, steps=RECENT - 1)


def test_a_host_that_comes_too_late_begins_earlier(clock):
    """As where other threads keep it, when it has slept until a step is to be chosen."""
    pacer = Pacer(clock)
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    dispatched_at, spare = clock.time, 0.01 - 0.001 - MARGIN
    assert pacer.spare(SHAPE, dispatched_at) == pytest.approx(spare)
    clock.time += spare + 0.002
    assert pacer.spare(SHAPE, dispatched_at) == 0
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    assert pacer.spare(SHAPE, clock.time) == pytest.approx(0.01 - 0.003 - MARGIN)
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)  # sooner than it had to: this says nothing new
    assert_forgotten_in_time(pacer, clock, host=0.003, steps=RECENT - 2)


def test_a_time_without_requests_is_not_the_hosts(clock):
    pacer = Pacer(clock)
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    dispatched_at = clock.time
    assert pacer.spare(SHAPE, dispatched_at) > 0
    clock.time += 0.01
    pacer.read(SHAPE, dispatched_at, was_done=False)  # there was nothing to choose
    clock.time += 60
    run_step(pacer, clock, SHAPE, host=0.001, device=0.01)
    assert pacer.spare(SHAPE, clock.time) == pytest.approx(0.01 - 0.001 - MARGIN)


def test_a_step_that_was_done_before_anybody_looked(clock):
    """Took less than it seems: that can only say that it takes less than was thought."""
    pacer = Pacer(clock)
    run_step(pacer, clock, SHAPE, host=0, device=0.01, looks_after=0.001)
    assert pacer.spare(SHAPE, clock.time) == 0, "nothing is known yet"
    run_step(pacer, clock, SHAPE, host=0, device=0.01)
    run_step(pacer, clock, SHAPE, host=0, device=0.012, looks_after=0.05)
    assert pacer.spare(SHAPE, clock.time) == pytest.approx(0.01 - MARGIN)
    run_step(pacer, clock, SHAPE, host=0, device=0.006, looks_after=0.001)
    assert pacer.spare(SHAPE, clock.time) == pytest.approx(0.007 - MARGIN)


@given(
    steps=st.lists(st.sampled_from([SHAPE, OTHER]), min_size=10, max_size=60),
    took=st.tuples(*[st.floats(1e-4, 0.1)] * 2),
    host=st.floats(1e-5, 0.02),
    reading=st.floats(0, 5e-5),
)
def test_the_device_never_waits_for_a_step_that_was_put_off(steps, took, host, reading):
    """With a host and a device that take what they took: the last moment but for the margin, or at once if that is
    too late."""
    clock = Clock()
    pacer, seen = Pacer(clock), set()
    in_flight = None
    for shape in steps:
        if in_flight:
            spare = pacer.spare(*in_flight[:2])
            left = in_flight[2] - clock.time
            known = in_flight[0] in seen
            assert spare == pytest.approx(max(0, left - host - MARGIN) if known else 0, abs=1e-9)
            clock.time += spare
        chosen_at = clock.time
        clock.time += host
        pacer.dispatched(chosen_at)
        before_done = in_flight[2] if in_flight else clock.time
        dispatched = shape, clock.time, max(clock.time, before_done) + took[shape is OTHER]
        if in_flight:
            was_done = clock.time > before_done
            assert not was_done or spare == 0
            clock.time = max(clock.time, before_done)
            pacer.read(*in_flight[:2], was_done)
            if not was_done:
                seen.add(in_flight[0])
            clock.time += reading
        in_flight = dispatched
