"""Log probabilities on their way from the device to outputs.

An entry is what kernels.token_logprobs says of one token, [2, 1 + MAX_LOGPROBS] int32, as bytes: they are quick to cut
out of what came and to join, and keep nothing else of it alive. outputs.Logprobs shows them.
"""

from typing import Any

import numpy as np

from nanovllm_jax.sampling_params import MAX_LOGPROBS


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


def entries_of(numbers: np.ndarray) -> list[bytes]:
    """Each token's entry; numbers [N, 2, 1 + MAX_LOGPROBS] int32."""
    whole, size = numbers.tobytes(), numbers[0].nbytes
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def together(entries: list[bytes], num_top: int) -> np.ndarray:
    """Entries as one array [N, 2, 1 + num_top] int32, without what nobody asked for."""
    numbers = np.frombuffer(b"".join(entries), np.int32)
    return numbers.reshape(-1, 2, 1 + MAX_LOGPROBS)[:, :, : 1 + num_top].copy()


def own_logprobs(entries: np.ndarray) -> list[float]:
    """The log probability of each entry's token."""
    return entries[:, 1, 0].view(np.float32).tolist()
