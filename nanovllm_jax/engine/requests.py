"""A request while it runs: its sequences, their texts, and what its outputs have told."""

from array import array
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from nanovllm_jax.engine.activations import Activations
from nanovllm_jax.engine.detokenizer import Detokenizer
from nanovllm_jax.engine.logprobs import TokenTexts, own_logprobs, together
from nanovllm_jax.engine.sequence import Scored, Sequence
from nanovllm_jax.outputs import CompletionOutput, Logprobs, RequestMetrics, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


class Completion:
    """One of a request's n texts: a sequence, and how much of it was read and given out."""

    def __init__(self, index: int, seq: Sequence, token_texts: TokenTexts):
        """`token_texts`: without a tokenizer, it gives no text."""
        tokenizer = token_texts.tokenizer
        self.index = index
        self.seq = seq
        self.token_texts = token_texts
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, seq.params)
        self.num_read = 0  # tokens that the text knows
        self.num_given = 0  # tokens that outputs have had
        self.has_told_end = False  # an output has had the finish_reason
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0  # of the tokens given

    @property
    def has_news(self) -> bool:
        """Whether tokens have come since the last output, or the end has come without one."""
        return self.num_given < self.seq.num_completion_tokens or (self.seq.is_finished and not self.has_told_end)

    @property
    def finish_reason(self) -> str | None:
        """The sequence's, but for a stop string in the last token that its length allows."""
        return "stop" if self.stop_reason is not None else self.seq.finish_reason

    def read(self) -> bool:
        """Detokenize the tokens that have come; True where a stop string ends the text with them."""
        seq, params, detokenizer = self.seq, self.seq.params, self.detokenizer
        tokens = seq.token_ids[seq.num_prompt_tokens + self.num_read :].tolist()
        if not tokens:
            if detokenizer is not None and seq.finish_reason == "error":  # the one end that comes without a token
                detokenizer.finish()
            return False
        self.num_read += len(tokens)
        if seq.finish_reason == "stop":  # by the last token: after a stop string none comes
            if tokens[-1] in params.stop_token_ids:
                self.stop_reason = tokens[-1]
            if not params.include_stop_str_in_output:
                tokens.pop()
        if detokenizer is None:
            return False
        detokenizer.append(tokens)
        if seq.is_finished:
            detokenizer.finish()
        if detokenizer.stop is None:
            return False
        self.stop_reason = detokenizer.stop
        return True

    def take_output(self) -> CompletionOutput:
        """What has come since the last call."""
        self.read()
        seq, params = self.seq, self.seq.params
        tokens = seq.token_ids[seq.num_prompt_tokens + self.num_given :].tolist()
        output = CompletionOutput(
            index=self.index,
            text=self.detokenizer.take(seq.is_finished) if self.detokenizer else "",
            token_ids=tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            activations=seq.activations.whole() if params.capture and seq.is_finished else None,
        )
        if params.logprobs is not None:
            entries = together(seq.logprobs[self.num_given : self.num_given + len(tokens)], params.logprobs)
            self.cumulative_logprob += sum(own_logprobs(entries))
            output.cumulative_logprob = self.cumulative_logprob
            output.logprobs = Logprobs(tokens, entries, self.token_texts)
        self.num_given += len(tokens)
        self.has_told_end = seq.is_finished
        return output


@dataclass
class Request:
    """A request that was checked and accepted."""

    request_id: str | None
    prompt: str | None
    token_ids: array
    """What is to be computed: the prompt, and of a completion that is scored all but the last."""
    params: SamplingParams
    token_texts: TokenTexts
    """What gives the outputs their text; without a tokenizer where detokenize=False."""
    metrics: RequestMetrics
    stream: bool = False
    """Whether outputs tell what came since the one before, and not all of it at the end."""
    scored: Scored | None = None
    """The tokens whose log probabilities are wanted beside those of the generated ones: the first sequence has them."""
    completions: list[Completion] = field(default_factory=list)
    """All n, once the request has started."""
    num_unfinished: int = 0
    """How many of them have not ended."""

    def new_sequence(self, seq_id: int, seed: int, eos_token_ids: frozenset[int], max_model_len: int) -> Sequence:
        """One of the n sequences, with a seed of its own."""
        params, length = self.params, len(self.token_ids)
        max_len = max_model_len if params.max_tokens is None else min(length + params.max_tokens, max_model_len)
        seq = Sequence(
            seq_id,
            self.request_id,
            self.token_ids,
            params,
            seed=seed,
            stop_token_ids=frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids),
            min_len=min(length + params.min_tokens, max_len),
            max_len=max_len,
        )
        if params.capture:
            seq.activations = Activations()
        if params.steering is not None:
            seq.prefix_salt = np.array(params.steering).tobytes()
        return seq

    def add(self, seq: Sequence) -> None:
        """The next of the n texts comes from this sequence."""
        if not self.completions:
            seq.scored = self.scored
        self.completions.append(Completion(len(self.completions), seq, self.token_texts))
        self.num_unfinished += 1

    def read_prompt_again(self) -> None:
        """Forget the log probabilities and activations of a prompt that is not computed to its end.

        What dispatched steps have of them, and is to be read yet, is forgotten too.
        """
        seq, scored = self.completions[0].seq, self.scored
        if scored and not scored.is_complete and not seq.num_pending:
            seq.scored = self.scored = replace(scored, logprobs=[])
        for seq in (completion.seq for completion in self.completions):
            if seq.activations and not seq.num_pending and not seq.num_completion_tokens:
                seq.activations = Activations()

    def scores(self) -> list[float]:
        """The log probability of each token that `scored` wants."""
        return own_logprobs(together(self.scored.logprobs, num_top=0))

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        """What outputs tell of the prompt: made for the first of them, and not while the device waits for a start."""
        return self.token_ids.tolist()

    @property
    def has_news(self) -> bool:
        """Whether tokens, or the end of a text, have come since the last output."""
        return any(completion.has_news for completion in self.completions)

    @property
    def num_generated(self) -> int:
        """Tokens that have come, of all n texts."""
        return sum(completion.seq.num_completion_tokens for completion in self.completions)

    def take_output(self) -> RequestOutput:
        """What has come since the last call: everything, where it is called once, at the end."""
        seq, num_top, prompt_logprobs = self.completions[0].seq, self.params.prompt_logprobs, None
        if num_top is not None and not any(c.num_given or c.has_told_end for c in self.completions):
            entries = together(self.scored.logprobs, num_top)
            prompt_logprobs = Logprobs(self.prompt_token_ids, entries, self.token_texts)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[c.take_output() for c in self.completions if c.has_news],
            finished=not self.num_unfinished,
            num_cached_tokens=seq.num_cached_tokens,
            metrics=self.metrics,
        )
