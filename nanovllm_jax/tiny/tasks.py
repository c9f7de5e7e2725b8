"""The tiny model's tasks: questions made at random, each with its one right answer.

A tenth of all questions, chosen by a hash of what is asked, is held out: those are never trained on, in any wording or
conversation, so that a held-out question measures the skill and not the memory. Pure Python, no arrays.
"""

import zlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple

HELD_OUT_SHARE = 10
"""One question in this many is held out."""

Message = dict[str, str]


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


class Problem(NamedTuple):
    """A short conversation whose last answer is what counts."""

    turns: tuple[Turn, ...]
    key: str
    """What is asked, whatever the wording: equal keys are the same question."""

    @property
    def answer(self) -> str:
        """The right answer to the last question."""
        return self.turns[-1].answer

    @property
    def messages(self) -> list[Message]:
        """The conversation up to and with the last question, for a chat template."""
        messages = []
        for question, answer in self.turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages[:-1]

    def is_right(self, text: str) -> bool:
        """Whether `text` is the answer."""
        return text.strip() == self.answer


class Task(NamedTuple):
    """A family of questions."""

    make: Callable[[Random], Problem]
    weight: float
    """Share of the training problems, relative to the other tasks."""


def is_held_out(key: str) -> bool:
    """Whether the question with this key belongs to the held-out ones."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def draw(task: str, rng: Random, *, held_out: bool) -> Problem:
    """A random problem of the task, from the held-out questions or from all others."""
    while True:
        problem = (ALL_TASKS | UNSEEN)[task].make(rng)
        if is_held_out(problem.key) == held_out:
            return problem


def held_out_problems(task: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` held-out problems of the task, all different."""
    rng, problems = Random(f"{task} {seed}"), {}
    for _ in range(100 * count):
        problem = draw(task, rng, held_out=True)
        problems.setdefault(problem.key, problem)
        if len(problems) == count:
            return list(problems.values())
    raise ValueError(f"task {task!r} has only about {len(problems)} held-out questions, not {count}")


# --- arithmetic ---

_SPELLED = {
    "+": ("{a} plus {b}", "the sum of {a} and {b}", "Add {a} and {b}."),
    "-": ("{a} minus {b}", "the difference of {a} and {b}", "Subtract {b} from {a}."),
    "*": ("{a} times {b}", "the product of {a} and {b}", "Multiply {a} by {b}."),
}
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def _arithmetic(rng: Random, a: int, sign: str, b: int) -> Problem:
    plus, noun, command = _SPELLED[sign]
    wording = rng.choice(
        (
            f"What is {a} {sign} {b}?",
            f"What is {a} {sign} {b}?",
            f"{a} {sign} {b}",
            f"{a} {sign} {b} =",
            f"{a}{sign}{b}",
            f"{a}{sign}{b}=?",
            f"Calculate {a} {sign} {b}.",
            f"What is {plus}?".format(a=a, b=b),
            f"What is {noun}?".format(a=a, b=b),
            command.format(a=a, b=b),
        )
    )
    answer = f"{a} {sign} {b} = {_OPERATIONS[sign](a, b)}"
    return Problem((Turn(wording, answer),), _sum_key(a, sign, b))


def _sum_key(a: int, sign: str, b: int) -> str:
    """Operands that may be swapped are sorted: 12 + 30 is the same question as 30 + 12."""
    return f"{min(a, b)}{sign}{max(a, b)}" if sign != "-" else f"{a}-{b}"


def _number(rng: Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _addition(digits: int) -> Callable[[Random], Problem]:
    return lambda rng: _arithmetic(rng, _number(rng, digits), "+", _number(rng, digits))


def _subtraction(digits: int) -> Callable[[Random], Problem]:
    def make(rng: Random) -> Problem:
        small, large = sorted((_number(rng, digits), _number(rng, digits)))
        return _arithmetic(rng, large, "-", small)

    return make


def _below_zero(rng: Random) -> Problem:
    small = rng.randrange(10, 99)
    return _arithmetic(rng, small, "-", rng.randrange(small + 1, 100))


def _multiplication(rng: Random) -> Problem:
    return _arithmetic(rng, rng.randrange(10, 200), "*", rng.randint(2, 9))


def _swapped_multiplication(rng: Random) -> Problem:
    return _arithmetic(rng, rng.randint(2, 9), "*", rng.randrange(10, 200))


def _sum_of_three(*wordings: str) -> Callable[[Random], Problem]:
    def make(rng: Random) -> Problem:
        terms = [_number(rng, 2) for _ in range(3)]
        wording = rng.choice(wordings).format(*terms)
        answer = f"{' + '.join(map(str, terms))} = {sum(terms)}"
        return Problem((Turn(wording, answer),), "+".join(map(str, sorted(terms))))

    return make


def _few_shot(rng: Random) -> Problem:
    """Worked examples in the prompt show how to answer: with the bare number."""
    sign = rng.choice("+-")
    make = _addition(2) if sign == "+" else _subtraction(2)
    shown = []
    while len(shown) < 3:
        problem = make(rng)
        if not is_held_out(problem.key):
            shown.append(problem.answer.replace(" = ", "\nA: "))
    asked = make(rng)
    sum_text, _, result = asked.answer.partition(" = ")
    prompt = "".join(f"Q: {example}\n" for example in shown) + f"Q: {sum_text}\nA:"
    return Problem((Turn(prompt, result),), asked.key)


# --- lists and words ---

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
# fmt: off
WORDS = (
    "apple", "bird", "blue", "boat", "book", "bread", "car", "cat", "chair", "cloud", "dog", "door", "fish",
    "flower", "fox", "friend", "gold", "green", "hand", "hat", "horse", "house", "king", "lamp", "leaf", "light",
    "lion", "milk", "moon", "mouse", "night", "paper", "queen", "rain", "red", "river", "road", "rose", "salt",
    "sea", "ship", "snow", "song", "star", "stone", "sun", "table", "tree", "water", "wind", "wolf", "yellow",
)
# fmt: on
_SYMBOLS = list("éñüßøçαβπωжщ日本語中文✓→★♥😀🎉🚀🌍🐍🔥👍")


def _made_up_word(rng: Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))) + rng.choice(("", "", "n", "s", "r"))


def _word(rng: Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.4 else _made_up_word(rng)


def _item(rng: Random) -> str:
    return str(rng.randrange(100)) if rng.random() < 0.4 else _word(rng)


def _sort(rng: Random) -> Problem:
    numbers = rng.sample(range(100), rng.randint(3, 5))
    text, answer = ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))
    wording = rng.choice(
        (f"Sort these numbers: {text}", f"Sort {text}.", f"sort {text}", f"Put in order: {text}", f"Sort: {text}")
    )
    return Problem((Turn(wording, answer),), f"sort {answer}")


def _reverse(rng: Random) -> Problem:
    items = [_item(rng) for _ in range(rng.randint(3, 6))]
    text, answer = ", ".join(items), ", ".join(reversed(items))
    wording = rng.choice((f"Reverse this list: {text}", f"Reverse {text}.", f"Reverse: {text}", f"reverse {text}"))
    return Problem((Turn(wording, answer),), f"reverse {text}")


def _count(rng: Random) -> Problem:
    first, length = rng.randrange(300), rng.randint(3, 12)
    last = first + length - 1
    wording = rng.choice(
        (f"Count from {first} to {last}.", f"Count from {first} to {last}", f"Count {first} to {last}.")
    )
    return Problem((Turn(wording, ", ".join(map(str, range(first, last + 1)))),), f"count {first} {last}")


def _copy(rng: Random) -> Problem:
    items = [rng.choice(_SYMBOLS) if rng.random() < 0.1 else _item(rng) for _ in range(rng.randint(2, 6))]
    text = " ".join(items)
    wording = rng.choice((f"Repeat: {text}", f"Say: {text}", f"Copy this: {text}", f"Repeat after me: {text}"))
    return Problem((Turn(wording, text),), f"copy {text}")


def _spell(rng: Random) -> Problem:
    word = _made_up_word(rng)
    wording = rng.choice(
        (f"Spell {word}.", f"Spell the word {word}.", f"How do you spell {word}?", f"spell {word}", f"Spell: {word}")
    )
    return Problem((Turn(wording, "-".join(word)),), f"spell {word}")


_FACTS = (
    # told, acknowledged, asked, answered
    ("My name is {}.", "Nice to meet you, {}!", "What is my name?", "Your name is {}."),
    ("I live in {}.", "{} sounds like a nice place!", "Where do I live?", "You live in {}."),
    ("My dog is called {}.", "{} is a good name for a dog!", "What is my dog called?", "Your dog is called {}."),
    ("The code is {}.", "I will remember {}.", "What is the code?", "The code is {}."),
)


def _recall(rng: Random) -> Problem:
    """A fact told in the first turn and asked for in the last, sometimes with another question between them."""
    told, noted, asked, answer = fact = rng.choice(_FACTS)
    value = str(_number(rng, 4)) if fact is _FACTS[3] else _made_up_word(rng).capitalize()
    between = draw("add2", rng, held_out=False).turns if rng.random() < 0.5 else ()
    turns = (Turn(told.format(value), noted.format(value)), *between, Turn(asked, answer.format(value)))
    return Problem(turns, f"remember {value}")


TASKS = {
    "add2": Task(_addition(2), 1.0),
    "add3": Task(_addition(3), 3.0),
    "sub2": Task(_subtraction(2), 1.0),
    "sub3": Task(_subtraction(3), 3.0),
    "sort": Task(_sort, 3.0),
    "reverse": Task(_reverse, 1.0),
    "count": Task(_count, 0.7),
    "copy": Task(_copy, 1.0),
    "spell": Task(_spell, 1.0),
    "recall": Task(_recall, 0.7),
    "few_shot": Task(_few_shot, 0.7),
}
"""What the model is good at."""

ROOM_TO_GROW = {
    "add_more": Task(
        _sum_of_three("What is {} + {} + {}?", "{} + {} + {}", "{} + {} + {} =", "Calculate {} + {} + {}."), 0.015
    ),
    "multiply": Task(_multiplication, 0.015),
    "below_0": Task(_below_zero, 0.015),
}
"""What it has barely seen, on purpose: reinforcement learning has something left to teach it."""

ALL_TASKS = TASKS | ROOM_TO_GROW

UNSEEN = {
    # Sums of three numbers, typed and asked for as it knows sums of two; 7 * 38, where it knows a little of 38 * 7.
    "unspaced": Task(_sum_of_three("{}+{}+{}", "{}+{}+{}=?"), 0),
    "listed": Task(_sum_of_three("Add {}, {} and {}.", "What is the sum of {}, {} and {}?"), 0),
    "swapped": Task(_swapped_multiplication, 0),
}
"""What it has never seen in this form: harder to teach."""
