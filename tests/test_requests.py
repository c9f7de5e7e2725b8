"""What ends a text, a loop of one's own with aborts in every state, defaults of the model, and logprobs in outputs."""

import copy
import gc
import itertools
import json
import pickle
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
from small_model import assert_idle, small_llm, whole, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.logprobs import TokenTexts, entries_of, own_logprobs, together
from nanovllm_jax.engine.sequence import Status
from nanovllm_jax.outputs import Logprob, Logprobs
from nanovllm_jax.sampling_params import MAX_LOGPROBS

pytestmark = pytest.mark.usefixtures("programs_kept")

PROMPT = [137]  # after which the random model's greedy text is free of broken characters
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("requests") / "model")


@pytest.fixture(scope="module", params=[1, 4])
def llm(directory, request):
    return small_llm(directory, num_scheduler_steps=request.param)


@pytest.fixture(scope="module")
def expected(llm):
    """The greedy completion of PROMPT."""
    (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    assert "\ufffd" not in output["text"], "choose another prompt"
    return output.outputs[0]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
def test_an_engine_that_is_dropped_is_gone(directory, options):
    """With its memory, and no garbage collection: it does not refer to itself, and no call keeps what callers hold."""
    gc.collect()
    gc.disable()
    try:
        llm = small_llm(directory, **options)
        outputs = llm.generate([PROMPT, PROMPT], replace(GREEDY, max_tokens=3, logprobs=1), use_tqdm=False)
        llm.score([PROMPT], [outputs[0]["token_ids"]], use_tqdm=False)
        llm.update_weights(llm.model)
        parts = [weakref.ref(part) for part in (llm, llm.runner, llm.runner.cache, llm.scheduler)]
        del llm
        assert [part() for part in parts] == [None] * 4
    finally:
        gc.enable()


def test_a_start_looks_for_garbage_once(directory):
    """When all is made: a look takes tenths of a second, and the next would come while requests run."""
    looks = []
    gc.collect()  # so that none is due
    gc.callbacks.append(lambda phase, info: looks.append((phase, info["generation"])))
    try:
        small_llm(directory)
    finally:
        gc.callbacks.pop()
    assert looks == [("start", 2), ("stop", 2)]
    assert gc.isenabled()


def test_a_sequence_is_queued_with_all_that_is_wanted_of_it(llm, monkeypatch):
    """Where it goes depends on the prompt's tokens that it will find in a cache: with prompt_logprobs on none."""
    add, first_needed = llm.scheduler.add, []

    def look(seq):
        first_needed.append(seq.first_needed)
        add(seq)

    monkeypatch.setattr(llm.scheduler, "add", look)
    generate(llm, replace(GREEDY, prompt_logprobs=0))
    assert first_needed == [0]


def generate(llm, params, prompts=(PROMPT,)):
    """The first prompt's completion; nothing is left behind."""
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    assert_idle(llm)
    return outputs[0].outputs[0]


# --- stop strings ---


def first_time(text, length, start=3):
    """Where a string of this length occurs for the first time, a few characters into the text."""
    return next(at for at in range(start, len(text) - length) if text.find(text[at : at + length]) == at)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text(llm, expected, length, include):
    at = first_time(expected.text, length)
    stop = expected.text[at : at + length]
    params = replace(GREEDY, stop=["never in it", stop], include_stop_str_in_output=include)
    for prompts in ([PROMPT], [PROMPT, [1] * 60, [2, 3]]):
        output = generate(llm, params, prompts)
        assert output.text == expected.text[: at + length * include]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == expected.token_ids[: len(output.token_ids)]
        assert stop in llm.tokenizer.decode(output.token_ids)
        assert stop not in llm.tokenizer.decode(output.token_ids[:-1]), "it ran on after the stop string"
        assert not llm._stopping


def test_a_stop_string_that_never_comes(llm, expected):
    assert generate(llm, replace(GREEDY, stop="never in it")) == expected


def test_a_stop_string_in_the_last_token_allowed(llm, expected):
    count = 9
    text = llm.tokenizer.decode(expected.token_ids[:count])
    before = llm.tokenizer.decode(expected.token_ids[: count - 1])
    stop = text[len(before) - 1 :]
    assert text.find(stop) == len(before) - 1, "choose another count"
    output = generate(llm, replace(GREEDY, stop=stop, max_tokens=count))
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert (output.text, output.token_ids) == (text[: -len(stop)], expected.token_ids[:count])


def test_the_next_request_gets_what_a_stop_string_freed(llm, expected):
    """Steps that were dispatched before the host saw the text deliver to nobody."""
    at = first_time(expected.text, 2)
    params = replace(GREEDY, stop=expected.text[at : at + 2])
    prompts = [PROMPT, *([i, i] for i in range(9))]
    alone = whole(llm.generate([prompt], GREEDY, use_tqdm=False)[0] for prompt in prompts[1:])
    outputs = llm.generate(prompts, [params] + [GREEDY] * 9, use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "stop"
    assert whole(outputs[1:]) == alone


# --- stop tokens ---


def fresh_token(expected, start=3):
    """Where a token that has not come before comes."""
    tokens = expected.token_ids
    return next(at for at in range(start, len(tokens)) if tokens[at] not in tokens[:at])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_text(llm, expected, include):
    at = fresh_token(expected)
    token = expected.token_ids[at]
    output = generate(llm, replace(GREEDY, stop_token_ids=[token, 511], include_stop_str_in_output=include))
    assert output.token_ids == expected.token_ids[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert output.text == llm.tokenizer.decode(expected.token_ids[: at + include])


def test_min_tokens(llm, expected):
    """However the device sees to it: no stop token among the first tokens, and no stop string completed by them."""
    at = fresh_token(expected, start=0)
    stops = expected.token_ids[: at + 1]
    params = replace(GREEDY, stop_token_ids=stops, stop=list(expected.text[:4]), min_tokens=6)
    output = generate(llm, params)
    assert len(output.token_ids) > 6
    output = generate(llm, replace(params, min_tokens=24))
    assert (len(output.token_ids), output.finish_reason) == (24, "length")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_puts_off_the_end_of_sequence_tokens_also_where_they_are_ignored(llm, ignore_eos):
    """As in vLLM."""
    eos = min(llm.eos_token_ids)
    params = replace(GREEDY, max_tokens=8, ignore_eos=ignore_eos, logit_bias={eos: 100})
    assert generate(llm, params).token_ids == [eos] * (8 if ignore_eos else 1)
    tokens = generate(llm, replace(params, min_tokens=5)).token_ids
    assert eos not in tokens[:5]
    assert tokens[5:] == [eos] * (3 if ignore_eos else 1)


def test_special_tokens_in_the_text(llm):
    special, prompt = 508, [1, 2, 3]
    biased = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, stop_token_ids=[special])
    request_id = llm.add_request(prompt, replace(biased, include_stop_str_in_output=True, skip_special_tokens=False))
    (seq,) = (completion.seq for completion in llm._requests[request_id].completions)
    seq.token_ids.extend([70, special])  # as if the model had generated them
    llm.scheduler.finish(seq, "stop")
    (completion,) = llm._requests[request_id].completions
    assert completion.take_output().text == llm.tokenizer.decode([70]) + "<|im_start|>"
    llm.abort_request(request_id)
    assert_idle(llm)


# --- a loop of one's own ---


def test_max_tokens_none_goes_to_the_models_limit(llm):
    output = generate(llm, replace(GREEDY, max_tokens=None, min_tokens=1000))
    assert (len(output.token_ids), output.finish_reason) == (128 - len(PROMPT), "length")


def states(llm, num_steps):
    """Add more requests than run at a time, some with long prompts; their states so many steps on."""
    prompts = [PROMPT, [1] * 20, [2] * 100, [3], [4], [5] * 30]
    ids = [llm.add_request(prompt, GREEDY, stream=i % 2 == 0) for i, prompt in enumerate(prompts)]
    for _ in range(num_steps):
        llm.step()
    found = {}
    for request_id in ids:
        ((seq),) = (completion.seq for completion in llm._requests[request_id].completions)
        found[request_id] = seq.status
    return found


@pytest.mark.parametrize(
    ("num_steps", "found"),
    [
        (0, {Status.WAITING}),
        (1, {Status.WAITING, Status.PREFILL, Status.DECODE}),
        (3, {Status.WAITING, Status.DECODE}),
    ],
)
def test_aborts_in_every_state(llm, expected, num_steps, found):
    statuses = states(llm, num_steps)
    assert set(statuses.values()) == found
    assert bool(llm._in_flight) == (num_steps > 0)
    for request_id in statuses:
        llm.abort_request(request_id)
    assert llm.scheduler.block_manager.num_used_blocks == 0
    assert_idle(llm)
    while llm.has_unfinished_requests():
        assert llm.step() == []
    assert generate(llm, GREEDY) == expected
    assert not llm._streaming


def test_for_how_long_a_step_can_be_put_off(llm, monkeypatch):
    monkeypatch.setattr(llm.pacer, "spare", lambda shape, dispatched_at: 0.7)
    monkeypatch.setattr(llm.runner, "is_done", lambda output: False)
    monkeypatch.setattr(llm.runner, "on_gpu", True)
    assert llm.spare_seconds() == 0, "nothing is on the device"
    llm.add_request([5] * 10, GREEDY)
    assert llm.spare_seconds() == 0, "still nothing"
    llm.step()
    assert llm.spare_seconds() == 0.7
    monkeypatch.setattr(llm.runner, "on_gpu", False)
    assert llm.spare_seconds() == 0, "a CPU is the host's as well"
    monkeypatch.setattr(llm.runner, "on_gpu", True)
    monkeypatch.setattr(llm.runner, "is_done", lambda output: True)
    assert llm.spare_seconds() == 0, "it is done sooner than was thought"
    monkeypatch.setattr(llm.runner, "is_done", lambda output: False)
    llm.update_weights(llm.model, in_flight="finish")
    llm.add_request([5] * 10, GREEDY)
    assert llm.spare_seconds() == 0, "an output waits for the next step"
    while llm.has_unfinished_requests():
        llm.step()
    assert_idle(llm)


def test_an_abort_leaves_the_others_alone(llm):
    prompts = [PROMPT, [1] * 20, [2] * 100, [3], [4], [5] * 30]
    alone = [llm.generate([prompt], GREEDY, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
    for victim in range(len(prompts)):
        ids = list(states(llm, 2))
        llm.abort_request(ids[victim])
        found = {request_id: [] for request_id in ids}
        while llm.has_unfinished_requests():
            for output in llm.step():
                found[output.request_id] += output["token_ids"]
        assert not found[ids[victim]]
        for i, request_id in enumerate(ids):
            # The two first steps' outputs are not in it where the request streams.
            if i != victim:
                assert found[request_id] == alone[i][len(alone[i]) - len(found[request_id]) :]
                assert len(found[request_id]) >= 20
        assert_idle(llm)


def test_abort_before_the_first_step(llm):
    request_id = llm.add_request(PROMPT, GREEDY, "mine", stream=True)
    llm.abort_request(request_id)
    assert not llm.has_unfinished_requests()
    assert llm.add_request(PROMPT, GREEDY, "mine") == "mine"
    llm.abort_request("mine")
    assert_idle(llm)


# --- forms of a prompt and of its settings ---


def test_text_and_tokens_together(llm, expected):
    (output,) = llm.generate({"prompt": "as it was", "prompt_token_ids": PROMPT}, GREEDY, use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids, output["token_ids"]) == ("as it was", PROMPT, expected.token_ids)
    with pytest.raises(TypeError, match="a prompt is a string"):
        llm.generate({"prompt": 7, "prompt_token_ids": PROMPT})
    for prompt in ({"prompt": None}, {"prompt": None, "prompt_token_ids": None}):
        with pytest.raises(TypeError, match="a prompt is a string"):
            llm.generate(prompt)


def test_an_outputs_own_prompt_may_be_given_back(llm, expected):
    (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    again = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids}
    assert again["prompt"] is None
    assert llm.generate(again, GREEDY, use_tqdm=False)[0]["token_ids"] == expected.token_ids


def test_defaults_come_with_the_model(tmp_path):
    directory = write_checkpoint(tmp_path)
    settings = {"eos_token_id": 511, "temperature": 0.0, "top_k": 20, "max_new_tokens": 5}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    llm = small_llm(directory)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0, top_k=20, max_tokens=5)
    greedy = generate(llm, replace(GREEDY, max_tokens=5, ignore_eos=False))
    assert generate(llm, None) == generate(llm, [None]) == greedy
    assert "".join(output["text"] for output in llm.stream(PROMPT)) == greedy.text
    llm.add_request(PROMPT)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[0].outputs == [greedy]


def test_a_bad_generation_config(tmp_path):
    directory = write_checkpoint(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 511, "top_p": 2}))
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p=2 is no good: top_p must be above 0"):
        small_llm(directory)


# --- logprobs in outputs ---


def entry(rank, logprob, top_ids, top_logprobs):
    """What the device says of a token, with as many likely tokens as it always says."""
    padding = [0] * (MAX_LOGPROBS - len(top_ids))
    values = np.array([logprob, *top_logprobs, *padding], np.float32)
    [whole] = entries_of(np.array([[[rank, *top_ids, *padding], values.view(np.int32)]], np.int32))
    return whole


def test_logprobs_of_a_sequence_become_dicts(llm):
    """The sequence's lists are filled here by hand: what counts is how outputs show them."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    request_id = llm.add_request([65, 66], params, stream=True)
    request = llm._requests[request_id]
    seq = request.completions[0].seq
    request.scored.logprobs += [entry(9, -3.0, [70, 71, 72], [-0.5, -1.5, -2.5])]
    seq.token_ids.append(67)
    seq.logprobs.append(entry(11, -4.0, [70, 71, 72], [-0.5, -1.5, -2.5]))
    first = request.take_output()
    seq.token_ids.append(71)
    seq.logprobs.append(entry(1, -1.5, [70, 71], [-1.5, -1.5]))
    second = request.take_output()
    text = {token: llm.tokenizer.decode([token]) for token in (66, 67, 70, 71)}
    assert first.prompt_logprobs == [None, {66: Logprob(-3.0, 9, text[66])}]
    assert second.prompt_logprobs is None
    assert first.outputs[0].logprobs == [
        {67: Logprob(-4.0, 11, text[67]), 70: Logprob(-0.5, 1, text[70]), 71: Logprob(-1.5, 2, text[71])}
    ]
    assert list(first.outputs[0].logprobs[0]) == [67, 70, 71]
    # Two most likely tokens: the generated one keeps its rank, which does not go by its place among them.
    assert second.outputs[0].logprobs == [{71: Logprob(-1.5, 1, text[71]), 70: Logprob(-1.5, 1, text[70])}]
    assert [output.outputs[0].cumulative_logprob for output in (first, second)] == [-4.0, -5.5]
    request.completions[0].token_texts = TokenTexts(None)
    request.completions[0].num_given = 0
    assert {entry.decoded_token for entry in request.take_output().outputs[0].logprobs[0].values()} == {None}
    llm.abort_request(request_id)
    assert_idle(llm)


def test_logprobs_are_a_list():
    """In all that is done with one, but that they are made when they are looked at."""
    texts = {token: f"<{token}>" for token in range(100)}
    entries = together([entry(7, -3.0, [70, 71], [-0.5, -1.5]), entry(1, -0.5, [70, 71], [-0.5, -1.5])], num_top=1)
    tokens = [66, 70]
    logprobs, prompt = Logprobs(tokens, entries, texts), Logprobs([65, *tokens], entries, texts)
    tokens.append(99)
    expected = [
        {66: Logprob(-3.0, 7, "<66>"), 70: Logprob(-0.5, 1, "<70>")},
        {70: Logprob(-0.5, 1, "<70>")},
    ]
    for made, like in ((logprobs, expected), (prompt, [None, *expected])):
        assert made == like == list(made) == made[:] == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made)
        assert made == Logprobs(made._tokens, entries, texts)
        assert (len(made), made[-1], made[1:], made[::-1], repr(made)) == (
            len(like), like[-1], like[1:], like[::-1], repr(like),
        )  # fmt: skip
        assert made != like[1:]
        assert made != 3
        with pytest.raises(IndexError):
            made[len(like)]
    assert own_logprobs(entries) == [-3.0, -0.5]
    logprobs += Logprobs([9], together([entry(2, -8.0, [3], [-0.25])], num_top=1), texts)
    assert logprobs == [*expected, {9: Logprob(-8.0, 2, "<9>"), 3: Logprob(-0.25, 1, "<3>")}]
    assert Logprobs([], together([], 4), texts) == []


def test_logprobs_without_texts(llm):
    """Where a request wants none; others have those that the tokenizer gives, of special tokens too."""
    params = replace(GREEDY, max_tokens=3, logprobs=2, prompt_logprobs=1)
    with_texts, without = llm.generate([PROMPT * 2] * 2, [params, replace(params, detokenize=False)], use_tqdm=False)
    of_both = [[*output.outputs[0].logprobs, *output.prompt_logprobs[1:]] for output in (with_texts, without)]
    for texts, none in zip(*of_both, strict=True):
        assert {token: replace(entry, decoded_token=None) for token, entry in texts.items()} == none
        assert {token: entry.decoded_token for token, entry in texts.items()} == {
            t: llm.tokenizer.decode([t]) for t in texts
        }
    texts, vocabulary = TokenTexts(llm.tokenizer), range(len(llm.tokenizer))
    assert [texts[token] for token in vocabulary] == [llm.tokenizer.decode([token]) for token in vocabulary]


def test_no_logprobs_unless_asked(llm, expected):
    assert (expected.logprobs, expected.cumulative_logprob) == (None, None)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].prompt_logprobs is None


# --- what callers change, and what they do at once ---


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({5: float("nan")}, r"logit_bias\[5\] must be a number"),
        ({5: "x"}, r"logit_bias\[5\] must be a number"),
        ({"x": 1.0}, "logit_bias must have token ids .* not 'x'"),
    ],
)
def test_a_logit_bias_that_has_changed(llm, entry, message):
    """It is checked at the door once more, and the engine has its own: nobody else is harmed."""
    other = llm.add_request(PROMPT, GREEDY)
    params = replace(GREEDY, logit_bias={5: 1.0})
    params.logit_bias.update(entry)
    with pytest.raises((TypeError, ValueError), match=message):
        llm.add_request(PROMPT, params)
    params.logit_bias.clear()
    params.logit_bias[5] = 1.0
    changed = llm.add_request(PROMPT, params)
    params.logit_bias[10**6] = 5.0
    done = set()
    while llm.has_unfinished_requests():
        done |= {output.request_id for output in llm.step()}
    assert done == {other, changed}


def at_once(llm, use, monkeypatch):
    """use() by another thread, in the middle of a step of generate(); what it raises, and what generate() returns."""
    collect, errors = llm.runner.collect, []

    def meanwhile():
        try:
            use()
        except RuntimeError as error:
            errors.append(str(error))

    def collect_after(output):
        if not errors:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join(60)
        return collect(output)

    monkeypatch.setattr(llm.runner, "collect", collect_after)
    return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"], errors


def test_a_second_thread_is_told(llm, expected, monkeypatch):
    """In place of two that take each other's requests and never end."""
    uses = [
        lambda: llm.generate(PROMPT, GREEDY, use_tqdm=False),
        lambda: llm.score([PROMPT], [PROMPT], use_tqdm=False),
        lambda: llm.add_request(PROMPT, GREEDY),
        lambda: llm.abort_request(next(iter(llm._requests))),
        lambda: llm.update_weights(llm.model, "finish"),
        llm.step,
    ]
    for use in uses:
        with monkeypatch.context() as patch:
            tokens, errors = at_once(llm, use, patch)
        assert tokens == expected.token_ids
        assert len(errors) == 1
        assert "another thread is using this engine, which is for one thread at a time: use AsyncLLM" in errors[0]
    assert_idle(llm)


def test_a_signals_handler_is_told(llm, expected, monkeypatch):
    """In the middle of a step, where it would take a sequence out of a batch that is being made."""
    uses = [
        lambda: llm.abort_request(next(iter(llm._requests))),
        lambda: llm.add_request(PROMPT, GREEDY),
        lambda: llm.update_weights(llm.model, "recompute"),
        llm.step,
    ]
    for use in uses:
        with monkeypatch.context() as patch:
            patch.setattr(llm.runner, "collect", lambda _, use=use: use())
            with pytest.raises(RuntimeError, match=r"\(\) was called in the middle of another call of this engine"):
                llm.generate(PROMPT, GREEDY, use_tqdm=False)
        assert_idle(llm)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"] == expected.token_ids


def test_a_request_that_is_aborted_while_generate_waits(llm, monkeypatch):
    """By a signal's handler, between two steps."""
    step, steps = llm.step, itertools.count()

    def aborts():
        if next(steps) == 3:
            llm.abort_request(next(iter(llm._requests)))
        return step()

    monkeypatch.setattr(llm, "step", aborts)
    with pytest.raises(RuntimeError, match=r"request '\d+' was aborted while it ran"):
        llm.generate([PROMPT, PROMPT], GREEDY, use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize("request_id", [["mine"], ("mine",), 0, None])
def test_bad_ids_to_abort(llm, request_id):
    with pytest.raises(TypeError, match="request_id must be a string, that of one request, not"):
        llm.abort_request(request_id)


def test_the_first_text_of_several(llm):
    """A stream's ["text"] is text 0's alone, when it has ended too."""
    params = SamplingParams(n=2, temperature=1.6, seed=1, max_tokens=30, stop_token_ids=list(range(0, 512, 7)))
    outputs = list(llm.stream(PROMPT, params))
    texts = ["".join(c.text for output in outputs for c in output.outputs if c.index == i) for i in (0, 1)]
    whole_ones = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs
    assert texts == [completion.text for completion in whole_ones]
    assert len(whole_ones[0].token_ids) < len(whole_ones[1].token_ids), "choose another seed"
    assert "".join(output["text"] for output in outputs) == texts[0]
    assert [token for output in outputs for token in output["token_ids"]] == whole_ones[0].token_ids


@pytest.mark.parametrize("ended", [False, True])
def test_a_request_is_started_once(llm, expected, ended):
    request = llm.check_request(PROMPT, GREEDY)
    request_id = llm.start_request(request)
    outputs = []
    while ended and llm.has_unfinished_requests():
        outputs += llm.step()
    with pytest.raises(ValueError, match=f"request '{request_id}' was started before"):
        llm.start_request(request)
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert [(output.request_id, output["token_ids"]) for output in outputs] == [(request_id, expected.token_ids)]
    assert_idle(llm)


def test_an_id_of_two_checked_requests(llm):
    first, second = (llm.check_request(PROMPT, GREEDY, request_id="mine") for _ in range(2))
    llm.start_request(first)
    with pytest.raises(ValueError, match="'mine' is in use"):
        llm.start_request(second)
    llm.abort_request("mine")
    assert llm.start_request(second) == "mine"
    llm.abort_request("mine")
    while llm.has_unfinished_requests():
        llm.step()
    assert_idle(llm)
