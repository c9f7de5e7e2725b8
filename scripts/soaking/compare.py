"""A request's output beside that of the same request run alone."""

from dataclasses import dataclass, field
from itertools import zip_longest

from nanovllm_jax.outputs import CompletionOutput, Logprob, RequestOutput

Logprobs = list[dict[int, Logprob] | None]


@dataclass
class Text:
    """One of the n texts, put together from what came of it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=list)
    ending: tuple = ()
    """finish_reason and stop_reason."""

    def add(self, part: CompletionOutput) -> None:
        assert not self.ending, "a text goes on after its end"
        self.text += part.text
        self.tokens += part.token_ids
        self.logprobs += part.logprobs or []
        if part.finish_reason is not None:
            self.ending = part.finish_reason, part.stop_reason


@dataclass
class Result:
    """What a request returned."""

    prompt: list[int] = field(default_factory=list)
    prompt_logprobs: Logprobs = field(default_factory=list)
    texts: dict[int, Text] = field(default_factory=dict)

    def add(self, output: RequestOutput) -> None:
        self.prompt = output.prompt_token_ids
        self.prompt_logprobs += output.prompt_logprobs or []
        for part in output.outputs:
            self.texts.setdefault(part.index, Text()).add(part)

    @property
    def num_tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts.values())


@dataclass
class Difference:
    """Where two texts part."""

    index: int
    at: int
    """The first token that differs."""
    tokens: tuple[int | None, int | None]
    """In company and alone; None: the text has ended."""


def token_differences(found: Result, alone: Result) -> list[Difference]:
    """Of each text the first token that differs, if one does."""
    differences = []
    for index, text in found.texts.items():
        for at, pair in enumerate(zip_longest(text.tokens, alone.texts[index].tokens)):
            if pair[0] != pair[1]:
                differences.append(Difference(index, at, pair))
                break
    return differences


def other_differences(found: Result, alone: Result, tolerance: float) -> list[str]:
    """In words: what differs though the tokens up to there do not."""
    words = []
    if logprob_difference(found.prompt_logprobs, alone.prompt_logprobs) > tolerance:
        words.append("prompt_logprobs differ")
    for index, text in found.texts.items():
        other = alone.texts[index]
        if logprob_difference(text.logprobs, other.logprobs) > tolerance:
            words.append(f"logprobs of text {index} differ")
        if text.tokens == other.tokens and (text.text, text.ending) != (other.text, other.ending):
            words.append(f"text {index} is {text.text!r} {text.ending}, alone {other.text!r} {other.ending}")
    return words


def largest_difference(found: Result, alone: Result) -> float:
    """Between any two log probabilities of the same place."""
    pairs = [(found.prompt_logprobs, alone.prompt_logprobs)]
    pairs += [(text.logprobs, alone.texts[index].logprobs) for index, text in found.texts.items()]
    return max(logprob_difference(*pair) for pair in pairs)


def logprob_difference(ours: Logprobs, theirs: Logprobs) -> float:
    """The largest between values at one place and of one token, as far as the tokens are the same; of values below -1
    it is a share of the value.

    The most likely tokens are compared by their place: two that are equally likely may change theirs.
    """
    largest = 0.0
    for entries in zip(ours, theirs):
        if None in entries:  # a prompt's first token
            continue
        if next(iter(entries[0])) != next(iter(entries[1])):
            break
        values = [[entry.logprob for entry in by_token.values()] for by_token in entries]
        own, *best = zip(*([row[0], *sorted(row, reverse=True)] for row in values))
        largest = max(largest, *(abs(a - b) / max(1, -a) for a, b in (own, *best)))
    return largest
