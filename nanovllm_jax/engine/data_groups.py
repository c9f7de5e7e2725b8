"""Data parallelism: several groups of devices with the same weights, each with its own sequences and blocks.

To the engine, a `DataGroups` is a scheduler, and a `GroupPacker` a packer. Each group has a Scheduler of its own; their
steps are dispatched as one program, which needs one shape: one that holds each of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.buckets import Buckets
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence


@dataclass(slots=True)
class GroupSchedule(Schedule):
    """What one step computes in all groups: the groups' schedules one after another, and joined."""

    groups: list[Schedule] = field(default_factory=list)


def _total(name: str) -> property:
    return property(lambda self: sum(getattr(group, name) for group in self.groups))


class DataGroups:
    """Schedulers side by side, as one."""

    num_running = _total("num_running")
    num_waiting = _total("num_waiting")
    num_blocks = _total("num_blocks")
    num_free_blocks = _total("num_free_blocks")
    num_preemptions = _total("num_preemptions")
    num_prefix_query_tokens = _total("num_prefix_query_tokens")
    num_prefix_hit_tokens = _total("num_prefix_hit_tokens")

    def __init__(self, num_groups: int, make_scheduler: Callable[[], Scheduler]):
        self.groups = [make_scheduler() for _ in range(num_groups)]
        self._last_added: Sequence | None = None

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence is waiting or running."""
        return any(group.has_unfinished for group in self.groups)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence in the group that will be done with it first; it stays there.

        The n texts of a request come one after another and go to one group: they share its prompt.
        """
        last = self._last_added
        is_next = last is not None and not last.is_finished and last.request_id == seq.request_id
        seq.group = last.group if is_next else self._place(seq)
        self._last_added = seq
        self.groups[seq.group].add(seq)

    def _place(self, seq: Sequence) -> int:
        """The group with the least to do: prompts of unfinished sequences, and of this one what is not cached there."""
        costs = [
            group.num_unfinished_prompt_tokens - group.block_manager.num_cached_tokens(seq) for group in self.groups
        ]
        return costs.index(min(costs))

    def abort_all(self) -> None:
        """End every sequence and forget cached prefixes."""
        for group in self.groups:
            group.abort_all()

    def preempt_all(self) -> None:
        """Put every admitted sequence back to its group's queue and forget cached prefixes."""
        for group in self.groups:
            group.preempt_all()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, where no group has a sequence."""
        for group in self.groups:
            group.reset_prefix_cache()

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence in any state, unless it has ended."""
        self.groups[seq.group].finish(seq, reason)

    def fills_a_step(self) -> bool:
        """Whether the waiting prompts fill every group's part of the next step."""
        return all(group.fills_a_step() for group in self.groups)

    def schedule(self) -> GroupSchedule:
        """Choose every group's part of the next step; of each sequence as many tokens as every busy group can."""
        num_steps = min((group.num_steps() for group in self.groups if group.has_unfinished), default=1)
        parts = [group.schedule(num_steps) for group in self.groups]
        return GroupSchedule(
            decodes=[seq for part in parts for seq in part.decodes],
            prefills=[chunk for part in parts for chunk in part.prefills],
            admitted=[seq for part in parts for seq in part.admitted],
            num_steps=max(part.num_steps for part in parts),
            groups=parts,
        )

    def update(self, schedule: GroupSchedule, decode_tokens: list[int], prefill_tokens: list[int]) -> list[Sequence]:
        """Take in the tokens of a dispatched step; returns the sequences that finished with them."""
        decodes, prefills, finished = iter(decode_tokens), iter(prefill_tokens), []
        for group, part in zip(self.groups, schedule.groups):
            tokens = [next(decodes) for _ in part.decodes], [next(prefills) for _ in part.prefills]
            finished += group.update(part, *tokens)
        return finished

    def check(self) -> None:
        """Assert that sequences, slots and blocks agree. Costs the pools: for tests."""
        for group in self.groups:
            group.check()


class GroupPacker:
    """Packs the groups' schedules one after another, each padded to the same shape."""

    def __init__(self, num_groups: int, buckets: Buckets):
        self.packers = [BatchPacker(buckets) for _ in range(num_groups)]
        self.buckets = buckets

    def pack(self, schedule: GroupSchedule) -> tuple[BatchShape, np.ndarray]:
        """The shape of each group's batch, and the flat int32 arrays of all, joined."""
        parts = schedule.groups
        shape = self.buckets.shape_for(*(part.sizes for part in parts), num_steps=schedule.num_steps)
        return shape, np.concatenate([packer.pack(part, shape)[1] for packer, part in zip(self.packers, parts)])

    def places(self, schedule: GroupSchedule, shape: BatchShape) -> tuple[list[int], list[int], list[int]]:
        """As BatchPacker's, in the output of all groups, one group's after another's."""
        places, rows = ([], [], []), shape.rows
        for number, (packer, part) in enumerate(zip(self.packers, schedule.groups)):
            for all_groups, own, size in zip(places, packer.places(part, shape), (rows, rows, shape.tokens)):
                all_groups += [number * size + place for place in own]
        return places
