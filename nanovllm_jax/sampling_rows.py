"""SamplingParams as numbers: a line for each row of a batch, [R, 12] int32, which the sampling kernels read as it is.

One array, because columns cut out of it were a copy each, as long as a small kernel, in every program. The kernels have
the same names for its columns, and a test compares them.
"""

from struct import Struct
from typing import Any, NamedTuple


class SamplingRows(NamedTuple):
    """The columns. Floats and the unsigned halves of a seed are there as bits."""

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


FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
AS_NUMBERS = Struct("=" + "".join("f" if name in FLOAT_COLUMNS else "i" for name in SamplingRows._fields))
AS_BITS = Struct(f"={len(SamplingRows._fields)}i")
ADJUSTS, NUM_TOP = (SamplingRows._fields.index(name) for name in ("adjusts", "num_top"))


def adjusts_logits(params: Any) -> bool:
    """Whether these SamplingParams change logits before temperature does, by the device's tables."""
    penalties = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    return bool(params.logit_bias or params.min_tokens or penalties)


def sampling_row(seq: Any) -> SamplingRows:
    """The columns for a Sequence, as numbers."""
    p = seq.params
    return SamplingRows(
        seed_low=_signed(seq.seed & 0xFFFFFFFF),
        seed_high=_signed(seq.seed >> 32),
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


def packed(row: SamplingRows) -> list[int]:
    """The line's 12 numbers as they lie in the array."""
    return list(AS_BITS.unpack(AS_NUMBERS.pack(*row)))


def _signed(bits: int) -> int:
    """32 unsigned bits as an int32."""
    return bits - ((bits >> 31) << 32)
