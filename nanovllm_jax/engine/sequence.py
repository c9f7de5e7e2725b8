"""One sequence: its tokens, its phase, and where its keys and values lie."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Status(Enum):
    """The phase of a sequence. It is set, never derived from counts: a preempted sequence prefills again."""

    WAITING = "waiting"  # holds no blocks and no slot: new, or preempted
    PREFILL = "prefill"  # admitted, some known tokens are not computed yet
    DECODE = "decode"  # admitted, every known token is computed: each step samples one more
    FINISHED = "finished"


@dataclass(slots=True)
class Scored:
    """Tokens of which the log probability is wanted, each from the computation of the prompt token before it."""

    first: int
    """The position of the first; the others follow."""
    token_ids: list[int]
    num_top: int
    """How many most likely tokens to name beside each."""
    logprobs: list[bytes] = field(default_factory=list)
    """The entries (engine/logprobs.py) that have been read."""

    @property
    def next(self) -> int:
        """The position of the first one that has not been read."""
        return self.first + len(self.logprobs)

    @property
    def is_complete(self) -> bool:
        """Whether all have been read."""
        return len(self.logprobs) == len(self.token_ids)


class Sequence:
    """A prompt and the tokens generated for it; the scheduler moves it, the engine reads it.

    Two counts go beyond the tokens the host has seen, because steps are dispatched before the last one is read:
    `num_computed` includes dispatched steps, and `num_pending` counts tokens that such steps will deliver.
    A sequence in DECODE keeps `len(token_ids) + num_pending == num_computed + 1`: all but the newest are computed.
    """

    def __init__(
        self,
        seq_id: int,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: Any,
        *,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        min_len: int = 0,
        max_len: int,
    ):
        """`min_len` and `max_len` count prompt and output tokens; the scheduler never looks inside `params`."""
        self.seq_id = seq_id  # arrival order
        self.request_id = request_id
        self.token_ids = array("i", prompt_token_ids)  # and then every output token that was read
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.seed = seed  # of its own draws, where `params` may have another or none
        self.stop_token_ids = stop_token_ids  # a generated token among these ends the sequence,
        self.min_len = min_len  # unless it is one of the first so many
        self.max_len = max_len
        self.status = Status.WAITING
        self.finish_reason: str | None = None  # "stop", "length", "abort" or "error"
        self.group = 0  # the data group that runs it
        self.slot = -1  # a row of the device's per-sequence state while admitted, else -1
        self.block_table: list[int] = []  # position p lies in block block_table[p // block_size]
        self.block_hashes: list[bytes] = []  # chained hashes of the leading full blocks, as far as anyone asked
        self.num_computed = 0  # tokens whose keys and values are stored, by steps done or dispatched
        self.num_pending = 0  # tokens sampled by dispatched steps and not read yet
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at the first admission
        self.num_preemptions = 0
        self.logprobs: list[bytes] = []  # each output token's entry (engine/logprobs.py), where its request asks for it
        self.scored: Scored | None = None  # what is wanted of the prompt's own tokens
        self.prefix_salt = b""  # sequences of another salt have other keys and values for the same tokens
        self.activations: Any = None  # engine.activations.Activations, where its request captures

    @property
    def first_needed(self) -> int:
        """The first position that is computed, cached or not: for logits, log probabilities or activations."""
        first = len(self.token_ids) - 1
        if self.scored is not None and not self.scored.is_complete:
            first = min(first, self.scored.next - 1)
        return first if self.activations is None else min(first, self.activations.num_positions)

    @property
    def num_completion_tokens(self) -> int:
        """Output tokens read so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """A copy of the prompt."""
        return self.token_ids[: self.num_prompt_tokens].tolist()

    @property
    def completion_token_ids(self) -> list[int]:
        """A copy of the output tokens read so far, a final stop token included."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended; `finish_reason` says why."""
        return self.status is Status.FINISHED

    def __repr__(self):
        return (
            f"Sequence({self.request_id!r}, {self.status.name}, tokens={self.num_prompt_tokens}"
            f"+{self.num_completion_tokens}, computed={self.num_computed}, pending={self.num_pending})"
        )
