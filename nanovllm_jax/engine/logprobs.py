"""Log probabilities as the outputs show them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nanovllm_jax.outputs import Logprob


class TokenLogprobs(NamedTuple):
    """What the device says of one token."""

    token: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: list[int]
    """The most likely tokens, best first; there may be more than were asked for."""
    top_logprobs: list[float]


def token_entries(tokens: list[int], numbers: np.ndarray) -> list[TokenLogprobs]:
    """From tokens and what kernels.token_logprobs says of them, [tokens, 2, 1 + MAX_LOGPROBS] int32."""
    ids, values = numbers[:, 0].tolist(), numbers[:, 1].view(np.float32).tolist()
    return [
        TokenLogprobs(token, logprob, rank, top_ids, top_logprobs)
        for token, (rank, *top_ids), (logprob, *top_logprobs) in zip(tokens, ids, values)
    ]


def readable_logprobs(
    entries: Iterable[TokenLogprobs], num_top: int, tokenizer: Any | None
) -> list[dict[int, Logprob]]:
    """For each token a dict by token id: its own logprob first, then those of the `num_top` most likely ones.

    Without a tokenizer, `decoded_token` stays None.
    """
    texts: dict[int, str | None] = {}
    options = dict(clean_up_tokenization_spaces=False)  # as in the text that the tokens make

    def logprob(token: int, value: float, rank: int) -> Logprob:
        if token not in texts:  # mostly the same few hundred
            texts[token] = None if tokenizer is None else tokenizer.decode([token], **options)
        return Logprob(value, rank, texts[token])

    readable = []
    for token, own, rank, top_ids, top_logprobs in entries:
        by_token = {token: logprob(token, own, rank)}
        for place, (top, value) in enumerate(zip(top_ids[:num_top], top_logprobs[:num_top]), start=1):
            if top != token:
                by_token[top] = logprob(top, value, place)
        readable.append(by_token)
    return readable
