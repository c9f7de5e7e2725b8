"""LLM.stream, and step() with stream=True: increments that join to what generate gives."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import GeneratorType

import pytest
from small_model import assert_idle, join, small_llm, whole, write_checkpoint
from tqdm import tqdm

from nanovllm_jax import SamplingParams

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [5, 6, 7, 8, 9]
# Of 512 tokens half are single bytes: such texts are full of broken characters, and many end inside one.
WILD = [SamplingParams(temperature=2, max_tokens=5 + seed, ignore_eos=True, seed=seed) for seed in range(12)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("stream") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    return small_llm(directory)


def test_a_stream_joins_to_what_generate_gives(llm):
    prompts = [[seed, 3] * (1 + 4 * seed) for seed in range(len(WILD))]
    expected = whole(llm.generate(prompts, WILD, use_tqdm=False))
    assert any(text.endswith("\ufffd") for ((text, _, _),) in expected), "no text ends inside a character"
    assert join(llm.stream(prompts, WILD)) == expected
    assert_idle(llm)


def test_several_tokens_in_one_program(directory):
    llm = small_llm(directory, num_scheduler_steps=4)
    prompts = [[seed, 3] for seed in range(4)]
    expected = whole(llm.generate(prompts, WILD[-4:], use_tqdm=False))
    outputs = list(llm.stream(prompts, WILD[-4:]))
    assert join(outputs) == expected
    assert max(len(output["token_ids"]) for output in outputs) == 4


def test_tokens_come_one_by_one(llm):
    outputs = list(llm.stream(PROMPT, GREEDY))
    assert [len(output["token_ids"]) for output in outputs] == [1] * 12
    assert [output.finished for output in outputs] == [False] * 11 + [True]
    assert {(output.prompt, tuple(output.prompt_token_ids)) for output in outputs} == {(None, tuple(PROMPT))}
    assert [output.outputs[0].finish_reason for output in outputs] == [None] * 11 + ["length"]


def test_what_a_stop_string_cuts_never_comes(llm):
    """Held back while it may be starting, and told where it was not one."""
    whole_text = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["text"]
    at = next(i for i in range(3, len(whole_text) - 2) if whole_text.find(whole_text[i : i + 3]) == i)
    stop = whole_text[at : at + 3]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop, whole_text[:2] + "never"])
    (expected,) = whole(llm.generate(PROMPT, params, use_tqdm=False))
    outputs = list(llm.stream(PROMPT, params))
    assert join(outputs) == [expected]
    assert (expected[0][0], expected[0][2]) == (whole_text[:at], "stop")
    assert outputs[-1].outputs[0].stop_reason == stop
    assert_idle(llm)


def test_token_ids_alone(llm, monkeypatch):
    expected = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]
    alone = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    assert join(llm.stream(PROMPT, alone)) == [[("", expected, "length")]]
    monkeypatch.setattr(llm, "door", replace(llm.door, tokenizer=None))
    assert join(llm.stream(PROMPT, GREEDY)) == [[("", expected, "length")]]


def test_checks_come_at_the_call(llm):
    for prompts, params, error, message in (
        ([[1], [600]], GREEDY, ValueError, "token id 600"),
        ([[1], [2]], [GREEDY], ValueError, "2 prompts need one SamplingParams or 2, not 1"),
        (PROMPT, {"n": 2}, TypeError, "must be a SamplingParams"),
        (None, None, TypeError, "prompts must be"),
    ):
        with pytest.raises(error, match=message):
            llm.stream(prompts, params)
    assert_idle(llm)
    assert list(llm.stream([])) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_closing_aborts_what_is_left(llm, count):
    stream = llm.stream([PROMPT, [1] * 60, [2] * 60, [3], [4], [5]], GREEDY)
    assert isinstance(stream, GeneratorType)
    for _ in range(count):
        next(stream)
    stream.close()
    assert_idle(llm)
    assert llm.scheduler.block_manager.num_used_blocks == 0
    assert len(llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


def test_a_consumer_that_fails_closes_it(llm):
    def consume():
        for output in llm.stream([PROMPT, [1, 2]], GREEDY):
            raise KeyError(output.request_id)

    with pytest.raises(KeyError):
        consume()
    assert_idle(llm)


def test_one_request_of_a_stream_is_aborted(llm):
    stream = llm.stream([PROMPT, [1, 2]], GREEDY)
    first = next(stream)
    other = str(int(first.request_id) + 1)
    llm.abort_request(other)
    tokens = first["token_ids"] + [
        token for output in stream if output.request_id != other for token in output["token_ids"]
    ]
    assert tokens == llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]
    assert_idle(llm)


def test_the_engine_is_the_streams_alone(llm):
    stream, later = llm.stream(PROMPT, GREEDY), llm.stream(PROMPT, GREEDY)
    first = next(stream)["token_ids"]
    calls = {
        "generate": lambda: llm.generate(PROMPT),
        "score": lambda: llm.score(PROMPT, [1]),
        "stream": lambda: next(later),
        "add_request": lambda: llm.add_request([1, 2], GREEDY),
        "step": llm.step,
    }
    tokens = []
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"{name}\(\) was called while a stream\(\) is open"):
            call()
        tokens += next(stream)["token_ids"]
    tokens += [token for output in stream for token in output["token_ids"]]
    assert first + tokens == llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]
    assert_idle(llm)


def test_the_engine_is_generates_alone(llm):
    """What is called between its steps, by the progress bar, would join its requests or take their outputs."""
    said = []

    class Bar(tqdm):
        def update(self, number=1):
            for call in (lambda: llm.add_request([1, 2], GREEDY), llm.step, lambda: llm.generate([3], GREEDY)):
                with pytest.raises(RuntimeError, match=r"was called while generate\(\) runs") as caught:
                    call()
                said.append(str(caught.value))

    prompts, params = [PROMPT, [1, 2], [3]], [SamplingParams(temperature=0, max_tokens=n) for n in (2, 4, 6)]
    outputs = llm.generate(prompts, params, use_tqdm=Bar)
    assert [len(output["token_ids"]) for output in outputs] == [2, 4, 6]
    assert len(said) == 9
    assert_idle(llm)


def test_a_stream_waits_for_a_call_that_is_refused(llm, monkeypatch):
    """Of another thread, which needs a moment to be told that the stream is open."""
    stream, inside, go_on = llm.stream(PROMPT, GREEDY), threading.Event(), threading.Event()
    tokens = next(stream)["token_ids"]
    check = llm._check_alone

    def slow(caller):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(10)
        check(caller)

    monkeypatch.setattr(llm, "_check_alone", slow)
    with ThreadPoolExecutor(1) as thread:
        refused = thread.submit(llm.generate, [1, 2], GREEDY)
        assert inside.wait(10)
        threading.Timer(0.05, go_on.set).start()
        tokens += [token for output in stream for token in output["token_ids"]]
        with pytest.raises(RuntimeError, match="a stream"):
            refused.result()
    assert tokens == llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]


def test_a_stream_goes_through_the_methods_that_others_call(llm, monkeypatch):
    """So that what is put around them, such as a clock, sees its steps too."""
    calls, step = [], llm.step
    monkeypatch.setattr(llm, "step", lambda: calls.append("step") or step(), raising=False)
    tokens = [token for output in llm.stream(PROMPT, GREEDY) for token in output["token_ids"]]
    assert len(calls) >= len(tokens)
    assert_idle(llm)


def test_a_stream_whose_start_fails_is_not_open(llm, monkeypatch):
    monkeypatch.setattr(llm.scheduler, "add", no_room)
    with pytest.raises(MemoryError):
        list(llm.stream([PROMPT, [1, 2]], GREEDY))
    monkeypatch.undo()
    llm.add_request([1, 2], GREEDY)
    while llm.has_unfinished_requests():
        llm.step()
    assert_idle(llm)


def no_room(seq):
    raise MemoryError


def test_an_old_stream_leaves_alone_who_has_its_ids_now(llm):
    """Ids may be used again after a request's end, of which the stream's caller knows before the stream does."""
    stream = llm.stream(PROMPT, GREEDY)
    last = next(output for output in stream if output.finished)
    assert llm.add_request([1, 2], GREEDY, request_id=last.request_id) == last.request_id
    stream.close()
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert [(output.prompt_token_ids, output.finished) for output in outputs] == [([1, 2], True)]
    assert_idle(llm)


def test_a_stream_does_not_run_who_has_its_ids_now(llm):
    short = SamplingParams(temperature=0, max_tokens=1)
    stream = llm.stream([PROMPT, [1, 2]], [short, GREEDY])
    first = next(output for output in stream if output.finished)
    with pytest.raises(RuntimeError, match=r"add_request\(\) was called while a stream\(\) is open"):
        llm.add_request([3], short, request_id=first.request_id)
    assert {tuple(output.prompt_token_ids) for output in stream} == {(1, 2)}
    assert_idle(llm)


# --- one's own loop ---


def test_requests_that_stream_and_requests_that_do_not(llm):
    prompts = [[seed, 3] * (1 + 4 * seed) for seed in range(6)]
    expected = whole(llm.generate(prompts, WILD[:6], use_tqdm=False))
    ids = [
        llm.add_request(prompt, params, stream=i % 2 == 0)
        for i, (prompt, params) in enumerate(zip(prompts, WILD, strict=False))
    ]
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert join(outputs) == expected
    for i, request_id in enumerate(ids):
        count = sum(output.request_id == request_id for output in outputs)
        assert count == (WILD[i].max_tokens if i % 2 == 0 else 1)
    assert_idle(llm)
