"""What a probe takes out of the steps, put together by sequence. Row and position are as in engine.batch."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.sequence import Sequence


class CapturedRows(NamedTuple):
    """Where a capturing sequence is in a step."""

    seq: Sequence
    activations: "Activations"
    """Of the sequence, when the step was dispatched: it may have begun with new ones since."""
    first_row: int
    """Of its tokens, among the step's T."""
    num_rows: int
    position: int
    """Of the first of them (in the first of several steps)."""
    logits_row: int | None
    """Among the step's R rows; None where the chunk does not sample."""


def captured_rows(
    schedule: Schedule, decodes: Iterable[int], prefills: Iterable[int], starts: Iterable[int]
) -> list[CapturedRows]:
    """The sequences of a step that capture, by a packer's `places`; to be called right after schedule()."""
    captured, steps = [], schedule.num_steps
    for row, seq in zip(decodes, schedule.decodes):
        if seq.params.capture:
            captured.append(CapturedRows(seq, seq.activations, row, 1, seq.num_computed - steps, row))
    for row, start, chunk in zip(prefills, starts, schedule.prefills):
        seq, count = chunk.seq, chunk.num_tokens
        if seq.params.capture:
            logits_row = row if chunk.samples else None
            captured.append(CapturedRows(seq, seq.activations, start, count, seq.num_computed - count, logits_row))
    return captured


class Activations:
    """A sequence's activations, position by position."""

    def __init__(self):
        self.num_positions = 0
        self.parts: dict[str, list[np.ndarray]] = defaultdict(list)

    def take(self, rows: CapturedRows, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Take in one of a program's steps; `arrays` [steps, rows, ...] by place."""
        position = rows.position + step
        new = max(0, position + rows.num_rows - self.num_positions)  # the rest was there before a preemption
        end = rows.first_row + rows.num_rows
        for place, array in arrays.items():
            if place != "logits":
                self.parts[place].append(array[step, end - new : end].copy())
            elif rows.logits_row is not None:
                self.parts[place].append(array[step, [rows.logits_row]])
        self.num_positions += new

    def whole(self) -> dict[str, Any]:
        """One array a place."""
        return {place: np.concatenate(parts) for place, parts in self.parts.items()}
