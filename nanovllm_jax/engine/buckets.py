"""Which batch shapes are compiled: few, so that a start is quick, and close enough that padding costs little."""

import math
from dataclasses import dataclass
from functools import cached_property

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead


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
    """How much larger each size is than the one before: what padding can cost, but for many very short prompts."""
    mixed_decode_rows: tuple[int, ...]
    """Sizes of the decode part beside a prefill: few, as a padded row costs little there. The last takes any number; a
    first of 0 is for when nothing runs beside it."""
    run_ahead: RunAhead = ONE_STEP
    large_from: float = math.inf
    """From so many prefill tokens on there are but the first of these and the last, which is little beside them."""
    spared_from: float = math.inf
    """From so many prefill tokens on a shape is `spared`."""

    @cached_property
    def decode_rows(self) -> tuple[int, ...]:
        """Sizes of steps that only decode: one row has kernels of its own, and two take as long as four."""
        several = geometric(max(4, self.ratio), self.max_num_seqs, self.ratio)
        return several if self.max_num_seqs == 1 else (1, *several)

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
        rows = self.mixed_decode_rows
        return rows if tokens < self.large_from else (rows[0], rows[-1])

    def shape_for(self, decodes: int, prefills: int, tokens: int, num_steps: int = 1) -> BatchShape:
        """The smallest shape for this many decode rows, and prefill sequences with this many tokens together."""
        if not prefills:
            rows = next(size for size in self.decode_rows if size >= decodes)
            return BatchShape(rows, 0, 0, self.table_width, num_steps)
        padded = next(t for t in self.prefill_tokens if t >= tokens and self.prefill_rows(t) >= prefills)
        rows = next(size for size in self.beside(padded) if size >= decodes)
        return self._mixed(rows, padded)

    def all_shapes(self) -> list[BatchShape]:
        """Every shape that shape_for can return; first what compiles longest on a GPU: few rows, large prefills."""
        decode = [BatchShape(rows, 0, 0, self.table_width) for rows in self.decode_rows]
        mixed = [self._mixed(rows, tokens) for tokens in self.prefill_tokens for rows in self.beside(tokens)]
        return sorted(decode + self._several_steps(), key=lambda s: s.decode_rows) + mixed[::-1]

    def _several_steps(self) -> list[BatchShape]:
        steps, most = self.run_ahead.num_steps, self.run_ahead.rows
        if steps == 1:
            return []
        last = next((rows for rows in self.decode_rows if rows >= most), self.max_num_seqs)
        return [BatchShape(rows, 0, 0, self.table_width, steps) for rows in self.decode_rows if rows <= last]

    def _mixed(self, rows: int, tokens: int) -> BatchShape:
        prefill_rows, spared = self.prefill_rows(tokens), tokens >= self.spared_from
        return BatchShape(rows, prefill_rows, tokens, self.table_width, spared=spared)


def gpu_buckets(max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead) -> Buckets:
    """Those of a GPU, where little padding is worth many programs."""
    mixed = (0, 32, max_num_seqs) if max_num_seqs > 32 else (0, max_num_seqs)
    sizes = max_num_seqs, max_num_batched_tokens, table_width
    return Buckets(*sizes, 2, mixed, run_ahead, large_from=16 * max_num_seqs)


def cpu_buckets(max_num_seqs: int, max_num_batched_tokens: int, table_width: int, run_ahead: RunAhead) -> Buckets:
    """Those of a CPU, which is for small models: there few programs to compile are worth more than little padding."""
    return Buckets(max_num_seqs, max_num_batched_tokens, table_width, 16, (max_num_seqs,), run_ahead)
