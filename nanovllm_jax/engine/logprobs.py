"""Log probabilities: from what the device says of tokens to what outputs show.

An entry is what kernels.token_logprobs says of one token: [2, 1 + MAX_LOGPROBS] int32.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nanovllm_jax.outputs import Logprob


class TokenTexts(dict[int, str | None]):
    """What each token is decoded to alone, made when it is first asked for; None without a tokenizer."""

    def __init__(self, tokenizer: Any | None):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str | None:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
        self[token] = text
        return text


def own_logprobs(entries: list[np.ndarray]) -> list[float]:
    """The log probability of each entry's token."""
    return np.concatenate(entries)[1::2, 0].view(np.float32).tolist() if entries else []


def in_numbers(entries: np.ndarray, num_top: int) -> Iterator[tuple[list[int], list[float]]]:
    """Of each of many entries [N, 2, 1 + MAX_LOGPROBS] the two rows, cut to so many most likely tokens.

    Made for many at once, which takes a tenth of the time that it takes one by one.
    """
    cut = entries[:, :, : 1 + num_top]
    return zip(cut[:, 0].tolist(), cut[:, 1].view(np.float32).tolist())


def readable(token: int, ids: list[int], values: list[float], num_top: int, texts: TokenTexts) -> dict[int, Logprob]:
    """An entry as outputs show it: by token id, the token's own first, then those of the `num_top` most likely ones."""
    by_token = {token: Logprob(values[0], ids[0], texts[token])}
    for place in range(1, 1 + num_top):
        top = ids[place]
        if top != token:
            by_token[top] = Logprob(values[place], place, texts[top])
    return by_token
