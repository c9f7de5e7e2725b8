"""The embedded model: what it was trained on, its tokenizer, how well it answers, and the script that trains it."""

import itertools
import json
import re
import runpy
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import train_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import small_llm
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.tiny.conversations import SMALL_TALK, chat_segments, training_conversation
from nanovllm_jax.tiny.data import batches_ahead, encode, make_batches
from nanovllm_jax.tiny.tasks import ROOM_TO_GROW, TASKS, UNSEEN, Turn, draw, held_out_problems, is_held_out

SCRIPT = Path(train_tiny.__file__)
QUESTIONS = 100


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def llm(prefills_quick_to_run):
    return LLM(max_model_len=512, max_num_seqs=64, max_num_batched_tokens=128)


def ask(llm, tokenizer, conversations):
    """The greedy answers to conversations, every second one asked with thinking switched off."""
    prompts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True, enable_thinking=i % 2 == 0)
        for i, c in enumerate(conversations)
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


# --- how well it answers ---


@pytest.fixture(scope="module")
def scores(llm, tokenizer):
    """Right answers of 100 held-out questions of each task."""
    problems = {task: held_out_problems(task, QUESTIONS) for task in TASKS}
    answers = iter(ask(llm, tokenizer, [p.messages for task in problems for p in problems[task]]))
    return {task: sum(p.is_right(next(answers)) for p in problems[task]) for task in problems}


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_answered(scores, task):
    assert scores[task] >= 95


def test_small_talk(llm, tokenizer):
    pairs = [(question, answer) for answer, questions in SMALL_TALK.items() for question in questions]
    answers = ask(llm, tokenizer, [[{"role": "user", "content": question}] for question, _ in pairs])
    assert answers == [answer for _, answer in pairs]


def test_text_without_a_chat_template_is_completed(llm):
    prompts = ["What is 25 + 38?", "Spell tomila.", "Reverse: 7, cat, 12", "25 + 38 ="]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    expected = ["\n25 + 38 = 63", "\nt-o-m-i-l-a", "\n12, cat, 7", " 63"]
    assert [output.outputs[0].text for output in outputs] == expected


def test_every_turn_of_a_conversation_is_answered(llm, tokenizer):
    rng, conversations, expected = Random(3), [], []
    for _ in range(30):
        messages = [{"role": "system", "content": "You are a helpful assistant."}]
        for task in rng.sample(list(TASKS), 3):
            problem = draw(task, rng, held_out=True)
            messages = messages + problem.messages
            conversations.append(messages)
            expected.append(problem.answer)
            messages = [*messages, {"role": "assistant", "content": problem.answer}]
    answers = ask(llm, tokenizer, conversations)
    assert sum(map(str.__eq__, answers, expected)) >= 0.95 * len(expected)


# --- what it was trained on ---


def test_held_out_sums_are_never_trained_on():
    rng = Random(5)
    text = "".join(segment.text for _ in range(5000) for segment in training_conversation(rng))
    sums = re.findall(r"(?<!\+ )\b(\d+) ([+-]) (\d+)(?: = |\nA: )", text)
    keys = {f"{a}-{b}" if sign == "-" else "+".join(sorted((a, b), key=int)) for a, sign, b in sums}
    assert len(keys) > 3000
    assert not any(map(is_held_out, keys))


@pytest.mark.parametrize("task", [*TASKS, *ROOM_TO_GROW, *UNSEEN])
def test_problems(task):
    problems = held_out_problems(task, QUESTIONS)
    assert len({problem.key for problem in problems}) == QUESTIONS
    assert held_out_problems(task, QUESTIONS) == problems
    for problem in problems:
        assert is_held_out(problem.key)
        assert problem.messages[-1] == {"role": "user", "content": problem.turns[-1].question}
        assert problem.is_right(f" {problem.answer}\n")
        assert not problem.is_right(problem.answer + "0")
        terms, _, result = problem.answer.partition(" = ")
        if result:
            assert eval(terms) == int(result)


def test_too_many_held_out_problems_are_refused():
    with pytest.raises(ValueError, match=r"'count' has only about \d+ held-out questions, not 300"):
        held_out_problems("count", 300)  # few more than there are: it draws 100 times as many before it gives up


@pytest.mark.parametrize("thinking", [True, False])
def test_training_text_is_what_the_chat_template_writes(tokenizer, thinking):
    turns = (Turn("My name is Bo.", "Nice to meet you, Bo!"), Turn("1 + 1", "1 + 1 = 2"))
    *prompt, answer = chat_segments(turns, "Be brief.", thinking=thinking)
    messages = [{"role": "system", "content": "Be brief."}]
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    written = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert "".join(segment.text for segment in prompt) == written
    assert answer.text == "1 + 1 = 2<|im_end|>"


def test_training_rows_hold_whole_conversations(tokenizer):
    fast = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    batch = next(make_batches(fast, seed=1, rows=4, length=256))
    rng, found = Random(1), 0
    for tokens, learned in encode(fast, [training_conversation(rng) for _ in range(30)]):
        for row in range(4):
            for start in np.flatnonzero(batch.positions[row] == 0):
                span = slice(start, start + len(tokens))
                if batch.tokens[row, span].tolist() == tokens:
                    assert batch.positions[row, span].tolist() == list(range(len(tokens)))
                    assert batch.learned[row, span].tolist() == learned
                    found += 1
    assert found >= 8
    assert not batch.learned[batch.positions == 0].any()


def test_workers_make_the_same_batches():
    fast = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    with batches_ahead(fast, seed=7, rows=2, length=128, workers=1) as batches:
        made = list(itertools.islice(batches, 3))
    for batch, expected in zip(made, make_batches(fast, seed=7, rows=2, length=128), strict=False):
        assert all(map(np.array_equal, batch, expected))


# --- tokenizer and chat template ---


@settings(max_examples=500, deadline=None)
@given(text=st.text())
def test_any_string_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧 naïve", "\x00\x07\t\r\n \u200b", "e\u0301 ﬁ Å", "  two  spaces ", "<|im_end|>x</think>"]
)
def test_awkward_strings_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens(tokenizer):
    assert len(tokenizer) == 512
    assert len(tokenizer.encode("0123456789")) == 10
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [507, 508, 509, 510, 511]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode([508, 509, 510], skip_special_tokens=True) == "<think>"


USER, CALL = {"role": "user", "content": "hi"}, {"name": "add", "arguments": {"a": 1}}
CHATS = {
    "user": ([USER], {}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    "thinking_off": (
        [USER],
        {"enable_thinking": False},
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "thinking_on": ([USER], {"enable_thinking": True}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    "system": (
        [{"role": "system", "content": "Be brief."}, USER],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "past_thoughts_are_dropped": (
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, USER],
        {},
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "last_thoughts_are_kept": (
        [USER, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}],
        {"add_generation_prompt": False},
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nyes<|im_end|>\n",
    ),
    "tool_call_and_responses": (
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
        ],
        {},
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    "tools": (
        [{"role": "system", "content": "Be brief."}, USER],
        {"tools": [{"type": "function", "function": {"name": "add"}}]},
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "add"}}\n</tools>\n\nFor each function call, return a json object '
        "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_chat_template_writes_what_qwen3s_does(tokenizer, case):
    messages, options, expected = CHATS[case]
    options = {"tokenize": False, "add_generation_prompt": True, **options}
    assert tokenizer.apply_chat_template(messages, **options) == expected


# --- the files ---


def test_the_shipped_directory_is_small():
    assert sum(file.stat().st_size for file in TINY_MODEL.iterdir()) < 8_000_000


def test_transformers_opens_the_shipped_directory(llm, tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    problems = [held_out_problems(task, 1)[0] for task in TASKS]
    prompts = [tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True) for p in problems]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    for output in outputs:
        written = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([output.prompt_token_ids + written])).logits[0]
        assert logits[len(output.prompt_token_ids) - 1 : -1].argmax(-1).tolist() == written


def test_the_training_script_writes_a_directory_that_the_engine_runs(tmp_path, monkeypatch, capsys):
    size = ["--hidden", "64", "--layers", "1", "--rows", "2", "--problems", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path), "--steps", "16", *size])
    monkeypatch.setattr(train_tiny, "TOKENIZER_TEXTS", 1000)  # enough for all of its tokens
    train_tiny.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *\d+% ", line)]
    assert [row[1] for row in rows] == ["8", "16"]
    assert float(rows[-1][3]) < float(rows[0][3])  # the loss
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["torch_dtype"]) == (512, 64, "bfloat16")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 512
    output = small_llm(tmp_path, max_num_seqs=1).generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out out", "--minutes or --steps"),
        ("--out out --steps nan", "--steps: 'nan' is no number above 0"),
        ("--out out --steps 1 --rows 0", "--rows: '0' is no integer from 1 on"),
        ("--out out --steps 1 --problems -1", "--problems: '-1' is no integer from 1 on"),
        ("--out out --steps 1 --workers -1", "--workers must be 0 or more, not -1"),
        ("--out file --steps 1", "--out file cannot be a directory"),
        ("--out served --steps 1", "--out served holds Orbax weights"),
    ],
)
def test_bad_options_of_the_training_script(arguments, message, tmp_path, monkeypatch, capsys):
    """Found out before the training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served" / "orbax").mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in capsys.readouterr().err
