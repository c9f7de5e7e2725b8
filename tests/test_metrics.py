"""The times of a request, and what the engine says of itself."""

import time
from dataclasses import asdict, replace

import pytest
from small_model import assert_idle, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import metrics
from nanovllm_jax.engine.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


SIZES = dict(block_size=16, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("metrics") / "model"), num_kvcache_blocks=12)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] seconds."""
    time = [100.0]
    monkeypatch.setattr(metrics, "now", lambda: time[0])
    monkeypatch.setattr("nanovllm_jax.engine.door.now", lambda: time[0])
    return time


def tick(llm, clock):
    clock[0] += 1
    return llm.step()


def test_the_times_of_a_request(llm, clock):
    """Each is that of the step in which it happened: four rows run at a time, and the fifth request waits for one."""
    outputs = {}
    for i in range(5):
        clock[0] = 100 + i
        llm.add_request([i, 1], replace(GREEDY, max_tokens=3 + i), str(i))
    while llm.has_unfinished_requests():
        for output in tick(llm, clock):
            outputs[output.request_id] = output.metrics
    # A step's tokens are read while the next one runs.
    first = {i: outputs[str(i)] for i in range(5)}
    assert [first[i].arrival_time for i in range(5)] == [100, 101, 102, 103, 104]
    assert [first[i].first_scheduled_time for i in range(4)] == [105] * 4
    assert [first[i].time_in_queue for i in range(4)] == [5, 4, 3, 2]
    assert [first[i].first_token_time for i in range(4)] == [106] * 4
    assert [first[i].finished_time for i in range(4)] == [108, 109, 110, 111]
    assert first[4].first_scheduled_time == 109, "admitted by the step after the one that freed a row"
    assert first[4].first_token_time == 110
    assert first[4].finished_time == 116


def test_a_prompt_in_chunks_has_its_first_token_at_the_end(llm, clock):
    llm.add_request([7] * 120, replace(GREEDY, max_tokens=2))  # 64 tokens a step
    (output,) = [output for _ in range(4) for output in tick(llm, clock)]
    m = output.metrics
    assert (m.first_scheduled_time, m.first_token_time, m.finished_time) == (101, 103, 104)


def test_a_stream_shows_the_times_that_have_come(llm):
    before = time.time()
    first, *_, last = llm.stream([1, 2], replace(GREEDY, temperature=1, n=2))
    assert first.metrics is last.metrics
    m = last.metrics
    assert before - 1 < m.arrival_time <= m.first_scheduled_time <= m.first_token_time < m.finished_time
    assert m.finished_time < time.time() + 1
    llm.add_request([1, 2], GREEDY, "mine", stream=True)
    llm.step()
    m = llm._requests["mine"].metrics
    assert m.first_scheduled_time
    assert (m.first_token_time, m.finished_time) == (None, None)
    (output,) = llm.step()
    assert output.metrics.first_token_time
    assert not llm.metrics._starting
    llm.abort_request("mine")
    assert_idle(llm)


def test_a_new_engine_has_no_figures():
    stats = metrics.EngineMetrics().stats(Scheduler(num_blocks=20, **SIZES), [])
    assert {name: value for name, value in asdict(stats).items() if value} == {"num_free_blocks": 20, "num_blocks": 20}


def test_stats(llm, clock):
    llm.reset_prefix_cache()
    llm.metrics = metrics.EngineMetrics()
    llm.scheduler.num_prefix_query_tokens = llm.scheduler.num_prefix_hit_tokens = 0
    for i in range(6):
        llm.add_request([i] * 33, GREEDY, str(i))
    assert (llm.stats().num_running, llm.stats().num_waiting) == (0, 6)
    tick(llm, clock)
    tick(llm, clock)
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting) == (4, 2)
    assert (stats.num_free_blocks, stats.num_blocks) == (12 - 4 * 3, 12)
    assert (stats.num_prefill_tokens, stats.num_generated_tokens) == (64, 1), "one step was read, with 64 tokens"
    assert stats.prefill_tokens_per_second == 64 / 1, "the first step was dispatched a second ago"
    llm.abort_request("5")
    while llm.has_unfinished_requests():
        tick(llm, clock)
    llm.generate([4] * 33, GREEDY, use_tqdm=False)
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 12)
    assert (stats.num_finished_requests, stats.num_aborted_requests) == (6, 1)
    assert stats.num_generated_tokens == 6 * 6
    assert stats.prefix_cache_hit_rate == 32 / (6 * 33)
    assert stats.num_prefill_tokens + stats.num_decode_tokens >= 5 * 33 + 1 + 6 * 5
    clock[0] += 11
    assert (llm.stats().prefill_tokens_per_second, llm.stats().decode_tokens_per_second) == (0, 0)


def test_rates_look_back_ten_seconds(clock):
    """100 tokens a second for a minute, then 10 a second: however often there is a step."""
    m = metrics.EngineMetrics()
    for i in range(600):
        m.before_step()
        m.num_decode_tokens += 10 if i < 400 else 1
        clock[0] += 0.1
    prefill, decode = m._rates()
    assert prefill == 0
    assert decode == pytest.approx(10)
    assert len(m._samples) <= 21


def test_preemptions_and_failures_count(llm, monkeypatch):
    before = llm.stats()
    llm.generate([[i] for i in range(4)], replace(GREEDY, max_tokens=60), use_tqdm=False)
    assert llm.stats().num_preemptions == llm.scheduler.num_preemptions > before.num_preemptions
    assert llm.stats().num_generated_tokens - before.num_generated_tokens == 4 * 60

    def fails(*_):
        raise RuntimeError("no device")

    monkeypatch.setattr(llm.runner, "dispatch", fails)
    with pytest.raises(RuntimeError, match="no device"):
        llm.generate([[1], [2]], GREEDY, use_tqdm=False)
    stats = llm.stats()
    assert stats.num_aborted_requests - before.num_aborted_requests == 2
    assert (stats.num_running, stats.num_free_blocks) == (0, 12)
    monkeypatch.undo()
    assert len(llm.generate([1], GREEDY, use_tqdm=False)[0]["token_ids"]) == 6
    assert not llm.metrics._starting
