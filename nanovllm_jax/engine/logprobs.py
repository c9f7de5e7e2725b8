"""Log probabilities on their way from the device to outputs.

An entry is what kernels.token_logprobs says of one token: [2, 1 + MAX_LOGPROBS] int32. outputs.Logprobs shows entries.
"""

from typing import Any

import numpy as np


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


def together(entries: list[np.ndarray], num_top: int) -> np.ndarray:
    """Entries as one array [N, 2, 1 + num_top]: a copy, without what nobody asked for."""
    if not entries:
        return np.empty((0, 2, 1 + num_top), np.int32)
    return np.concatenate(entries).reshape(len(entries), 2, -1)[:, :, : 1 + num_top].copy()


def own_logprobs(entries: np.ndarray) -> list[float]:
    """The log probability of each entry's token."""
    return entries[:, 1, 0].view(np.float32).tolist()
