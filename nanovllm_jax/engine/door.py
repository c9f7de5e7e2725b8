"""The door: requests are made here, of prompts and settings that the model can run, and the others are refused."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nanovllm_jax.engine.logprobs import TokenTexts
from nanovllm_jax.engine.metrics import now
from nanovllm_jax.engine.prompts import Prompt, check_params, check_probing, check_token_ids, encode, read_prompt
from nanovllm_jax.engine.requests import Request
from nanovllm_jax.engine.sequence import Scored
from nanovllm_jax.outputs import RequestMetrics
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.values import check_switch, plain

# A request that is run for the log probabilities of its own tokens.
SCORING = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)


@dataclass(frozen=True)
class Door:
    """What an engine can run. Every check raises TypeError or ValueError, naming the value, and changes nothing."""

    vocab_size: int
    max_model_len: int
    tokenizer: Any | None
    eos_token_ids: frozenset[int]
    default_params: SamplingParams
    """Of requests that bring none."""
    probe: Any | None

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Those of all requests that want text."""
        return TokenTexts(self.tokenizer)

    def check_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        stream: bool = False,
    ) -> Request:
        """A request ready to be started."""
        metrics = RequestMetrics(arrival_time=now())
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, not {params!r}")
        if params.logit_bias is not None:
            params = replace(params)  # checked again: a dict may have changed, and may later
        check_params(params, self.vocab_size, self.tokenizer, self.eos_token_ids)
        check_probing(params, self.probe)
        if request_id is not None and not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string or None, not {request_id!r}")
        check_switch("stream", stream)
        text, tokens = read_prompt(prompt, self.tokenizer)
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one")
        ids = check_token_ids(tokens, self.vocab_size)
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with one generated token it must fit in max_model_len="
                f"{self.max_model_len}. Shorten it, or raise max_model_len"
            )
        token_texts = self.token_texts if params.detokenize else TokenTexts(None)
        request = Request(request_id, text, ids, params, token_texts, metrics, stream)
        if params.prompt_logprobs is not None:
            request.scored = Scored(1, ids[1:].tolist(), params.prompt_logprobs)
        return request

    def check_score(self, prompt: Prompt, completion: str | Sequence[int]) -> Request:
        """A request whose `scored` will hold the log probabilities of the completion's tokens."""
        request = self.check_request(prompt, SCORING)
        tokens = plain(completion)
        if isinstance(completion, str):
            tokens = encode(self.tokenizer, completion, "completion", add_special_tokens=False)
        elif not isinstance(tokens, (list, tuple)):
            raise TypeError(f"a completion is a string or a list of token ids, not {completion!r}")
        ids = check_token_ids(tokens, self.vocab_size, "completion") if tokens else array("i")
        length = len(request.token_ids)
        if length + len(ids) > self.max_model_len:
            raise ValueError(
                f"prompt and completion have {length} + {len(ids)} tokens, which must fit in max_model_len="
                f"{self.max_model_len}. Shorten them, or raise max_model_len"
            )
        request.scored = Scored(length, ids.tolist(), num_top=0)
        request.token_ids += ids[:-1]  # nothing is wanted of what follows the last
        return request


def named_each(what: str, check: Callable, *lists: Sequence[Any]) -> list[Any]:
    """check(*) of each; a TypeError or ValueError gets a note that says which one it is about."""
    results = []
    for values in zip(*lists, strict=True):
        try:
            results.append(check(*values))
        except (TypeError, ValueError) as error:
            error.add_note(f"This is {what} {len(results)} of {len(lists[0])}, counted from 0; none was started.")
            raise
    return results
