"""LLM as its users meet it: what goes in, what comes out, and what happens when it is interrupted."""

import json
import re
import shutil
import sys
import threading
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import OPTIONS, SMALL, assert_idle, small_llm, write_checkpoint
from tqdm.auto import tqdm

from nanovllm_jax import LLM, CompletionOutput, RequestOutput, SamplingParams
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.schedule import RunAhead

pytestmark = pytest.mark.usefixtures("programs_kept")

PROMPT = [5, 6, 7, 8, 9]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    return small_llm(directory)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def generate(llm, prompts, params=GREEDY):
    """The generated tokens, with nothing in the prefix cache."""
    llm.reset_prefix_cache()
    outputs = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    assert_idle(llm)
    return outputs


@pytest.fixture(scope="module")
def expected(llm):
    """Twelve greedy tokens after PROMPT."""
    return generate(llm, PROMPT)[0]


# --- what goes in ---

ONE_PROMPT = {
    "token ids": PROMPT,
    "tuple": tuple(PROMPT),
    "list of one": [PROMPT],
    "dict": {"prompt_token_ids": PROMPT},
    "list of a dict": [{"prompt_token_ids": tuple(PROMPT)}],
    "array": np.array(PROMPT),
    "array of one row": np.array([PROMPT], np.uint8),
    "dict of an array": {"prompt_token_ids": np.array(PROMPT, np.int32)},
    "NumPy's integers": list(np.array(PROMPT)),
    "list of an array": [np.array(PROMPT)],
    "JAX' array": jnp.array(PROMPT),
    "list of JAX' arrays": [jnp.array(PROMPT)],
    "JAX' integers": list(jnp.array(PROMPT)),
}


@pytest.mark.parametrize("form", ONE_PROMPT)
def test_forms_of_one_prompt(llm, expected, form):
    (output,) = llm.generate(ONE_PROMPT[form], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected
    assert (output.prompt, output.prompt_token_ids) == (None, PROMPT)
    assert {type(token) for token in output.prompt_token_ids} == {int}


@pytest.mark.parametrize("prompt", ["two words", ["two words"], {"prompt": "two words"}, [{"prompt": "two words"}]])
def test_forms_of_a_text(llm, prompt):
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    tokens = llm.tokenizer.encode("two words")
    assert (output.prompt, output.prompt_token_ids) == ("two words", tokens)
    assert [output["token_ids"]] == tokens_of(llm.generate(tokens, GREEDY, use_tqdm=False))


def test_many_prompts_come_back_in_order(llm):
    """More prompts than run at a time, of all kinds, the later ones done before the first."""
    prompts = ["a text", [1, 2, 3], {"prompt_token_ids": [4]}, {"prompt": "b"}, *([[i, i + 1] for i in range(9)])]
    params = [SamplingParams(temperature=0, max_tokens=20 - i, ignore_eos=True) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs[:4]] == ["a text", None, None, "b"]
    assert [output.prompt_token_ids for output in outputs[4:]] == [[i, i + 1] for i in range(9)]
    assert [len(output["token_ids"]) for output in outputs] == [20 - i for i in range(len(prompts))]
    ids = [int(output.request_id) for output in outputs]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert_idle(llm)


@pytest.mark.parametrize(("shared", "waits_for"), [([0] * 5, 2), ([20] * 5, 5), ([20, 20, 0, 0, 0], 4)])
def test_the_first_step_begins_when_it_is_full(llm, monkeypatch, shared, waits_for):
    """64 tokens are: those of the second prompt; where all begin alike it is known with the last.

    Where the first two do it is asked once more, when there are twice as many tokens.
    """
    prompts = [PROMPT * (part // 5) + [100 + number] * (40 - part) for number, part in enumerate(shared)]
    alone = [generate(llm, prompt)[0] for prompt in prompts]
    calls = []
    for name in ("start_request", "step"):
        method = getattr(llm, name)
        monkeypatch.setattr(llm, name, lambda *args, name=name, method=method: calls.append(name) or method(*args))
    assert generate(llm, prompts) == alone
    assert calls.index("step") == waits_for
    assert calls.count("start_request") == 5


def test_params_are_optional(llm):
    default, explicit = llm.generate([PROMPT, PROMPT], [None, SamplingParams()], use_tqdm=False)
    assert 1 <= len(default["token_ids"]) <= 16
    assert 1 <= len(explicit["token_ids"]) <= 16


def test_no_prompts(llm):
    assert llm.generate([]) == []


def test_the_caller_may_change_its_list(llm, expected):
    """The engine and its outputs have copies."""
    prompt = list(PROMPT)
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    prompt[0] = 99
    assert output.prompt_token_ids == PROMPT


# --- what comes out ---


def test_request_output(llm, expected):
    (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    text = llm.tokenizer.decode(expected, skip_special_tokens=True)
    assert isinstance(output, RequestOutput)
    assert output.outputs == [CompletionOutput(index=0, text=text, token_ids=expected, finish_reason="length")]
    assert output.finished is True
    assert (output["text"], output["token_ids"]) == (text, expected)
    assert dict(output) == {"text": text, "token_ids": expected}
    assert ("text" in output, "tokens" in output, output.outputs[0].finished()) == (True, False, True)
    with pytest.raises(KeyError, match="has the keys 'text' and 'token_ids'"):
        output["tokens"]


def test_a_progress_bar_of_ones_own(llm, capsys):
    made = []

    def make_bar(**options):
        made.append(tqdm(**options, file=sys.stdout))
        return made[-1]

    llm.generate([PROMPT, PROMPT], GREEDY, use_tqdm=make_bar)
    assert [bar.n for bar in made] == [2]
    assert "Generating" in capsys.readouterr().out


def test_another_threads_refused_call_changes_nothing(llm):
    """It comes while no request has started: the call that is under way has the engine for itself all the same."""
    refused = []

    def attempt():
        with pytest.raises(RuntimeError) as caught:
            llm.add_request(PROMPT, GREEDY)
        refused.append(str(caught.value))

    class Bar(tqdm):
        def update(self, n=1):
            attempt()
            return super().update(n)

    def make_bar(**options):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        return Bar(**options)

    assert len(llm.generate([PROMPT], GREEDY, use_tqdm=make_bar)) == 1
    assert "another thread is using this engine" in refused[0]
    assert "while generate() runs" in refused[1]


def test_the_prefix_cache_can_be_reset(llm):
    llm.reset_prefix_cache()
    prompt = [*range(40)]

    def cached():
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens

    assert (cached(), cached()) == (0, 32)
    llm.reset_prefix_cache()
    assert cached() == 0
    request_id = llm.add_request(prompt)
    with pytest.raises(RuntimeError, match="cannot be reset while 1 requests are unfinished"):
        llm.reset_prefix_cache()
    llm.abort_request(request_id)
    assert llm.get_tokenizer() is llm.tokenizer


def write_eos(directory, to, *, eos):
    """A copy of a checkpoint with these end-of-sequence tokens."""
    shutil.copytree(directory, to)
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return to


def test_every_eos_token_ends_the_text_and_is_not_in_it(directory, tmp_path, llm, expected):
    """An ordinary token, to the tokenizer, is made the second of two end-of-sequence tokens."""
    at = next(i for i in range(2, 12) if expected[i] not in expected[:i] and expected[i] < 507)
    stops = small_llm(write_eos(directory, tmp_path / "eos", eos=[506, expected[at]]))
    for prompts in ([PROMPT], [[1, 2], PROMPT, [3]]):  # alone, and beside others
        output = stops.generate(prompts, SamplingParams(temperature=0), use_tqdm=False)[len(prompts) // 2].outputs[0]
        assert output.token_ids == expected[: at + 1]
        assert output.finish_reason == "stop"
        assert output.text == llm.tokenizer.decode(expected[:at], skip_special_tokens=True)
        assert_idle(stops)
    ignored = stops.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0]
    assert (ignored.token_ids, ignored.finish_reason) == (expected, "length")


def test_an_eos_as_the_last_token_allowed_is_a_stop(directory, tmp_path, expected):
    stops = small_llm(write_eos(directory, tmp_path / "eos", eos=expected[0]))
    (output,) = stops.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert output.outputs == [CompletionOutput(0, "", [expected[0]], finish_reason="stop")]


def test_the_length_limit_of_the_model_ends_the_text(llm):
    (output,) = llm.generate([1] * 120, SamplingParams(max_tokens=1000, ignore_eos=True), use_tqdm=False)
    assert (len(output["token_ids"]), output.outputs[0].finish_reason) == (8, "length")


def test_num_cached_tokens(llm, directory):
    """Whole blocks of 16, and never the last token of the prompt, which is computed for its logits."""
    llm.reset_prefix_cache()
    for length, first, again in ((40, 0, 32), (48, 32, 32), (49, 48, 48), (15, 0, 0), (16, 0, 0), (17, 16, 16)):
        for cached in (first, again):
            (output,) = llm.generate(list(range(100, 100 + length)), GREEDY, use_tqdm=False)
            assert output.num_cached_tokens == cached, length
    without = small_llm(directory, enable_prefix_caching=False)
    assert [without.generate([7] * 40, GREEDY, use_tqdm=False)[0].num_cached_tokens for _ in range(2)] == [0, 0]


def test_tokens_that_the_tokenizer_does_not_have(tmp_path):
    """Published models have more rows in the embedding than tokens: a random model picks such ones."""
    config = replace(SMALL, vocab_size=2048, num_hidden_layers=1)
    llm = small_llm(write_checkpoint(tmp_path, config), max_num_seqs=1)
    (output,) = llm.generate([2047, 2000], SamplingParams(temperature=2, max_tokens=40, seed=1), use_tqdm=False)
    assert max(output["token_ids"]) > 512
    assert isinstance(output["text"], str)


def test_progress_bar(llm, capsys):
    llm.generate([PROMPT] * 3, GREEDY)
    bar = capsys.readouterr().err
    assert re.search(r"Generating: 100%.* 3/3 .*Prefill=\d+tok/s, Decode=\d+tok/s", bar)
    llm.generate([PROMPT] * 3, GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_while_it_runs(llm, capsys, monkeypatch):
    """The rates change on the way, not only in the end."""
    clock = iter(range(10**6))
    monkeypatch.setattr("nanovllm_jax.llm.time.perf_counter", lambda: next(clock))
    llm.generate([PROMPT, [1] * 100], GREEDY)
    assert len(set(re.findall(r"Prefill=\d+tok/s, Decode=\d+tok/s", capsys.readouterr().err))) > 2


def test_several_steps_in_one_program(directory, tmp_path, expected, monkeypatch):
    """They change no token: with an EOS in the middle, at max_tokens, at max_model_len, in no draw."""
    at = next(i for i in range(5, 12) if expected[i] not in expected[:i])
    stopping = write_eos(directory, tmp_path / "eos", eos=expected[at])
    prompts = [PROMPT, [1] * 120, list(range(15)), list(range(50)), [3]]
    params = [
        SamplingParams(temperature=0, max_tokens=30),
        *(SamplingParams(seed=n, max_tokens=n) for n in (20, 5, 9, 2)),
    ]
    found = {}
    for steps in (RunAhead(), RunAhead(4, rows=128), RunAhead(3, rows=1)):
        monkeypatch.setattr(ModelRunner, "_run_ahead", lambda runner, steps=steps: steps)
        engine = small_llm(stopping)
        together = engine.generate(prompts, params, use_tqdm=False)
        alone = [engine.generate([p], q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
        found[steps] = [output.outputs for output in together + alone]
        assert_idle(engine)
    first, *others = found.values()
    assert first[0][0].token_ids == expected[: at + 1]
    assert others == [first] * 2


# --- draws ---

SEEDED = SamplingParams(temperature=1.5, max_tokens=24, ignore_eos=True, seed=1234)


def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(llm):
    alone = generate(llm, PROMPT, SEEDED)[0]
    assert len(set(alone)) > 8
    others = [SamplingParams(temperature=1, max_tokens=n, ignore_eos=True) for n in (5, 9, 30, 40)]
    prompts = [list(range(n, n + 50)) for n in range(4)]
    batch = generate(llm, [*prompts[:2], PROMPT, *prompts[2:]], [*others[:2], SEEDED, *others[2:]])
    assert batch[2] == alone
    llm.scheduler.max_num_batched_tokens = 2  # its prompt in chunks
    try:
        assert generate(llm, [prompts[0], PROMPT], [others[0], SEEDED])[1] == alone
    finally:
        llm.scheduler.max_num_batched_tokens = 64


def test_unseeded_requests_draw_from_the_engines_seed(directory):
    sampled = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
    first, again, *others = (small_llm(directory, seed=seed) for seed in (5, 5, 6, -5))
    draws = [generate(first, [PROMPT] * 3, sampled) for _ in range(2)]
    assert len({tuple(tokens) for tokens in draws[0] + draws[1]}) == 6, "requests differ from each other"
    assert [generate(again, [PROMPT] * 3, sampled) for _ in range(2)] == draws
    for other in others:
        assert generate(other, [PROMPT] * 3, sampled) != draws[0]


def test_a_seed_of_ones_own_does_not_change_the_others(directory):
    sampled = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
    plain, with_seeded = (small_llm(directory) for _ in range(2))
    expected = generate(plain, [PROMPT] * 3, sampled)
    found = generate(with_seeded, [PROMPT] * 3, [sampled, SEEDED, sampled])
    assert [found[0], found[2]] == [expected[0], expected[2]]


# --- more than one engine, and one's own loop ---


def test_two_engines_interleaved(llm, directory, expected):
    """Different block sizes, pools and limits in one process, both with requests under way."""
    other = small_llm(directory, block_size=32, max_num_seqs=2)
    long = list(range(60))
    references = generate(llm, [PROMPT, long])
    ids = [(engine, engine.add_request(prompt, GREEDY)) for prompt in (PROMPT, long) for engine in (llm, other)]
    found = {}
    while llm.has_unfinished_requests() or other.has_unfinished_requests():
        for engine in (llm, other):
            found |= {(engine, output.request_id): output["token_ids"] for output in engine.step()}
    assert [found[key] for key in ids] == [references[0]] * 2 + [references[1]] * 2
    assert_idle(llm)
    assert_idle(other)


def test_generate_wants_the_engine_for_itself(llm, expected):
    llm.add_request(PROMPT, GREEDY)
    with pytest.raises(RuntimeError, match=r"requests from add_request\(\) are unfinished \(1\): call step\(\) until"):
        llm.generate(PROMPT, GREEDY)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert tokens_of(outputs) == [expected]
    assert generate(llm, PROMPT) == [expected]


def test_a_number_as_ones_own_request_id(llm, expected):
    """Ids that the engine makes up keep clear of it."""
    mine = str(int(llm.add_request(PROMPT, GREEDY)) + 2)
    llm.add_request(PROMPT, GREEDY, mine)
    theirs = llm.add_request(PROMPT, GREEDY)
    assert theirs != mine
    found = {}
    while llm.has_unfinished_requests():
        found |= {output.request_id: output["token_ids"] for output in llm.step()}
    assert found[mine] == found[theirs] == expected


# --- failures ---


def fail_at(monkeypatch, owner, name, call, error):
    """Let the method raise at its `call`-th call, after doing its work: what it gave back is lost."""
    method, calls = getattr(owner, name), []

    def failing(*args):
        calls.append(args)
        result = method(*args)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the device is gone"), MemoryError()])
@pytest.mark.parametrize("method", ["dispatch", "collect"])
def test_a_failing_step(llm, expected, monkeypatch, method, error):
    """Every request is aborted, the exception comes through, and the engine works again."""
    prompts = [PROMPT, [1] * 60, [2] * 60, [3], [4], [5]]
    for call in (1, 2, 5):
        with monkeypatch.context() as patch:
            fail_at(patch, llm.runner, method, call, error)
            with pytest.raises(type(error)) as caught:
                llm.generate(prompts, GREEDY, use_tqdm=False)
        assert caught.value is error
        assert_idle(llm)
        assert not llm.has_unfinished_requests()
        assert tokens_of(llm.generate([PROMPT], GREEDY, use_tqdm=False)) == [expected]


def test_a_program_that_takes_the_cache_with_it(llm, expected, monkeypatch):
    """The device ran the step, so the donated arrays are gone, but its results never reached the engine."""

    def lost(program):
        def run(*args):
            program(*args)
            raise RuntimeError("lost on the way")

        return run

    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "programs", {shape: lost(p) for shape, p in llm.runner.programs.items()})
        with pytest.raises(RuntimeError, match="lost on the way"):
            llm.generate(PROMPT, GREEDY, use_tqdm=False)
    assert generate(llm, PROMPT) == [expected]


def test_an_interrupt_between_steps(llm, expected, monkeypatch):
    """Ctrl-C comes anywhere: here while a step is under way and the bar is drawn."""
    with monkeypatch.context() as patch:
        fail_at(patch, llm, "step", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, [1] * 60], GREEDY, use_tqdm=False)
    assert_idle(llm)
    assert generate(llm, PROMPT) == [expected]


# --- nano-vllm's scripts ---


def test_what_nano_vllms_example_does(directory):
    """Chat prompts made with the tokenizer, one SamplingParams, positional arguments, texts by key."""
    from transformers import AutoTokenizer

    path = str(directory)
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=False, tensor_parallel_size=1, **OPTIONS)
    questions = ["What is 12 + 30?", "hello"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=32))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt
        assert "<|im_end|>" not in output["text"]


def test_what_nano_vllms_benchmark_does(directory):
    """A warm-up text, token ids of random lengths, one SamplingParams each, as lists and as vLLM's dicts."""
    rng = np.random.default_rng(0)
    llm = LLM(str(directory), enforce_eager=False, **OPTIONS)
    prompts = [rng.integers(0, 507, rng.integers(10, 60)).tolist() for _ in range(12)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=int(rng.integers(10, 60))) for _ in prompts]
    llm.generate(["Benchmark: "], SamplingParams())
    for form in (prompts, [dict(prompt_token_ids=prompt) for prompt in prompts]):
        outputs = llm.generate(form, params, use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [param.max_tokens for param in params]
