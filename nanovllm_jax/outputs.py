"""What a request returns."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class CompletionOutput:
    """One generated text."""

    index: int
    text: str
    """The tokens decoded, without the one that ended it and special tokens; empty when the engine has no tokenizer."""
    token_ids: list[int]
    """Every generated token, the end-of-sequence token included."""
    finish_reason: str | None = None
    """stop (an end-of-sequence token), length (max_tokens or max_model_len) or abort."""


@dataclass(slots=True)
class RequestOutput:
    """A finished request, as in vLLM. output["text"] and output["token_ids"] also work, as in nano-vllm."""

    request_id: str
    prompt: str | None
    """The prompt's text, where it was given as text."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""

    def __getitem__(self, key: str):
        """The first completion's "text" or "token_ids"."""
        if key not in ("text", "token_ids"):
            raise KeyError(f"{key!r}: a RequestOutput has the keys 'text' and 'token_ids', and vLLM's attributes")
        return getattr(self.outputs[0], key)
