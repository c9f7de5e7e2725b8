"""What one step computes: what the scheduler chooses, and the packer and the engine read."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from nanovllm_jax.engine.batch import StepSizes
from nanovllm_jax.engine.sequence import Sequence

_context, _table = attrgetter("num_computed"), attrgetter("block_table")


class RunAhead(NamedTuple):
    """When a step that only decodes computes several tokens of each sequence, as one program."""

    num_steps: int = 1
    """Tokens of each,"""
    rows: int = 0
    """for at most so many sequences,"""
    tokens: float = math.inf
    """with at most so many tokens in the cache together."""


ONE_STEP = RunAhead()


def all_of_them(decodes: int, tokens: int) -> int:
    """How many of so many tokens, of which some decode, a step should compute where its size does not matter."""
    return tokens


@dataclass(slots=True)
class PrefillChunk:
    """The `num_tokens` tokens of `seq` before position `seq.num_computed` (read right after `schedule()`)."""

    seq: Sequence
    num_tokens: int
    samples: bool  # the chunk reaches the end of the sequence: its last token's logits give the next token


@dataclass(slots=True)
class Schedule:
    """What one step computes.

    A row of `decodes` computes the one token at position `seq.num_computed - 1`, and samples. Where the host has not
    read that token yet (`seq.num_pending` is over 1), the device has it under `seq.slot`. `admitted` are those
    sequences of the step that have just got their slot and blocks. With `num_steps` over 1, where nothing prefills,
    each row computes so many tokens, each from the one sampled before it: up to position `seq.num_computed - 1`.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[PrefillChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_steps: int = 1

    def __bool__(self):
        return bool(self.decodes or self.prefills)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all chunks together."""
        return sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens that each of its steps computes."""
        return len(self.decodes) + self.num_prefill_tokens

    @property
    def sizes(self) -> StepSizes:
        """What a batch for it is to have room for."""
        return StepSizes(len(self.decodes), len(self.prefills), self.num_tokens)


def in_order(decodes: list[Sequence]) -> list[Sequence]:
    """Sequences as attention is to find them: the longest first, but beside one another those that share blocks.

    It starts with the first rows, and what takes longest must not be what it ends with. What neighbours share it reads
    once for several of them.
    """
    decodes = sorted(decodes, key=_context, reverse=True)
    first_blocks = [seq.block_table[0] for seq in decodes]
    if len({*first_blocks}) == len(decodes):
        return decodes
    families: dict[int, list[Sequence]] = {block: [] for block in first_blocks}
    for block, seq in zip(first_blocks, decodes):
        families[block].append(seq)
    return [seq for family in families.values() for seq in sorted(family, key=_table)]
