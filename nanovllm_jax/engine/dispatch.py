"""A step between its dispatch and its reading: where in the device's output each sequence finds what is its own."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nanovllm_jax.engine.activations import CapturedRows, captured_rows
from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.data_groups import GroupPacker
from nanovllm_jax.engine.logprobs import entries_of
from nanovllm_jax.engine.model_runner import ModelRunner
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.engine.sequence import Scored, Sequence
from nanovllm_jax.models.step import StepOutput


@dataclass(slots=True)
class DispatchedStep:
    """A step that the device runs or has run, and whose results were not read yet."""

    schedule: Schedule
    shape: BatchShape
    dispatched_at: float
    """By time.perf_counter."""
    rows: tuple[Iterable[int], Iterable[int]]
    """Where in the output the schedule's decodes and prefills are."""
    output: StepOutput
    """Without what nobody will read."""
    wanting: dict[int, Sequence]
    """The sequences that ask for log probabilities, by their rows in the output."""
    scored: list[tuple[Scored, int, list[int]]]
    """What its chunks give of that: the position of the first token, and the tokens."""
    scores: Any
    """The log probabilities of these."""
    captured: list[CapturedRows]

    def read(self, runner: ModelRunner) -> Iterator[tuple[list[int], list[int]]]:
        """Wait for the device; the tokens that decodes and prefills drew, for each of a program's steps.

        Before that, its sequences have their log probabilities and activations. `schedule` is to be updated by each.
        """
        if self.scored:
            self._read_scores(runner)
        decode_rows, prefill_rows = self.rows
        logprobs = runner.collect_logprobs(self.output, list(self.wanting)) if self.wanting else None
        activations = runner.collect_activations(self.output) if self.captured else {}
        for number, tokens in enumerate(runner.collect(self.output)):
            for seq, entry in zip(self.wanting.values(), entries_of(logprobs[number]) if self.wanting else ()):
                if not seq.is_finished:
                    seq.logprobs.append(entry)
            for part in self.captured:
                if not part.seq.is_finished:
                    part.activations.take(part, number, activations)
            yield [tokens[row] for row in decode_rows], [tokens[row] for row in prefill_rows]

    def _read_scores(self, runner: ModelRunner) -> None:
        entries = iter(entries_of(runner.collect_prompt_logprobs(self.scores)))
        for scored, start, part in self.scored:
            own = list(islice(entries, len(part)))
            scored.logprobs += own[scored.next - start :]  # some came twice, if it was preempted meanwhile


def dispatch(schedule: Schedule, packer: BatchPacker | GroupPacker, runner: ModelRunner) -> DispatchedStep:
    """Start a step on the device, right after schedule(); does not wait."""
    shape, buffer = packer.pack(schedule)
    output = runner.dispatch(shape, buffer)
    dispatched_at = time.perf_counter()
    *rows, starts = packer.places(schedule, shape)
    wanting = _wanting_logprobs(schedule, *rows)
    scored, wanted = scored_tokens(schedule, starts)
    scores = runner.prompt_logprobs(output, shape, buffer, wanted) if wanted else []
    captured = captured_rows(schedule, *rows, starts) if runner.config.probe else []
    # Memory that is free before the next step leaves that one's temporaries where they were last time: a CUDA graph is
    # updated for any that has moved, which takes longer than all else of a dispatch.
    output = output._replace(
        hidden=None,
        logprobs=output.logprobs if wanting else None,
        activations=output.activations if captured else {},
    )
    return DispatchedStep(schedule, shape, dispatched_at, rows, output, wanting, scored, scores, captured)


def _wanting_logprobs(
    schedule: Schedule, decode_rows: Iterable[int], prefill_rows: Iterable[int]
) -> dict[int, Sequence]:
    """Those of the sequences that a step draws for, by their rows in its output."""
    drawing = [*zip(decode_rows, schedule.decodes)]
    drawing += [(row, chunk.seq) for row, chunk in zip(prefill_rows, schedule.prefills) if chunk.samples]
    return {row: seq for row, seq in drawing if seq.params.logprobs is not None}


def scored_tokens(
    schedule: Schedule, starts: Iterable[int]
) -> tuple[list[tuple[Scored, int, list[int]]], list[tuple[int, int, int]]]:
    """What a step's chunks, which begin at these of its tokens, give of `Sequence.scored`: by sequence, and as rows."""
    parts, wanted = [], []
    for row, chunk in zip(starts, schedule.prefills):
        seq, scored = chunk.seq, chunk.seq.scored
        if scored is not None:
            # The chunk's token at position p predicts the one at p + 1.
            predicted = seq.num_computed - chunk.num_tokens + 1
            start, stop = max(predicted, scored.next), seq.num_computed + 1
            tokens = scored.token_ids[start - scored.first : max(start, stop) - scored.first]
            if tokens:
                parts.append((scored, start, tokens))
            wanted += [(row + start - predicted + i, token, scored.num_top) for i, token in enumerate(tokens)]
    return parts, wanted
