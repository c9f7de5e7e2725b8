"""The terminal chat: turns, commands, interrupts, and what it says of the prefix cache."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chat
import example
import pytest
from small_model import assert_idle, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams

pytestmark = pytest.mark.usefixtures("programs_kept")

SCRIPT = Path(chat.__file__)
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
FIGURES = re.compile(r"\[(stopped; )?(\d+) tokens, the first after [\d.]+ s(?:, \d+ tokens/s)?; (\d+) of (\d+) prompt")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("chat") / "model"))


@pytest.fixture
def talk(llm, monkeypatch, capsys):
    """talk(chat, lines) -> what is shown; a line may also be an exception that reading it raises."""
    llm.reset_prefix_cache()

    def run(conversation, lines):
        lines = iter([*lines, EOFError])

        def read(prompt):
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        conversation.run()
        assert_idle(llm)
        return capsys.readouterr().out

    return run


def test_turns_and_what_they_share(llm, talk):
    conversation = chat.Chat(llm, PARAMS, system="Be brief.")
    shown = talk(conversation, ["What is 2 + 3?", " ", "more"])
    (first, second) = FIGURES.findall(shown)
    assert (first[0], first[1], first[2]) == ("", "6", "0")
    assert int(second[2]) >= 16, "the second turn finds the first in the prefix cache"
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[2]["content"] in shown


def test_commands(llm, talk):
    conversation = chat.Chat(llm, PARAMS, system="Be brief.")
    shown = talk(conversation, ["2 + 3", "/reset", "/help", KeyboardInterrupt, "/exit", "never read"])
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert "(the commands are /reset and /exit)" in shown
    assert "(/exit or Ctrl-D ends the program)" in shown
    assert len(FIGURES.findall(shown)) == 1


def test_an_interrupt_stops_the_answer_and_keeps_it(llm, talk, monkeypatch):
    conversation = chat.Chat(llm, replace(PARAMS, max_tokens=None))
    show, handler = chat.show, signal.getsignal(signal.SIGINT)
    shows = []

    def interrupted(text):
        shows.append(text)
        if len(shows) == 3:
            signal.raise_signal(signal.SIGINT)
        show(text)

    monkeypatch.setattr(chat, "show", interrupted)
    ((stopped, count, *_), (_, _, cached, _)) = FIGURES.findall(
        talk(conversation, ["What is 2 + 3? And 4 + 5?", "more"])
    )
    assert (stopped, count) == ("stopped; ", "3")
    assert conversation.messages[1]["content"] == "".join(shows[:3])
    assert int(cached) >= 16, "the prefix cache outlives the interrupt"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_conversation_that_grows_too_long(llm, talk):
    conversation = chat.Chat(llm, PARAMS)
    shown = talk(conversation, ["2 + 3", "7" * 200, "\ud800", "more"])
    assert "must fit in max_model_len=128" in shown
    assert "is not valid Unicode text" in shown
    assert shown.count("(/reset starts a new conversation)") == 2
    assert len(FIGURES.findall(shown)) == 2
    assert len(conversation.messages) == 4


def test_the_embedded_model(tmp_path):
    lines = ["What is 214 + 382?", "Sort 9, 4, 7, 1.", "What is 12 + 30?", "/reset", "Spell banana.", "/exit", "unread"]
    command = [sys.executable, str(SCRIPT), "--temperature", "0"]
    done = subprocess.run(command, input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for answer in ("214 + 382 = 596", "1, 4, 7, 9", "12 + 30 = 42", "b-a-n-a-n-a"):
        assert answer in done.stdout
    cached = [int(figures[2]) for figures in FIGURES.findall(done.stdout)]
    assert (len(cached), cached[0]) == (4, 0)
    assert cached[1] >= 16
    assert cached[2] >= 32


def test_an_example_that_the_model_refuses(monkeypatch, capsys):
    def refuse(self, *args, **options):
        raise ValueError("the prompt has 5013 tokens")

    monkeypatch.setattr(example, "LLM", type("LLM", (), {"__init__": lambda *args: None, "chat": refuse}))
    monkeypatch.setattr(sys, "argv", ["example.py", "--prompt", "a"])
    with pytest.raises(SystemExit):
        example.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: the prompt has 5013 tokens")


@pytest.mark.parametrize("script", [chat, example])
@pytest.mark.parametrize("given", ["--max-tokens 0", "--temperature -1", "--model no/model/here"])
def test_bad_arguments(script, given, monkeypatch, capsys):
    """One line, that names the value, and before anything is loaded."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *given.split()])
    with pytest.raises(SystemExit):
        script.main()
    assert given.split()[1] in capsys.readouterr().err.splitlines()[-1]
