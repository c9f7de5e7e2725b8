"""How a request's tokens are chosen and when they end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from nanovllm_jax.values import check_switch, integer, is_integer, number, plain

MAX_LOGPROBS = 20  # kernels/ has the same number, and a test says so
"""Most likely tokens that `logprobs` and `prompt_logprobs` can ask for."""

FLOAT32_MAX, FLOAT32_TINY = 3.4e38, 1.1754944e-38  # the least that no GPU takes for 0
POSITIVE = math.ulp(0.0)
NUMBERS = {  # least, most, and both in words
    "temperature": (0, FLOAT32_MAX, f"0 (greedy) or a positive number up to {FLOAT32_MAX}"),
    "top_p": (POSITIVE, 1, "above 0 and at most 1 (which is off)"),
    "min_p": (0, 1, "from 0 (which is off) to 1"),
    "presence_penalty": (-2, 2, "from -2 to 2"),
    "frequency_penalty": (-2, 2, "from -2 to 2"),
    # Logits are multiplied or divided by it, in float32.
    "repetition_penalty": (1e-6, 1e6, "above 0: from 1e-6 to 1e6 (1 is off)"),
}
INTEGERS = {
    "n": (1, 2**14, "from 1 to 16384"),
    "max_tokens": (1, math.inf, "at least 1"),
    "min_tokens": (0, math.inf, "at least 0"),
    "top_k": (-1, 2**31 - 1, "at least 1, or 0 or -1 (which are off), and below 2**31"),
    "logprobs": (0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
    "seed": (-1, 2**63 - 1, "from 0 to 2**63 - 1, or None or -1 (which are none)"),
}
OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed")  # may be None
SWITCHES = ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens", "capture")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one request, with vLLM's names, defaults and meaning."""

    temperature: float = 1.0
    """0 picks the most likely token; above 0 samples from softmax(logits / temperature)."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the engine's max_model_len, which may end the text before in any case."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token: for benchmarks."""
    seed: int | None = None
    """Makes the request's draws repeatable whatever runs beside it. None (or -1, which becomes None): drawn from the
    engine's seed."""
    n: int = 1
    """How many texts to generate for the prompt; number i draws with seed + i."""
    top_k: int = 0
    """Sample among this many most likely tokens. 0 (or -1, which becomes 0): all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability, the one that reaches it included."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the most likely token's probability."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of each token, as many times as it was generated before."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens in the prompt or generated before."""
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these token ids; values beyond -100 and 100 are moved there."""
    min_tokens: int = 0
    """Up to so many tokens, no end-of-sequence token or stop token can come, and no stop string ends the text."""
    stop: str | list[str] | tuple[str, ...] | None = None
    """Strings that end the text, which is cut before the one that is complete first. Kept as a tuple."""
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    """Tokens that end the text, as end-of-sequence tokens do, and also with ignore_eos. Kept as a tuple."""
    include_stop_str_in_output: bool = False
    """Leave the stop string, or the text of the token that ended the sequence, in the text."""
    logprobs: int | None = None
    """Log probabilities for each generated token: its own, and those of so many most likely ones. None: none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    detokenize: bool = True
    """Give the text; False: token ids alone."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    capture: bool = False
    """Give the activations that the engine's probe takes out."""
    steering: float | list[float] | tuple[float, ...] | None = None
    """What the engine's probe edits the residual stream by: its steering_size numbers. Kept as a tuple; None: zeros."""

    def __post_init__(self):
        """Raise TypeError or ValueError for a value that cannot be, or that contradicts another."""
        for name, (least, most, words) in NUMBERS.items():
            self._set(name, number(name, getattr(self, name), least, most, words))
        for name, (least, most, words) in INTEGERS.items():
            self._set(name, integer(name, getattr(self, name), least, most, words, name in OPTIONAL))
        for name in SWITCHES:
            check_switch(name, getattr(self, name))
        self._set("stop", _strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("steering", _steering(self.steering))
        self._set("top_k", max(self.top_k, 0))
        self._set("seed", None if self.seed == -1 else self.seed)
        self._set("temperature", min(self.temperature, 1e37))  # its inverse must be a normal float32
        if 0 < self.temperature < 1e-2:
            # As in vLLM: logits divided by less than this overflow in float32.
            self._set("temperature", 1e-2)
        self._set("top_p", max(self.top_p, FLOAT32_TINY))  # as float32, too, a share that is more than nothing
        self._check_contradictions()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={list(self.stop)} is looked for in the text: it needs detokenize=True")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n} with temperature=0 would be the same text {self.n} times: use n=1, or sample")


def _strings(stop: Any) -> tuple[str, ...]:
    stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(string, str) for string in stop):
        raise TypeError(f"stop must be a string, a list of strings or None, not {stop!r}")
    if "" in stop:
        raise ValueError(f"stop must not hold an empty string, which is everywhere: {list(stop)}")
    return tuple(stop)


def _token_ids(ids: Any) -> tuple[int, ...]:
    try:
        listed = () if ids is None else tuple(plain(ids))
    except TypeError:
        listed = None
    if listed is None or isinstance(ids, (str, bytes, Mapping)):
        raise TypeError(f"stop_token_ids must be a list of token ids or None, not {ids!r}")
    for token in listed:
        if not is_integer(token):
            raise TypeError(f"stop_token_ids must be integers, not {token!r}")
    return tuple(map(int, listed))


def _biases(biases: Any) -> dict[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise TypeError(f"logit_bias must be a dict from token id to number, or None, not {biases!r}")
    clamped = {}
    for token, bias in biases.items():
        if not is_integer(token):
            raise TypeError(f"logit_bias must have token ids (integers) as keys, not {token!r}")
        bias = number(f"logit_bias[{token}]", bias, -math.inf, math.inf, "a number")
        clamped[int(token)] = min(100.0, max(-100.0, bias))
    return clamped


def _steering(numbers: Any) -> tuple[float, ...] | None:
    if numbers is None:
        return None
    try:
        listed = plain(numbers)
        listed = (listed,) if isinstance(listed, Real) else tuple(listed)
    except TypeError:
        listed = None
    if listed is None or isinstance(numbers, (str, bytes, Mapping)):
        raise TypeError(f"steering must be a number, a list of numbers or None, not {numbers!r}")
    return tuple(number("steering", one, -FLOAT32_MAX, FLOAT32_MAX, "finite") for one in listed)
