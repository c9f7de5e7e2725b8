"""What a request returns."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """How likely a token was at its place, by the model's own logits."""

    logprob: float
    rank: int | None = None
    """1 for the most likely token."""
    decoded_token: str | None = None
    """The token's text; None without a tokenizer or with detokenize=False."""


@dataclass(slots=True)
class CompletionOutput:
    """One generated text, or what has come of it since the last output where the request streams."""

    index: int
    """Which of the request's n texts."""
    text: str
    """The tokens decoded, without special tokens and what ended the text; empty when the engine has no tokenizer."""
    token_ids: list[int]
    """Every generated token, the one that ended the text included."""
    cumulative_logprob: float | None = None
    """Sum of the logprobs of all tokens up to here; None where they were not asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token, the logprobs by token id: its own first, then those of the most likely ones."""
    finish_reason: str | None = None
    """stop (an end-of-sequence token, a stop token or a stop string), length (max_tokens or max_model_len), or error
    (the model's logits were NaN or infinite)."""
    stop_reason: int | str | None = None
    """The stop string or the one of stop_token_ids that ended the text."""


@dataclass(slots=True)
class RequestOutput:
    """A finished request, as in vLLM. output["text"] and output["token_ids"] also work, as in nano-vllm.

    Where the request streams, what has come since its last output: the n texts that have grown.
    """

    request_id: str
    prompt: str | None
    """The prompt's text, where it was given as text."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each prompt token, as CompletionOutput.logprobs, and None for the first. With a stream's first output."""
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    """Whether this is the request's last output."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""

    def __getitem__(self, key: str):
        """The first completion's "text" or "token_ids"."""
        if key not in ("text", "token_ids"):
            raise KeyError(f"{key!r}: a RequestOutput has the keys 'text' and 'token_ids', and vLLM's attributes")
        return getattr(self.outputs[0], key)
