"""Which batch shapes are compiled: few, so that a start is quick, and close enough that padding costs little."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import attrgetter, ge

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead

# A step takes as long as its tokens, and so many more: until weights are read, and the host has come round.
STEP_TOKENS = 256


def geometric(first: int, last: int, ratio: int) -> tuple[int, ...]:
    """first, first * ratio, ... and last itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return (*sizes, last)


def with_halves(sizes: tuple[int, ...], start: float) -> tuple[int, ...]:
    """Ascending sizes, and from `start` on another half way from each to the next."""
    between = ((low + high) // 2 for low, high in pairwise(sizes) if low >= start)
    return tuple(sorted({*sizes, *between}))


@dataclass(frozen=True)
class Buckets:
    """The few batch shapes that are compiled."""

    max_num_seqs: int
    max_num_batched_tokens: int
    table_width: int
    ratio: int
    """How much larger each size is than the one before: what padding can cost, but for many very short prompts."""
    mixed_decode_rows: tuple[int, ...]
    """How many rows may decode beside a prefill: few sizes, as a row that is not there costs little. The last takes any
    number; a first of 0 is for when nothing runs beside it."""
    run_ahead: RunAhead = ONE_STEP
    large_from: float = math.inf
    """Beside so many tokens there are but the first of these and the last, which is little beside them."""
    spared_from: float = math.inf
    """From so many tokens on a shape with a prefill is `spared`."""
    between_from: float = math.inf
    """From so many decode rows on there is another size half way to the next."""
    close_prompts: bool = False
    """Whether there are also sizes half way for prompts, beside no more rows that decode than half of the prompt's
    tokens: for models so large that their padding takes long."""

    @cached_property
    def decode_rows(self) -> tuple[int, ...]:
        """Sizes of steps that only decode: one row has kernels of its own, and two take as long as four."""
        several = geometric(max(4, self.ratio), self.max_num_seqs, self.ratio)
        return several if self.max_num_seqs == 1 else (1, *with_halves(several, self.between_from))

    @cached_property
    def mixed(self) -> list[BatchShape]:
        """Shapes in which something prefills: first those of few tokens, of these for few rows that decode.

        A prompt that just fills a size still fits when half of the rows decode beside it.
        """
        sizes, most = self.mixed_decode_rows, self.max_num_batched_tokens
        shapes = {
            self._mixed(rows, min(rows // 2 + tokens, most))
            for rows in sizes
            for tokens in self._prompts_beside(rows)
            if tokens < self.large_from or rows in (sizes[0], sizes[-1])
        }
        return sorted(shapes, key=attrgetter("tokens", "decode_rows"))

    def _prompts_beside(self, rows: int) -> tuple[int, ...]:
        """Sizes of prompts beside so many rows that decode, in tokens."""
        sizes = geometric(min(128, self.max_num_batched_tokens), self.max_num_batched_tokens, self.ratio)
        return with_halves(sizes, 2 * rows) if self.close_prompts and rows else sizes

    def _mixed(self, rows: int, tokens: int) -> BatchShape:
        """Of so many tokens; the largest takes any number of sequences."""
        prefills = tokens if tokens == self.max_num_batched_tokens else max(8, tokens // 16)
        prefills, spared = min(self.max_num_seqs, prefills), tokens >= self.spared_from
        return BatchShape(min(rows, tokens), prefills, tokens, self.table_width, spared=spared)

    def _decoding(self, rows: int, num_steps: int = 1) -> BatchShape:
        return BatchShape(rows, 0, rows, self.table_width, num_steps)

    def shape_for(self, decodes: int, prefills: int, tokens: int, num_steps: int = 1) -> BatchShape:
        """The smallest shape for so many rows that decode, sequences that prefill, and tokens of both together.

        Smallest is what has the fewest tokens, and of these the fewest rows that may decode.
        """
        if not prefills:
            return self._decoding(next(size for size in self.decode_rows if size >= decodes), num_steps)
        sizes = decodes, prefills, tokens
        return next(s for s in self.mixed if all(map(ge, (s.decode_rows, s.prefill_rows, s.tokens), sizes)))

    def fitting(self, decodes: int, tokens: int) -> int:
        """How many of so many tokens, of which some decode, a step should compute.

        All of them, or only what fills a smaller shape, where in a next step the rest takes less than padding would.
        """
        sizes = [shape.tokens for shape in self.mixed if shape.decode_rows >= decodes]
        size = bisect_left(sizes, tokens)
        filled = sizes[size - 1] if size else 0
        if filled <= decodes:
            return tokens
        rest = sizes[bisect_left(sizes, decodes + tokens - filled)]
        return filled if filled + rest + STEP_TOKENS < sizes[size] else tokens

    def all_shapes(self) -> list[BatchShape]:
        """Every shape that shape_for can return; first what compiles longest on a GPU: few rows, large prefills."""
        decode = [self._decoding(rows) for rows in self.decode_rows]
        mixed = sorted(self.mixed, key=lambda shape: shape.tokens, reverse=True)
        return sorted(decode + self._several_steps(), key=lambda s: s.decode_rows) + mixed

    def _several_steps(self) -> list[BatchShape]:
        steps, most = self.run_ahead.num_steps, self.run_ahead.rows
        if steps == 1:
            return []
        last = next((rows for rows in self.decode_rows if rows >= most), self.max_num_seqs)
        return [self._decoding(rows, steps) for rows in self.decode_rows if rows <= last]


def gpu_buckets(
    max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead, close_prompts: bool = False
) -> Buckets:
    """Those of a GPU, where little padding is worth many programs."""
    mixed = (0, 64, max_num_seqs) if max_num_seqs > 64 else (0, max_num_seqs)
    sizes = max_num_seqs, max_num_batched_tokens, table_width
    large = 8 * max_num_seqs
    return Buckets(*sizes, 2, mixed, run_ahead, large_from=large, between_from=128, close_prompts=close_prompts)


def cpu_buckets(max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead) -> Buckets:
    """Those of a CPU, which is for small models: there few programs to compile are worth more than little padding."""
    return Buckets(max_num_seqs, max_num_batched_tokens, table_width, 16, (max_num_seqs,), run_ahead)
