"""A schedule packed into one flat int32 array, padded to one of a few shapes.

One array, because each array that goes to the device costs the host as much as a hundred of its rows.
B decode rows, P prefill sequences, R = B + P, T prefill tokens, W table width.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead, Schedule
from nanovllm_jax.engine.sequence import Sequence


class SamplingRows(NamedTuple):
    """How each row samples: columns of BatchView.sampling. Floats and unsigned halves of a seed are there as bits."""

    seed_low: Any
    seed_high: Any
    temperature: Any
    """float32"""
    top_k: Any
    """0: off"""
    top_p: Any
    """float32"""
    min_p: Any
    """float32"""
    repetition: Any
    """float32, as the next two: penalties"""
    frequency: Any
    presence: Any
    min_len: Any
    """Tokens that the sequence has at least before one may end it."""
    adjusts: Any
    """1 where the row has a bias, a penalty or a least length: its line of the device's tables counts."""
    num_top: Any
    """Most likely tokens to name; -1 where no log probabilities are wanted."""


FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
ADJUSTS, NUM_TOP = (SamplingRows._fields.index(name) for name in ("adjusts", "num_top"))


def adjusts_logits(params: Any) -> bool:
    """Whether these SamplingParams change logits before temperature does, by the device's tables."""
    penalties = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    return bool(params.logit_bias or params.min_tokens or penalties)


def sampling_row(seq: Sequence) -> SamplingRows:
    """The columns for a sequence, as numbers."""
    p = seq.params
    return SamplingRows(
        seed_low=_signed(p.seed & 0xFFFFFFFF),
        seed_high=_signed(p.seed >> 32),
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        repetition=p.repetition_penalty,
        frequency=p.frequency_penalty,
        presence=p.presence_penalty,
        min_len=seq.min_len if p.min_tokens else 0,
        adjusts=int(adjusts_logits(p)),
        num_top=-1 if p.logprobs is None else p.logprobs,
    )


class BatchView(NamedTuple):
    """The parts of a packed batch: views of a NumPy buffer on the host, slices of a JAX array on the device."""

    slots: Any
    """[R] row of each sequence in the device's state; max_num_seqs for padding."""
    context_lens: Any
    """[R] tokens of the sequence in the cache after the (first) step; 0 for padding."""
    sampling: Any
    """[R, 12] how each row samples: SamplingRows."""
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
            sampling=(rows, len(SamplingRows._fields)),
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
    run_ahead: RunAhead = ONE_STEP
    alone_from: float = math.inf
    """From so many prefill tokens on there is a shape without a decode part too, for when nothing runs beside them,"""
    large_from: float = math.inf
    """and from so many on the decode part else is the largest, which then is little beside them."""

    @cached_property
    def decode_rows(self) -> tuple[int, ...]:
        """Sizes of steps that only decode."""
        return geometric(1, self.max_num_seqs, self.ratio)

    @cached_property
    def prefill_tokens(self) -> tuple[int, ...]:
        """Sizes of the prefill part."""
        return geometric(min(128, self.max_num_batched_tokens), self.max_num_batched_tokens, self.ratio)

    def prefill_rows(self, tokens: int) -> int:
        """How many sequences fit in a prefill part of this many tokens: the largest takes any number."""
        rows = tokens if tokens == self.prefill_tokens[-1] else max(8, tokens // 16)
        return min(self.max_num_seqs, rows)

    def beside(self, tokens: int) -> tuple[int, ...]:
        """Sizes of the decode part beside a prefill part of this many tokens."""
        rows = self.mixed_decode_rows[-1:] if tokens >= self.large_from else self.mixed_decode_rows
        return (0, *rows) if tokens >= self.alone_from else rows

    def shape_for(self, decodes: int, prefills: int, tokens: int, num_steps: int = 1) -> BatchShape:
        """The smallest shape for this many decode rows, and prefill sequences with this many tokens together."""
        if not prefills:
            rows = next(size for size in self.decode_rows if size >= decodes)
            return BatchShape(rows, 0, 0, self.table_width, num_steps)
        padded = next(t for t in self.prefill_tokens if t >= tokens and self.prefill_rows(t) >= prefills)
        rows = next(size for size in self.beside(padded) if size >= decodes)
        return BatchShape(rows, self.prefill_rows(padded), padded, self.table_width)

    def all_shapes(self) -> list[BatchShape]:
        """Every shape that shape_for can return; first what compiles longest on a GPU: few rows, large prefills."""
        decode = [BatchShape(rows, 0, 0, self.table_width) for rows in self.decode_rows]
        mixed = [
            BatchShape(rows, self.prefill_rows(tokens), tokens, self.table_width)
            for tokens in self.prefill_tokens
            for rows in self.beside(tokens)
        ]
        most = next((rows for rows in self.decode_rows if rows >= self.run_ahead.rows), self.max_num_seqs)
        several = [
            BatchShape(rows, 0, 0, self.table_width, self.run_ahead.num_steps)
            for rows in self.decode_rows
            if rows <= most and self.run_ahead.num_steps > 1
        ]
        return sorted(decode + several, key=lambda s: s.decode_rows) + mixed[::-1]


def gpu_buckets(
    max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead, is_large_model: bool
) -> Buckets:
    """Those of a GPU, where little padding is worth many programs: a large model has more, as it feels each row."""
    few = min(32, max_num_seqs)
    mixed = (few,) if few == max_num_seqs else (few, max_num_seqs)
    large_from = 16 * max_num_seqs if len(mixed) > 1 else math.inf
    alone_from = 0 if is_large_model else large_from  # a tenth of a short prompt's time; a small one is to start soon
    sizes = max_num_seqs, max_num_batched_tokens, table_width
    return Buckets(*sizes, 2, mixed, run_ahead, alone_from=alone_from, large_from=large_from)


def cpu_buckets(max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead) -> Buckets:
    """Those of a CPU, which is for small models: there few programs to compile are worth more than little padding."""
    return Buckets(max_num_seqs, max_num_batched_tokens, table_width, 16, (max_num_seqs,), run_ahead)


def _signed(bits: int) -> int:
    """32 unsigned bits as an int32."""
    return bits - ((bits >> 31) << 32)


def _bits(value: float) -> int:
    """A float32's bits as an int32."""
    return int(np.float32(value).view(np.int32))


class BatchPacker:
    """Packs schedules. It mirrors what is constant while a sequence runs, by slot, so that a step copies little."""

    def __init__(self, buckets: Buckets):
        self.buckets = buckets
        seqs = buckets.max_num_seqs
        self.tables = np.zeros((seqs, buckets.table_width), np.int32)
        self.table_lens = [0] * seqs
        self.sampling = np.zeros((seqs, len(SamplingRows._fields)), np.int32)

    def pack(self, schedule: Schedule, shape: BatchShape | None = None) -> tuple[BatchShape, np.ndarray]:
        """The batch's shape (the smallest, where none is given) and its flat int32 array, right after schedule()."""
        for seq in schedule.admitted:
            self._admit(seq)
        decodes, prefills = schedule.decodes, schedule.prefills
        tokens, steps = sum(chunk.num_tokens for chunk in prefills), schedule.num_steps
        shape = shape or self.buckets.shape_for(len(decodes), len(prefills), tokens, steps)
        buffer = np.zeros(shape.size, np.int32)
        view = shape.views(buffer)
        view.slots[:] = self.buckets.max_num_seqs
        view.sampling[:, NUM_TOP] = -1
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
                if not chunk.samples:  # what it draws is of no meaning, and must not count as drawn
                    view.sampling[shape.decode_rows + i, [ADJUSTS, NUM_TOP]] = 0, -1
            view.query_starts[len(prefills) + 1 :] = end
        return shape, buffer

    def rows(self, schedule: Schedule, shape: BatchShape) -> tuple[range, range]:
        """In which rows of the step's output the schedule's decodes are, and its prefills."""
        first = shape.decode_rows
        return range(len(schedule.decodes)), range(first, first + len(schedule.prefills))

    def _admit(self, seq: Sequence) -> None:
        slot, table = seq.slot, seq.block_table
        self.tables[slot, : len(table)] = table
        self.table_lens[slot] = len(table)
        row = sampling_row(seq)
        self.sampling[slot] = [_bits(value) if name in FLOATS else value for name, value in zip(row._fields, row)]

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
        view.sampling[rows] = self.sampling[slots]
        view.tables[rows] = self.tables[slots]
