"""Prompts and settings at the door: read, and refused where the model cannot run them."""

import struct
from array import array
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.values import is_integer, plain

Prompt = str | list[int] | dict[str, Any]
"""A text, token ids, or a dict with "prompt" (a text), "prompt_token_ids", or both: then the ids are what runs."""

PROMPT_KEYS = {"prompt", "prompt_token_ids"}


def read_prompt(prompt: Prompt, tokenizer: Any | None) -> tuple[str | None, list | tuple]:
    """The prompt's text, where it is given as text, and its token ids, which are not checked yet.

    Raises TypeError or ValueError, naming the value, for what is no prompt.
    """
    if not isinstance(prompt, Mapping):
        fields = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    elif prompt and set(prompt) <= PROMPT_KEYS:
        fields = {key: value for key, value in prompt.items() if value is not None}  # an output's own, given back
    else:
        unknown = [key for key in prompt if key not in PROMPT_KEYS]
        raise ValueError(f"a prompt dict has the key 'prompt_token_ids' or 'prompt', not {unknown}")
    text, tokens = fields.get("prompt"), plain(fields.get("prompt_token_ids"))
    good_text = isinstance(text, str) or "prompt" not in fields
    good_tokens = isinstance(tokens, (list, tuple)) or "prompt_token_ids" not in fields
    if not (fields and good_text and good_tokens):
        raise TypeError(f'a prompt is a string, a list of token ids or {{"prompt_token_ids": [...]}}, not {prompt!r}')
    return text, encode(tokenizer, text) if tokens is None else tokens


def encode(tokenizer: Any | None, text: str, what: str = "prompt", **options: Any) -> list[int]:
    """The text's token ids. Raises ValueError without a tokenizer, and for a text that it cannot encode."""
    if tokenizer is None:
        raise ValueError(f"the checkpoint has no tokenizer: give the {what} as a list of token ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} {text!r} is not valid Unicode text: {error}") from error
    try:
        return tokenizer.encode(text, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library's panics are no Exceptions
        raise ValueError(f"the tokenizer fails on the {what}: {error}") from error


def check_token_ids(tokens: list | tuple, vocab_size: int, what: str = "prompt") -> array:
    """An array of the ids, one or more. Raises TypeError or ValueError unless all are in the vocabulary.

    A prompt may have 100,000: the good ones never meet a Python loop.
    """
    with suppress(struct.error, TypeError):
        # Quicker than array("i", tokens). It takes integers of any kind, and also True and False, as 1 and 0.
        ids = array("i", struct.pack(f"{len(tokens)}i", *tokens))
        numbers = np.frombuffer(ids, np.intc)
        least, most = numbers.min(), numbers.max()
        if least >= 0 and most < vocab_size and (least > 1 or set(map(type, tokens)) == {int}):
            return ids
    for token in tokens:
        if not is_integer(plain(token)):
            raise TypeError(f"{what} token ids must be integers, not {token!r}; one {what} is wanted here")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{what} token id {token} is not in the vocabulary: 0 to {vocab_size - 1}")
    return ids  # NumPy's and JAX', with a 0 or a 1 among them


def check_params(params: SamplingParams, vocab_size: int, tokenizer: Any | None, eos_token_ids: frozenset[int]) -> None:
    """Raise ValueError for settings that this model or its tokenizer cannot follow."""
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias or ())):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name}: token id {token} is not in the vocabulary: 0 to {vocab_size - 1}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(f"{name}={getattr(params, name)} is more than the vocabulary's {vocab_size} tokens")
    if params.min_tokens and eos_token_ids.union(params.stop_token_ids).issuperset(range(vocab_size)):
        raise ValueError(
            f"min_tokens={params.min_tokens} puts off stop_token_ids and end-of-sequence tokens, which are the "
            "whole vocabulary: leave a token out of stop_token_ids, or set min_tokens=0"
        )
    if params.stop and tokenizer is None:
        raise ValueError(f"stop={list(params.stop)} needs a tokenizer, which the checkpoint lacks: use stop_token_ids")


def check_probing(params: SamplingParams, probe: Any | None) -> None:
    """Raise ValueError for a capture or steering that the engine's probe, or its lack, makes impossible."""
    if params.capture and not (probe and probe.capture):
        raise ValueError("capture=True needs an engine that takes something out: LLM(model, probe=Probe(capture=...))")
    size = probe.steering_size if probe else 0
    if params.steering is not None and len(params.steering) != size:
        raise ValueError(f"steering brings {len(params.steering)} numbers, and the engine's probe takes {size}")
