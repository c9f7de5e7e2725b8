"""Which batch shapes are compiled: few, so that a start is quick, and close enough that padding costs little."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from nanovllm_jax.engine.batch import BatchShape, StepSizes
from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead

# A step takes as long as its tokens, and so many more: until weights are read, and the host has come round.
STEP_TOKENS = 256


@dataclass(frozen=True)
class Buckets:
    """The few batch shapes that are compiled."""

    decode_rows: tuple[int, ...]
    """Ascending sizes of steps that only decode. The last is as many sequences as run."""
    beside_prompts: tuple[tuple[int, int], ...]
    """Sizes of steps with prompts: how many rows there are of which some may decode, or 0 where none do; and tokens of
    all rows together. The last is the most of both that a step can have."""
    table_width: int
    run_ahead: RunAhead = ONE_STEP
    spared_from: float = math.inf
    """From so many tokens on a shape with prompts is `spared`."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at a time."""
        return self.decode_rows[-1]

    @property
    def max_num_batched_tokens(self) -> int:
        """The most that a step with prompts computes."""
        return self.beside_prompts[-1][1]

    @cached_property
    def mixed(self) -> list[BatchShape]:
        """Shapes in which something prefills: first those of few tokens, of these for few rows that decode."""
        shapes = {self._mixed(*sizes) for sizes in self.beside_prompts}
        return sorted(shapes, key=attrgetter("tokens", "decode_rows"))

    def _mixed(self, rows: int, tokens: int) -> BatchShape:
        """Of so many tokens; in the largest any number of sequences may prefill."""
        prefills = tokens if tokens == self.max_num_batched_tokens else max(8, tokens // 16)
        prefills, spared = min(rows or self.max_num_seqs, prefills), tokens >= self.spared_from
        return BatchShape(min(rows, tokens), prefills, tokens, self.table_width, spared=spared)

    def _decoding(self, rows: int, num_steps: int = 1) -> BatchShape:
        return BatchShape(rows, 0, rows, self.table_width, num_steps)

    def shape_for(self, *steps: StepSizes, num_steps: int = 1) -> BatchShape:
        """The smallest shape that holds a step, or each of those of several data groups.

        Smallest is what has the fewest tokens, and of these the fewest rows that may decode.
        """
        if any(step.prefills for step in steps):
            return next(shape for shape in self.mixed if all(map(shape.holds, steps)))
        decodes = max(step.decodes for step in steps)
        return self._decoding(next(rows for rows in self.decode_rows if rows >= decodes), num_steps)

    def fitting(self, decodes: int, tokens: int) -> int:
        """How many of so many tokens, of which some decode, a step should compute.

        All of them, or only what fills a smaller shape, where in a next step the rest takes less than padding would.
        """
        least = StepSizes(decodes, 1, decodes + 1)
        sizes = [shape.tokens for shape in self.mixed if shape.holds(least)]
        size = bisect_left(sizes, tokens)
        filled = sizes[size - 1] if size else 0
        if filled <= decodes:
            return tokens
        rest = sizes[bisect_left(sizes, decodes + tokens - filled)]
        return filled if filled + rest + STEP_TOKENS < sizes[size] else tokens

    def all_shapes(self) -> list[BatchShape]:
        """Every shape that shape_for can return; first what compiles longest on a GPU: few rows, large prefills."""
        decode = [self._decoding(rows) for rows in self.decode_rows]
        return sorted(decode + self._several_steps(), key=attrgetter("decode_rows")) + self.mixed[::-1]

    def _several_steps(self) -> list[BatchShape]:
        steps, most = self.run_ahead.num_steps, self.run_ahead.rows
        if steps == 1:
            return []
        last = next((rows for rows in self.decode_rows if rows >= most), self.max_num_seqs)
        return [self._decoding(rows, steps) for rows in self.decode_rows if rows <= last]


def gpu_buckets(max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead) -> Buckets:
    """Those of a GPU, where little padding is worth many programs.

    One row that decodes has kernels of its own, and two take as long as four. Steps with prompts have up to 64 rows, or
    any number: a row that is not there costs little. These two take turns, so that from one power of two to the next
    there are four sizes of tokens. And where a prompt is alone, or prompts fill a step, nothing decodes beside them.
    """
    seqs, most = max_num_seqs, max_num_batched_tokens
    several = *doubling((1,), 4, min(64, 3 * seqs // 4)), *doubling((2, 3), 128, 3 * seqs // 4)
    beside_few = [(min(64, seqs), tokens) for tokens in doubling((2, 3), 128, min(2 * seqs, 3 * most // 4))]
    beside_none = [(0, tokens) for tokens in (*doubling((1,), 128, min(2 * seqs, 3 * most // 4)), most)]
    beside_any = [(seqs, tokens) for tokens in doubling((5, 7), max(128, 3 * seqs // 4), 3 * most // 4)]
    beside = *beside_none, *beside_few, *beside_any, (seqs, most)
    return Buckets(tuple(sorted({1, *several, seqs})), beside, table_width, run_ahead)


def cpu_buckets(max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead) -> Buckets:
    """Those of a CPU, which is for small models: there few programs to compile are worth more than little padding."""
    seqs, most = max_num_seqs, max_num_batched_tokens
    rows = tuple(sorted({1, *geometric(16, seqs, 16)}))
    # A prompt that just fills a size still fits when half of the rows decode beside it.
    beside = tuple((seqs, min(seqs // 2 + tokens, most)) for tokens in geometric(128, most, 16))
    return Buckets(rows, beside, table_width, run_ahead)


def doubling(parts: tuple[int, ...], low: float, high: float) -> tuple[int, ...]:
    """Ascending: each of these numbers times each power of two, where that is neither below nor above."""
    sizes = (part << power for part in parts for power in range(32))
    return tuple(sorted(size for size in sizes if low <= size <= high))


def geometric(first: int, last: int, ratio: int) -> tuple[int, ...]:
    """first, first * ratio, ... and last itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return (*sizes, last)
