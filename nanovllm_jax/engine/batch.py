"""What a batch is: one flat int32 array, padded to one of a few shapes, and the parts of it.

One array, because each array that goes to the device costs the host as much as a hundred of its rows.
R rows, one a sequence: first those that decode, right behind them those that prefill. T tokens, W table width.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from nanovllm_jax.sampling_rows import SamplingRows


class BatchView(NamedTuple):
    """The parts of a packed batch: views of a NumPy buffer on the host, slices of a JAX array on the device."""

    num_decodes: Any
    """[1] how many of the rows decode."""
    slots: Any
    """[R] row of each sequence in the device's state; max_num_seqs for padding."""
    context_lens: Any
    """[R] tokens of the sequence in the cache after the (first) step; 0 for padding."""
    sampling: Any
    """[R, 12] how each row samples: SamplingRows."""
    tokens: Any
    """[T] what is computed: a token of each row that decodes, -1 where only the device knows it yet, and right behind
    these the prefill sequences' new ones, one sequence after the other."""
    starts: Any
    """[R + 1] where each row's tokens start, and the end. Rows of padding have none."""
    tables: Any
    """[R, W] block tables."""


class StepSizes(NamedTuple):
    """What a batch is to have room for."""

    decodes: int
    """Rows that decode,"""
    prefills: int
    """rows that prefill,"""
    tokens: int
    """and tokens of both together."""


@dataclass(frozen=True)
class BatchShape:
    """The padded sizes of a batch: one compiled program each."""

    decode_rows: int
    """So many rows at most decode,"""
    prefill_rows: int
    """and so many at most prefill: the larger of the two is how many rows there are."""
    tokens: int
    """Of all rows together; as many as rows, where nothing prefills."""
    table_width: int
    num_steps: int = 1
    """Tokens that each decode row computes, one after the other."""
    spared: bool = False
    """Whether tokens of which no logits are drawn leave nothing but keys and values in the last layer."""

    @property
    def rows(self) -> int:
        """R."""
        return max(self.decode_rows, self.prefill_rows)

    def holds(self, sizes: StepSizes) -> bool:
        """Whether there is room for all of them."""
        decodes, prefills, tokens = sizes
        has_rows = decodes <= self.decode_rows and prefills <= self.prefill_rows and decodes + prefills <= self.rows
        return has_rows and tokens <= self.tokens

    @property
    def size(self) -> int:
        """Length of the flat array."""
        return _layout(self)[-1][1]

    def views(self, buffer: Any) -> BatchView:
        """The fields of a flat array (NumPy or JAX) of this shape."""
        return BatchView(*(buffer[start:end].reshape(shape) for start, end, shape in _layout(self)))


@cache
def _layout(shape: BatchShape) -> list[tuple[int, int, tuple[int, ...]]]:
    """Start, end and shape of each BatchView field in the flat array."""
    rows = shape.rows
    shapes = BatchView(
        num_decodes=(1,),
        slots=(rows,),
        context_lens=(rows,),
        sampling=(rows, len(SamplingRows._fields)),
        tokens=(shape.tokens,),
        starts=(rows + 1,),
        tables=(rows, shape.table_width),
    )
    ends = accumulate(map(math.prod, shapes), initial=0)
    return [(start, end, shape) for (start, end), shape in zip(pairwise(ends), shapes)]
