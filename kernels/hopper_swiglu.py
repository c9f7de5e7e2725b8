"""Mosaic GPU kernel: a gated linear layer of many rows on Hopper's tensor cores, with SwiGLU before anything is stored.

A tile is 256 rows and 128 features of each of the two products. It is for a pair of programs: each has half of the
rows, 64 to each of two warpgroups, and half of the weights' loads, which both get. A third warpgroup loads ahead of
time, for the next tile too. Each pair goes through its share of the tiles without a stop between them.
Shapes: T rows, D depth, F features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .common import SMS, gated, rounded
from .hopper import COMPUTE, MANY, ROWS, SWIZZLED, hopper_call, in_roles, program, slot_of, warpgroup

HALF = COMPUTE * ROWS  # rows of a tile, which are one program's
FEATURES = 128
DEPTH = 64  # that is loaded at a time
STAGES = 4  # and how many of these loads there is room for
PAIR = 2  # programs that share loads
ROWS_TOGETHER = 8  # tiles of rows that pairs side by side have, so that they find rows and weights in the L2 cache


def fits(x: jax.Array, weight: jax.Array) -> bool:
    """Whether the kernel is for x [T, D] and weights [2, F, D]: many rows of 16 bits, weights in whole tiles."""
    if x.ndim != 2 or x.dtype.itemsize != 2 or weight.dtype != x.dtype:
        return False
    return x.shape[0] >= MANY and x.shape[0] % 8 == 0 and x.shape[1] % DEPTH == 0 and weight.shape[1] % FEATURES == 0


class Memory(NamedTuple):
    """Shared memory: loads of rows and of both weights, what goes out, and what warpgroups wait for."""

    x: jax.Array
    weights: jax.Array
    out: jax.Array
    full: jax.Array
    free: jax.Array

    @classmethod
    def types(cls, dtype: jnp.dtype) -> "Memory":
        """What to allocate: 224 KiB."""
        x, weights, out = (STAGES, HALF, DEPTH), (STAGES, 2 * FEATURES, DEPTH), (COMPUTE, ROWS, FEATURES)
        arrays = (plgpu.SMEM(shape, dtype, transforms=SWIZZLED) for shape in (x, weights, out))
        full = plgpu.Barrier(num_arrivals=3, num_barriers=STAGES)
        free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=COMPUTE, num_barriers=STAGES)
        return cls(*arrays, full, free)


def swiglu(x: jax.Array, weight: jax.Array, *, interpret: object = None) -> jax.Array:
    """nanovllm_jax.kernels.swiglu for what `fits`."""
    (rows, depth), features, dtype = x.shape, weight.shape[1], x.dtype
    tiles, steps = (pl.cdiv(rows, PAIR * HALF), features // FEATURES), depth // DEPTH

    def for_each_tile(take):
        """take(row, feature) of this program's halves of tiles, one after the other."""
        pairs = SMS // PAIR

        @pl.loop(0, lax.div(tiles[0] * tiles[1] - program() + (pairs - 1), jnp.int32(pairs)))
        def _(turn):
            row, feature = plgpu.planar_snake(turn * pairs + program(), tiles, 0, ROWS_TOGETHER)
            take((row * PAIR + lax.axis_index("pair")) * HALF, feature * FEATURES)

    def load(x_ref, w_ref, memory: Memory):
        """The loading warpgroup: rows and weights into shared memory as soon as there is room."""

        def take(row, feature):
            @pl.loop(0, steps)
            def _(k):
                slot, part = slot_of(k, STAGES), pl.ds(k * DEPTH, DEPTH)
                full = memory.full.at[slot]
                plgpu.barrier_wait(memory.free.at[slot])
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, HALF), part], memory.x.at[slot], full)
                for i in range(2):
                    to = memory.weights.at[slot].at[pl.ds(i * FEATURES, FEATURES)]
                    source = w_ref.at[i].at[pl.ds(feature, FEATURES), part]
                    plgpu.copy_gmem_to_smem(source, to, full, collective_axes="pair")

        for_each_tile(take)
        for slot in range(STAGES):  # until the other program has had its loads, and has told this one
            plgpu.barrier_wait(memory.free.at[slot])

    def compute(o_ref, memory: Memory):
        """A computing warpgroup: its rows of each tile."""
        own = warpgroup()

        def take(row, feature):
            def multiply(sums):
                @pl.loop(0, steps)
                def _(k):
                    slot = slot_of(k, STAGES)
                    plgpu.barrier_wait(memory.full.at[slot])
                    lines = memory.x.at[slot].at[pl.ds(own * ROWS, ROWS)]
                    plgpu.wgmma(sums, lines, memory.weights.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # for those of the load before, whose memory is free then
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(memory.free.at[slot_of(k - 1, STAGES)]))

                total = sums[...]  # waits for all of them
                plgpu.barrier_arrive(memory.free.at[slot_of(jnp.int32(steps - 1), STAGES)])
                return total

            both = pl.run_scoped(multiply, plgpu.ACC((ROWS, 2 * FEATURES), jnp.float32))
            gate, up = rounded(both[:, :FEATURES], dtype), rounded(both[:, FEATURES:], dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory.out[own] = gated(gate, up, dtype).astype(dtype)
            plgpu.commit_smem()
            to = o_ref.at[pl.ds(row + own * ROWS, ROWS), pl.ds(feature, FEATURES)]
            plgpu.copy_smem_to_gmem(memory.out.at[own], to)

        for slot in range(STAGES):
            plgpu.barrier_arrive(memory.free.at[slot])
        for_each_tile(take)
        plgpu.wait_smem_to_gmem(0)

    def hopper_swiglu(x_ref, w_ref, o_ref):
        def run(memory):
            in_roles(lambda: load(x_ref, w_ref, memory), lambda: compute(o_ref, memory))

        pl.run_scoped(run, Memory.types(dtype), collective_axes="wg")

    out_type = (jax.ShapeDtypeStruct((rows, features), dtype),)
    return hopper_call(hopper_swiglu, x, weight, out_type=out_type, pair=PAIR, interpret=interpret)[0]
