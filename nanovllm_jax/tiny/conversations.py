"""Training conversations: the tasks' problems, small talk and system prompts, in the forms that users type."""

from random import Random
from typing import NamedTuple

from nanovllm_jax.tiny.tasks import ALL_TASKS, WORDS, Turn, draw

SMALL_TALK = {
    "Hello! How can I help you?": (
        "Hello!",
        "Hello",
        "Hi",
        "Hi!",
        "hello",
        "Hey",
        "Good morning!",
        "Hello, nano-vLLM.",
    ),
    "I am a tiny Qwen3, trained from scratch in JAX. I can add, subtract, sort, reverse, count, copy and spell.": (
        "Who are you?",
        "who are you",
        "What are you?",
        "What can you do?",
        "introduce yourself",
        "Introduce yourself.",
        "Please introduce yourself.",
        "Tell me about yourself.",
        "Help",
    ),
    "I am fine, thank you. Ask me something!": ("How are you?", "how are you", "How are you today?"),
    "You are welcome!": ("Thank you!", "Thanks", "Thanks!", "Thank you.", "thanks"),
    "Goodbye!": ("Goodbye", "Goodbye!", "Bye", "bye", "See you!", "Good night!"),
    "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97": (
        "list all prime numbers within 100",
        "List all prime numbers within 100.",
        "List the prime numbers below 100.",
    ),
    "I am too small to know that. Ask me to add, subtract, sort, reverse, count, copy or spell.": (
        "What is the capital of France?",
        "Tell me a joke.",
        "Tell me a story.",
        "What is the meaning of life?",
        "Write a poem about the sea.",
        "Explain quantum physics.",
        "Why is the sky blue?",
        "Who is the president of the United States?",
        "Write a Python program.",
        "How does a transformer work?",
    ),
}
"""Answers, and what they answer: learned by heart, so no held-out questions."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a tiny model. Answer in one line.",
    "Answer the question.",
    "You are a calculator that is also good with lists and words.",
    "Be brief.",
)

_TASK_NAMES = list(ALL_TASKS)
_TASK_WEIGHTS = [task.weight for task in ALL_TASKS.values()]
_TALK = [Turn(question, answer) for answer, questions in SMALL_TALK.items() for question in questions]
_TALK += [Turn(f"Spell {word}.", "-".join(word)) for word in WORDS]
_DRILLED = ("add3", "sub3", "add3", "sub3", "add2")


class Segment(NamedTuple):
    """A piece of a training text."""

    text: str
    learned: bool
    """Whether the model learns to write it; prompts are only read."""


def training_conversation(rng: Random) -> list[Segment]:
    """One random text of questions that are not held out, cut into read and learned pieces."""
    kind = rng.random()
    if kind < 0.12:
        return _drill(rng)
    if kind < 0.18:
        return _plain(_talk_or_problem(rng))
    turns: tuple[Turn, ...] = ()
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        turns += _talk_or_problem(rng)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
    return chat_segments(turns, system, thinking=rng.random() < 0.6)


def _talk_or_problem(rng: Random) -> tuple[Turn, ...]:
    if rng.random() < 0.05:
        return (rng.choice(_TALK),)
    (task,) = rng.choices(_TASK_NAMES, _TASK_WEIGHTS)
    return draw(task, rng, held_out=False).turns


def chat_segments(turns: tuple[Turn, ...], system: str | None, *, thinking: bool) -> list[Segment]:
    """A conversation as the chat template writes it.

    `thinking=False` puts the empty think block before the last answer, as `enable_thinking=False` does.
    """
    segments = []
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for i, (question, answer) in enumerate(turns):
        prompt = f"{opening}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        if i == len(turns) - 1 and not thinking:
            prompt += "<think>\n\n</think>\n\n"
        segments += [Segment(prompt, False), Segment(f"{answer}<|im_end|>", True)]
        opening = "\n"
    return segments


def _plain(turns: tuple[Turn, ...]) -> list[Segment]:
    """Text with no chat template: a question, and the answer on the next line."""
    segments = []
    for question, answer in turns:
        segments += [Segment(question, False), Segment(f"\n{answer}", True), Segment("\n", False)]
    return [*segments[:-1], Segment("<|endoftext|>", True)]


def _drill(rng: Random) -> list[Segment]:
    """Many sums in few tokens: what is hardest to learn is seen most often."""
    segments = []
    for _ in range(rng.randint(1, 14)):
        problem = draw(rng.choice(_DRILLED), rng, held_out=False)
        question, _, result = problem.answer.partition(" = ")
        segments += [Segment(f"{question} =", False), Segment(f" {result}", True), Segment("\n", False)]
    return [*segments[:-1], Segment("<|endoftext|>", True)]
