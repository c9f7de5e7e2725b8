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

from .common import gated, rounded
from .hopper import COMPUTE, ROWS, SMS, SWIZZLED, hopper_call, in_roles, program, slot_of, swizzled, warpgroup

HALF = COMPUTE * ROWS  # rows of a program's tile
FEATURES = (128, 112, 96, 80, 64, 48, 32)  # that a tile may have
DEPTH = 64  # that is loaded at a time
SHARED_MEMORY = 226 * 1024  # bytes for loads and what goes out; barriers need a few more
PAIR = 2  # programs that share loads
ROWS_TOGETHER = 8  # tiles of rows that pairs side by side have, so that they find rows and weights in the L2 cache
# With fewer rows cuBLAS is as fast on an H200, but for whole tiles of products that are not deep, and for 128 rows.
MANY, SHALLOW = 2048, 2048


def fits(x: jax.Array, weight: jax.Array) -> bool:
    """Whether the kernel is for x [T, D] and weights [2, F, D]: 16 bits, and many rows, or fewer in whole tiles."""
    if x.ndim != 2 or x.dtype.itemsize != 2 or weight.dtype != x.dtype:
        return False
    (rows, depth), features = x.shape, weight.shape[1]
    whole = rows == HALF or (rows % (PAIR * HALF) == 0 and depth <= SHALLOW)
    enough = (rows >= MANY and rows % 8 == 0) or (whole and Tiles.of(rows, features).are_enough)
    return enough and depth % DEPTH == 0 and features % FEATURES[0] == 0


class Tiles(NamedTuple):
    """How a problem is cut: by pairs of programs."""

    features: int
    """Of a tile, of each product."""
    rows_are_shared: bool
    """A pair's tiles are of the same rows and of features side by side; else the other way round."""
    grid: tuple[int, int]
    """How many pairs of tiles there are, by rows and by features."""

    @classmethod
    def of(cls, rows: int, features: int) -> "Tiles":
        """Those that keep all SMs at work: as little as can be for those that have the most."""

        def cut(width):
            if rows <= HALF:
                return cls(width, True, (1, pl.cdiv(features, PAIR * width)))
            return cls(width, False, (pl.cdiv(rows, PAIR * HALF), pl.cdiv(features, width)))

        def cost(tiles):  # What rows and a tile's end take counts as 32 features.
            return pl.cdiv(tiles.number, SMS // PAIR) * (tiles.features + 32)

        return min(map(cut, FEATURES), key=cost)

    def starts(self, row: jax.Array, feature: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the tile begins that this program has of a pair of the grid."""
        own = lax.axis_index("pair")
        if self.rows_are_shared:
            return row * HALF, (feature * PAIR + own) * self.features
        return (row * PAIR + own) * HALF, feature * self.features

    @property
    def number(self) -> int:
        """Of pairs of tiles."""
        return self.grid[0] * self.grid[1]

    @property
    def are_enough(self) -> bool:
        """Whether they give two thirds of the SMs something to do."""
        return 3 * self.number >= 2 * (SMS // PAIR)

    @property
    def stages(self) -> int:
        """How many loads there is room for."""
        out, load = HALF * self.features, (HALF + 2 * self.features) * DEPTH
        return (SHARED_MEMORY // 2 - out) // load


class Memory(NamedTuple):
    """Shared memory: loads of rows and of both weights, what goes out, and what warpgroups wait for."""

    x: jax.Array
    weights: jax.Array
    out: jax.Array
    full: jax.Array
    free: jax.Array

    @classmethod
    def types(cls, dtype: jnp.dtype, features: int, stages: int) -> "Memory":
        """What to allocate."""
        loads = (plgpu.SMEM((stages, n, DEPTH), dtype, transforms=SWIZZLED) for n in (HALF, 2 * features))
        out = plgpu.SMEM((COMPUTE, ROWS, features), dtype, transforms=swizzled(features))
        full = plgpu.Barrier(num_arrivals=3, num_barriers=stages)
        free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=COMPUTE, num_barriers=stages)
        return cls(*loads, out, full, free)


def swiglu(x: jax.Array, weight: jax.Array, *, interpret: object = None) -> jax.Array:
    """nanovllm_jax.kernels.swiglu for what `fits`."""
    (rows, depth), dtype, tiles = x.shape, x.dtype, Tiles.of(x.shape[0], weight.shape[1])
    features, stages, steps = tiles.features, tiles.stages, depth // DEPTH

    def for_each_tile(take):
        """take(row, feature) of this program's tiles, one after the other."""
        pairs = SMS // PAIR

        @pl.loop(0, lax.div(tiles.number - program() + (pairs - 1), jnp.int32(pairs)))
        def _(turn):
            take(*tiles.starts(*plgpu.planar_snake(turn * pairs + program(), tiles.grid, 0, ROWS_TOGETHER)))

    def load(x_ref, w_ref, memory: Memory):
        """The loading warpgroup: rows and weights into shared memory as soon as there is room."""
        rows_for, weights_for = ("pair", None) if tiles.rows_are_shared else (None, "pair")

        def take(row, feature):
            @pl.loop(0, steps)
            def _(k):
                slot, part = slot_of(k, stages), pl.ds(k * DEPTH, DEPTH)
                full = memory.full.at[slot]
                plgpu.barrier_wait(memory.free.at[slot])
                source = x_ref.at[pl.ds(row, HALF), part]
                plgpu.copy_gmem_to_smem(source, memory.x.at[slot], full, collective_axes=rows_for)
                for i in range(2):
                    to = memory.weights.at[slot].at[pl.ds(i * features, features)]
                    source = w_ref.at[i].at[pl.ds(feature, features), part]
                    plgpu.copy_gmem_to_smem(source, to, full, collective_axes=weights_for)

        for_each_tile(take)
        for slot in range(stages):  # until the other program has had its loads, and has told this one
            plgpu.barrier_wait(memory.free.at[slot])

    def compute(o_ref, memory: Memory):
        """A computing warpgroup: its rows of each tile."""
        own = warpgroup()

        def take(row, feature):
            def multiply(sums):
                @pl.loop(0, steps)
                def _(k):
                    slot = slot_of(k, stages)
                    plgpu.barrier_wait(memory.full.at[slot])
                    lines = memory.x.at[slot].at[pl.ds(own * ROWS, ROWS)]
                    plgpu.wgmma(sums, lines, memory.weights.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # for those of the load before, whose memory is free then
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(memory.free.at[slot_of(k - 1, stages)]))

                total = sums[...]  # waits for all of them
                plgpu.barrier_arrive(memory.free.at[slot_of(jnp.int32(steps - 1), stages)])
                return total

            both = pl.run_scoped(multiply, plgpu.ACC((ROWS, 2 * features), jnp.float32))
            gate, up = rounded(both[:, :features], dtype), rounded(both[:, features:], dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory.out[own] = gated(gate, up, dtype).astype(dtype)
            plgpu.commit_smem()
            to = o_ref.at[pl.ds(row + own * ROWS, ROWS), pl.ds(feature, features)]
            plgpu.copy_smem_to_gmem(memory.out.at[own], to)

        for slot in range(stages):
            plgpu.barrier_arrive(memory.free.at[slot])
        for_each_tile(take)
        plgpu.wait_smem_to_gmem(0)

    def hopper_swiglu(x_ref, w_ref, o_ref):
        def run(memory):
            in_roles(lambda: load(x_ref, w_ref, memory), lambda: compute(o_ref, memory))

        pl.run_scoped(run, Memory.types(dtype, features, stages), collective_axes="wg")

    out_type = (jax.ShapeDtypeStruct((rows, weight.shape[1]), dtype),)
    return hopper_call(hopper_swiglu, x, weight, out_type=out_type, pair=PAIR, interpret=interpret)[0]
