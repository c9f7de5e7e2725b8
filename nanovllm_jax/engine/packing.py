"""A schedule packed into a batch's flat array."""

from collections.abc import Iterable
from itertools import accumulate

import numpy as np

from nanovllm_jax.engine.batch import BatchShape, BatchView
from nanovllm_jax.engine.buckets import Buckets
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_rows import ADJUSTS, NUM_TOP, SamplingRows, packed, sampling_row


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
        decodes, prefills, steps = schedule.decodes, schedule.prefills, schedule.num_steps
        shape = shape or self.buckets.shape_for(schedule.sizes, num_steps=steps)
        buffer = np.zeros(shape.size, np.int32)
        view = shape.views(buffer)
        view.slots[:] = self.buckets.max_num_seqs
        view.sampling[:, NUM_TOP] = -1
        self._pack_rows(view, [*decodes, *(chunk.seq for chunk in prefills)])
        view.num_decodes[:] = end = len(decodes)
        view.context_lens[:end] -= steps - 1  # of the first step
        view.tokens[:end] = [seq.token_ids[-1] if seq.num_pending == steps else -1 for seq in decodes]
        view.starts[: end + 1] = np.arange(end + 1)
        for row, chunk in enumerate(prefills, end):
            last = chunk.seq.num_computed
            start, end = end, end + chunk.num_tokens
            view.tokens[start:end] = chunk.seq.token_ids[last - chunk.num_tokens : last]
            view.starts[row + 1] = end
            if not chunk.samples:  # what it draws is of no meaning, and must not count as drawn
                view.sampling[row, [ADJUSTS, NUM_TOP]] = 0, -1
        view.starts[len(decodes) + len(prefills) :] = end
        return shape, buffer

    def places(self, schedule: Schedule, shape: BatchShape) -> tuple[Iterable[int], Iterable[int], Iterable[int]]:
        """In the output: rows of the decodes, rows of the prefills, and where in the T tokens each prefill begins."""
        decodes, prefills, _ = schedule.sizes
        ends = accumulate((chunk.num_tokens for chunk in schedule.prefills), initial=decodes)
        return range(decodes), range(decodes, decodes + prefills), list(ends)[:-1]

    def _admit(self, seq: Sequence) -> None:
        slot, table = seq.slot, seq.block_table
        self.tables[slot, : len(table)] = table
        self.table_lens[slot] = len(table)
        self.sampling[slot] = packed(sampling_row(seq))

    def _pack_rows(self, view: BatchView, seqs: list[Sequence]) -> None:
        lens = self.table_lens
        for seq in seqs:
            if len(seq.block_table) != lens[seq.slot]:
                known = lens[seq.slot]
                lens[seq.slot] = len(seq.block_table)
                self.tables[seq.slot, known : lens[seq.slot]] = seq.block_table[known:]
        slots = np.array([seq.slot for seq in seqs], np.int32)
        rows = slice(len(seqs))
        view.slots[rows] = slots
        view.context_lens[rows] = [seq.num_computed for seq in seqs]
        view.sampling[rows] = self.sampling[slots]
        view.tables[rows] = self.tables[slots]
