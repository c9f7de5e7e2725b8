"""Random requests, good and bad ones."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovllm_jax import LLM, SamplingParams

WORDS = [" the", "e", " a", "1", ".", "in", "qu", "\n"]  # stop strings, or parts of them


@dataclass(frozen=True)
class Case:
    """A request."""

    prompt: str | list[int]
    params: SamplingParams
    stream: bool


class RequestMaker:
    """Requests of all kinds. Many share a prefix; some go on where an earlier one ended."""

    def __init__(self, llm: LLM, rng: random.Random):
        self.vocab_size, self.tokenizer = llm.model_config.vocab_size, llm.tokenizer
        self.longest = llm.max_model_len - 2
        self.rng = rng
        self.prefixes = [self._tokens(self._length(self.longest // 2)) for _ in range(6)]
        self.past: list[list[int]] = []  # prompts with their answers

    def remember(self, tokens: list[int]) -> None:
        """A prompt and its answer, for a later request to go on from."""
        self.past = [*self.past[-19:], tokens]

    def good(self) -> Case:
        """A request that the engine can run."""
        return Case(self._prompt(), self._params(), self.rng.random() < 0.4)

    def bad(self) -> tuple[Any, Callable[[], SamplingParams]]:
        """A request that must be refused: by the engine, or already when its params are made."""
        refused = [
            ([], SamplingParams),
            ([self.vocab_size], SamplingParams),
            ([-1], SamplingParams),
            ([1.5], SamplingParams),
            ([1] * (self.longest + 2), SamplingParams),
            ({"token_ids": [1]}, SamplingParams),
            ("half a pair: \ud800", SamplingParams),
            ([1], lambda: {"temperature": 1}),
            ([1], lambda: SamplingParams(temperature=-1)),
            ([1], lambda: SamplingParams(n=2, temperature=0)),
            ([1], lambda: SamplingParams(logit_bias={self.vocab_size: 1})),
            ([1], lambda: SamplingParams(stop_token_ids=[self.vocab_size])),
        ]
        return self.rng.choice(refused)

    def _length(self, most: int) -> int:
        """Short ones are more frequent than long ones."""
        return 1 + int((most - 1) * self.rng.random() ** 3)

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(count)]

    def _prompt(self) -> str | list[int]:
        kind = self.rng.random()
        if kind < 0.1 and self.tokenizer is not None:
            return "".join(self.rng.choices(WORDS, k=self.rng.randint(1, 9)))
        tokens = self._tokens(self._length(self.longest if kind < 0.2 else self.longest // 4))
        if kind < 0.6:
            prefix = self.rng.choice(self.prefixes)
            tokens = prefix[: self.rng.choice((len(prefix), self._length(len(prefix))))] + tokens[:20]
        elif kind < 0.8 and self.past:
            tokens = self.rng.choice(self.past) + tokens[: self.rng.randint(0, 20)]
        return tokens[: self.longest]

    def _params(self) -> SamplingParams:
        rng, options = self.rng, {}

        def maybe(chance: float, **values: Any) -> None:
            if rng.random() < chance:
                options.update(values)

        options["temperature"] = rng.choice((0, 0.01, 0.6, 1, 1, 1.5))
        options["max_tokens"] = self._length(64)
        maybe(0.02, max_tokens=None)  # as far as the model goes
        maybe(0.3, top_k=rng.choice((1, 2, 20, self.vocab_size)))
        maybe(0.3, top_p=rng.choice((0.1, 0.5, 0.9, 0.99)))
        maybe(0.2, min_p=rng.choice((0.01, 0.1, 0.5)))
        maybe(0.2, presence_penalty=rng.uniform(-2, 2))
        maybe(0.2, frequency_penalty=rng.uniform(-2, 2))
        maybe(0.2, repetition_penalty=rng.uniform(0.5, 2))
        maybe(0.2, logit_bias={rng.randrange(self.vocab_size): rng.uniform(-100, 10) for _ in range(9)})
        maybe(0.4, stop_token_ids=self._tokens(self.vocab_size // 32))
        maybe(0.2, min_tokens=self._length(options["max_tokens"] or 16))
        maybe(0.3, ignore_eos=True)
        maybe(0.4, logprobs=rng.choice((0, 1, 5, 20)))
        maybe(0.1, prompt_logprobs=rng.choice((0, 3)))
        maybe(0.3, skip_special_tokens=False)
        if self.tokenizer is not None:
            strings = ["".join(rng.choices(WORDS, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 3))]
            maybe(0.3, stop=strings, include_stop_str_in_output=rng.random() < 0.5)
        if "stop" not in options:
            maybe(0.2, detokenize=False)
        if options["temperature"] or rng.random() < 0.5:  # a greedy one may do without a seed
            options["seed"] = rng.choice((rng.randrange(2**63), rng.randrange(9), 2**63 - 1))
        if options["temperature"]:
            maybe(0.15, n=rng.randint(2, 3))
        return SamplingParams(**options)
