"""What a request returns, and what the engine says of itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Logprob:
    """How likely a token was at its place, by the model's own logits."""

    logprob: float
    rank: int | None = None
    """1 for the most likely token."""
    decoded_token: str | None = None
    """The token's text; None without a tokenizer or with detokenize=False."""


class Logprobs(Sequence[dict[int, Logprob] | None]):
    """For each token a dict of Logprob by token id: its own first, then those of the most likely ones. None for a
    prompt's first token, which nothing predicts.

    It is read and compared as the list of them, and pickled and copied as one. Each dict is made when it is looked at:
    to make all of them, several objects a token, would take the host longer than a GPU takes for the tokens.
    """

    __slots__ = ("_entries", "_texts", "_tokens")

    def __init__(self, tokens: list[int], entries: np.ndarray, texts: Mapping[int, str | None]):
        """`entries` [N, 2, 1 + most likely tokens] int32, of the last N of `tokens`: a token's rank and the most likely
        ones, and the bits of their log probabilities as float32. `texts`: of tokens, alone."""
        self._tokens, self._entries, self._texts = list(tokens), entries, texts

    def __len__(self):
        return len(self._tokens)

    def __iter__(self):
        first = len(self._tokens) - len(self._entries)
        yield from [None] * first
        yield from map(self._by_token, self._tokens[first:], *_numbers(self._entries))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self)[index]
        place = range(len(self))[index] - len(self) + len(self._entries)
        if place < 0:
            return None
        [ids], [values] = _numbers(self._entries[place : place + 1])
        return self._by_token(self._tokens[index], ids, values)

    def _by_token(self, token: int, ids: list[int], values: list[float]) -> dict[int, Logprob]:
        by_token = {token: Logprob(values[0], ids[0], self._texts[token])}
        for place in range(1, len(ids)):
            top = ids[place]
            if top != token:
                by_token[top] = Logprob(values[place], place, self._texts[top])
        return by_token

    def __iadd__(self, later: "Logprobs"):
        self._tokens += later._tokens
        self._entries = np.concatenate((self._entries, later._entries))
        return self

    def __eq__(self, other):
        return list(self) == list(other) if isinstance(other, (list, Logprobs)) else NotImplemented

    def __reduce__(self):
        return list, (list(self),)

    def __repr__(self):
        return repr(list(self))


def _numbers(entries: np.ndarray) -> tuple[list[list[int]], list[list[float]]]:
    """The two rows of each entry."""
    return entries[:, 0].tolist(), entries[:, 1].view(np.float32).tolist()


@dataclass(slots=True)
class CompletionOutput:
    """One generated text, or what has come of it since the last output where the request streams."""

    index: int
    """Which of the request's n texts."""
    text: str
    """The tokens decoded, by default without special tokens and what ended the text; empty without a tokenizer and with
    detokenize=False."""
    token_ids: list[int]
    """Every generated token, the one that ended the text included."""
    cumulative_logprob: float | None = None
    """Sum of the logprobs of all tokens up to here; None where they were not asked for."""
    logprobs: Sequence[dict[int, Logprob]] | None = None
    """Logprobs: for each token a dict by token id, its own first, then the most likely ones. None where they were not
    asked for."""
    finish_reason: str | None = None
    """stop (an end-of-sequence token, a stop token or a stop string), length (max_tokens or max_model_len), or error
    (the model's logits were NaN or infinite)."""
    stop_reason: int | str | None = None
    """The stop string or the one of stop_token_ids that ended the text."""
    activations: dict[str, Any] | None = field(default=None, compare=False)
    """With capture=True, and the text's last output: what the engine's probe took out, by place. Row p of a NumPy array
    belongs to position p of prompt and text (the last token of all is never computed), row i of "logits" to the text's
    token i, which was drawn from them."""

    def finished(self) -> bool:
        """Whether the text has come to its end."""
        return self.finish_reason is not None

    def add(self, later: "CompletionOutput") -> None:
        """Take in the text's next increment."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None:
            self.logprobs += later.logprobs
        self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.activations = later.activations


@dataclass(slots=True)
class RequestMetrics:
    """When a request got how far, in seconds since the epoch by a clock that never goes back; None: not yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    """When the first of its n texts was admitted to the batch."""
    first_token_time: float | None = None
    """When the host had read its first token."""
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to admission."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A finished request, as in vLLM. output["text"] and output["token_ids"] also work, as in nano-vllm.

    Where the request streams, what has come since its last output: the n texts that have grown.
    """

    request_id: str
    prompt: str | None
    """The prompt's text, where it was given as text."""
    prompt_token_ids: list[int]
    """A stream's outputs share one list: copy it to add to it."""
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
    """For each prompt token, as CompletionOutput.logprobs, and None for the first. With a stream's first output."""
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    """Whether this is the request's last output."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""
    metrics: RequestMetrics | None = field(default=None, compare=False)
    """The request's times, as far as they have come: its outputs share one object."""

    def add(self, later: "RequestOutput") -> None:
        """Take in the increments of the request's next output."""
        known = {completion.index: completion for completion in self.outputs}
        for completion in later.outputs:
            if completion.index in known:
                known[completion.index].add(completion)
            else:
                self.outputs.append(completion)
        self.finished = later.finished
        self.num_cached_tokens = later.num_cached_tokens

    def keys(self) -> tuple[str, ...]:
        """Those of nano-vllm's outputs, which are dicts: dict(output) is one."""
        return "text", "token_ids"

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str):
        """Text 0's "text" or "token_ids": empty where a stream's output has nothing new of it."""
        if key not in self.keys():
            raise KeyError(f"{key!r}: a RequestOutput has the keys 'text' and 'token_ids', and vLLM's attributes")
        first = next((completion for completion in self.outputs if completion.index == 0), None)
        return getattr(first or CompletionOutput(0, "", []), key)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands; totals since it started."""

    num_running: int
    """Sequences in the batch: each of a request's n texts is one."""
    num_waiting: int
    """Sequences that wait for a place in it."""
    num_free_blocks: int
    """KV cache blocks that no sequence owns; they may still hold a prefix that can be reused."""
    num_blocks: int
    prefix_cache_hit_rate: float
    """Share of all prompt tokens that were found in the prefix cache, 0 to 1."""
    num_preemptions: int
    """How often a sequence lost its blocks to older ones, or to new weights, to be computed again."""
    num_finished_requests: int
    num_aborted_requests: int
    num_prefill_tokens: int
    """Tokens computed in chunks of prompts; after a preemption also those generated before it."""
    num_decode_tokens: int
    """Tokens computed one a step."""
    num_generated_tokens: int
    """Tokens that requests got."""
    prefill_tokens_per_second: float
    """Over the last ten seconds, or since work began in them; the same for the next."""
    decode_tokens_per_second: float
