"""A schedule packed into one flat int32 array, padded to one of a few shapes.

One array, because each array that goes to the device costs the host as much as a hundred of its rows.
B decode rows, P prefill sequences, R = B + P, T prefill tokens, W table width.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nanovllm_jax.engine.scheduler import Schedule
from nanovllm_jax.engine.sequence import Sequence


class BatchView(NamedTuple):
    """The parts of a packed batch: views of a NumPy buffer on the host, slices of a JAX array on the device."""

    slots: Any
    """[R] row of each sequence in the device's state; max_num_seqs for padding."""
    context_lens: Any
    """[R] tokens of the sequence in the cache after the (first) step; 0 for padding."""
    temperatures: Any
    """[R] the bits of a float32."""
    seeds: Any
    """[R, 2] the bits of two uint32."""
    decode_tokens: Any
    """[B] the token to compute; -1 where only the device knows it yet."""
    prefill_tokens: Any
    """[T] the prefill sequences' new tokens, one sequence after the other."""
    query_starts: Any
    """[P + 1] where each prefill sequence's tokens start; padding repeats the end."""
    tables: Any
    """[R, W] block tables."""


@dataclass(frozen=True)
class BatchShape:
    """The padded sizes of a batch: one compiled program each."""

    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    table_width: int
    num_steps: int = 1
    """Tokens that each decode row computes, one after the other."""

    @cached_property
    def layout(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Start, end and shape of each BatchView field in the flat array."""
        rows = self.decode_rows + self.prefill_rows
        shapes = BatchView(
            slots=(rows,),
            context_lens=(rows,),
            temperatures=(rows,),
            seeds=(rows, 2),
            decode_tokens=(self.decode_rows,),
            prefill_tokens=(self.prefill_tokens,),
            query_starts=(self.prefill_rows + 1,),
            tables=(rows, self.table_width),
        )
        ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
        return list(zip([0, *ends], ends, shapes))

    @property
    def size(self) -> int:
        """Length of the flat array."""
        return self.layout[-1][1]

    def views(self, buffer: Any) -> BatchView:
        """The fields of a flat array (NumPy or JAX) of this shape."""
        return BatchView(*(buffer[start:end].reshape(shape) for start, end, shape in self.layout))


def geometric(first: int, last: int, ratio: int) -> tuple[int, ...]:
    """first, first * ratio, ... and last itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return (*sizes, last)


@dataclass(frozen=True)
class Buckets:
    """The few batch shapes that are compiled."""

    max_num_seqs: int
    max_num_batched_tokens: int
    table_width: int
    ratio: int
    """How much larger each size is than the one before: the most that padding can cost."""
    mixed_decode_rows: tuple[int, ...]
    """Sizes of the decode part beside a prefill: few, as a padded row costs little there. The last takes any number."""
    num_steps: int = 1
    """Tokens that a step computes for each of at most `multi_step_rows` sequences, when it only decodes."""
    multi_step_rows: int = 0

    @cached_property
    def decode_rows(self) -> tuple[int, ...]:
        """Sizes of steps that only decode."""
        return geometric(1, self.max_num_seqs, self.ratio)

    @cached_property
    def prefill_tokens(self) -> tuple[int, ...]:
        """Sizes of the prefill part."""
        return geometric(min(64, self.max_num_batched_tokens), self.max_num_batched_tokens, self.ratio)

    def prefill_rows(self, tokens: int) -> int:
        """How many sequences fit in a prefill part of this many tokens: the largest takes any number."""
        rows = tokens if tokens == self.prefill_tokens[-1] else max(8, tokens // 16)
        return min(self.max_num_seqs, rows)

    def shape_for(self, decodes: int, prefills: int, tokens: int, num_steps: int = 1) -> BatchShape:
        """The smallest shape for this many decode rows, and prefill sequences with this many tokens together."""
        if not prefills:
            rows = next(size for size in self.decode_rows if size >= decodes)
            return BatchShape(rows, 0, 0, self.table_width, num_steps)
        rows = next(size for size in self.mixed_decode_rows if size >= decodes)
        padded = next(t for t in self.prefill_tokens if t >= tokens and self.prefill_rows(t) >= prefills)
        return BatchShape(rows, self.prefill_rows(padded), padded, self.table_width)

    def all_shapes(self) -> list[BatchShape]:
        """Every shape that shape_for can return, the largest first."""
        decode = [BatchShape(rows, 0, 0, self.table_width) for rows in self.decode_rows]
        mixed = [
            BatchShape(rows, self.prefill_rows(tokens), tokens, self.table_width)
            for tokens in self.prefill_tokens
            for rows in self.mixed_decode_rows
        ]
        several = [
            BatchShape(rows, 0, 0, self.table_width, self.num_steps)
            for rows in self.decode_rows
            if rows <= self.multi_step_rows and self.num_steps > 1
        ]
        return sorted(decode + mixed + several, key=lambda s: (s.prefill_tokens, s.decode_rows), reverse=True)


class BatchPacker:
    """Packs schedules. It mirrors what is constant while a sequence runs, by slot, so that a step copies little."""

    def __init__(self, buckets: Buckets):
        self.buckets = buckets
        seqs = buckets.max_num_seqs
        self.tables = np.zeros((seqs, buckets.table_width), np.int32)
        self.table_lens = [0] * seqs
        self.temperatures = np.zeros(seqs, np.float32)
        self.seeds = np.zeros(seqs, np.uint64)

    def pack(self, schedule: Schedule) -> tuple[BatchShape, np.ndarray]:
        """The batch's shape and its flat int32 array, to be called right after schedule()."""
        for seq in schedule.admitted:
            self._admit(seq)
        decodes, prefills = schedule.decodes, schedule.prefills
        tokens, steps = sum(chunk.num_tokens for chunk in prefills), schedule.num_steps
        shape = self.buckets.shape_for(len(decodes), len(prefills), tokens, steps)
        buffer = np.zeros(shape.size, np.int32)
        view = shape.views(buffer)
        view.slots[:] = self.buckets.max_num_seqs
        self._pack_rows(view, 0, decodes)
        view.context_lens[: len(decodes)] -= steps - 1  # of the first step
        view.decode_tokens[: len(decodes)] = [seq.token_ids[-1] if seq.num_pending == steps else -1 for seq in decodes]
        if prefills:
            self._pack_rows(view, shape.decode_rows, [chunk.seq for chunk in prefills])
            end = 0
            for i, chunk in enumerate(prefills):
                last = chunk.seq.num_computed
                start, end = end, end + chunk.num_tokens
                view.prefill_tokens[start:end] = chunk.seq.token_ids[last - chunk.num_tokens : last]
                view.query_starts[i + 1] = end
            view.query_starts[len(prefills) + 1 :] = end
        return shape, buffer

    def _admit(self, seq: Sequence) -> None:
        slot, table = seq.slot, seq.block_table
        self.tables[slot, : len(table)] = table
        self.table_lens[slot] = len(table)
        self.temperatures[slot] = seq.params.temperature
        self.seeds[slot] = seq.params.seed

    def _pack_rows(self, view: BatchView, first: int, seqs: list[Sequence]) -> None:
        if not seqs:
            return
        lens = self.table_lens
        for seq in seqs:
            if len(seq.block_table) != lens[seq.slot]:
                known = lens[seq.slot]
                lens[seq.slot] = len(seq.block_table)
                self.tables[seq.slot, known : lens[seq.slot]] = seq.block_table[known:]
        slots = np.array([seq.slot for seq in seqs], np.int32)
        rows = slice(first, first + len(seqs))
        view.slots[rows] = slots
        view.context_lens[rows] = [seq.num_computed for seq in seqs]
        view.temperatures[rows] = self.temperatures.view(np.int32)[slots]
        view.seeds[rows] = self.seeds.view(np.int32).reshape(-1, 2)[slots]
        view.tables[rows] = self.tables[slots]
