"""Pallas kernel: one array cut into many. XLA would make a kernel for each of them, where another kernel reads it."""

from itertools import accumulate

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import pallas_call

TOGETHER = 16  # pieces to a program, which it has all read before it writes


def _split_kernel(whole_ref, *piece_refs):
    sizes = [ref.shape[0] for ref in piece_refs]
    starts = accumulate(sizes, initial=0)
    lanes = {size: jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32) for size in sizes}
    masks = {size: lane < size if lane.size > size else None for size, lane in lanes.items()}

    def copy(pieces):
        values = [plgpu.load(whole_ref.at[start + lanes[size]], mask=masks[size]) for _, size, start in pieces]
        for value, (ref, size, _) in zip(values, pieces):
            plgpu.store(ref.at[lanes[size]], value, mask=masks[size])

    pieces = list(zip(piece_refs, sizes, starts))
    for number in range(pl.cdiv(len(pieces), TOGETHER)):
        own = pieces[number * TOGETHER : (number + 1) * TOGETHER]
        pl.when(pl.program_id(0) == number)(lambda own=own: copy(own))


def split(x: jax.Array, sizes: tuple[int, ...], *, interpret: bool = False) -> list[jax.Array]:
    """nanovllm_jax.kernels.split as one kernel."""
    pieces = pallas_call(
        _split_kernel,
        x,
        grid=(pl.cdiv(len(sizes), TOGETHER),),
        out_shape=[jax.ShapeDtypeStruct((size,), x.dtype) for size in sizes],
        num_warps=min(16, max(1, pl.next_power_of_2(max(sizes)) // 256)),
        interpret=interpret,
    )
    return list(pieces)
