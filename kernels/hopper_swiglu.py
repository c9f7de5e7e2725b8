"""Mosaic GPU kernel: a gated linear layer of many rows on Hopper's tensor cores, with SwiGLU before anything is stored.

A tile is 128 rows and 128 features of each of the two products; each of two warpgroups has 64 of the rows, and a third
loads what they need ahead of time. Each program goes through its share of the tiles without a stop between them.
Shapes: T rows, D depth, F features.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .common import gated, rounded
from .hopper import COMPUTE, MANY, ROWS, SWIZZLED, hopper_call, warpgroup

TILE = COMPUTE * ROWS  # rows
FEATURES = 128
DEPTH = 64  # that is loaded at a time
STAGES = 4  # and how many of these loads there is room for
ROWS_TOGETHER = 8  # tiles of rows that programs side by side have, so that they find rows and weights in the L2 cache


def fits(x: jax.Array, weight: jax.Array) -> bool:
    """Whether the kernel is for x [T, D] and weights [2, F, D]: many rows of 16 bits, weights in whole tiles."""
    if x.ndim != 2 or x.dtype.itemsize != 2 or weight.dtype != x.dtype:
        return False
    return x.shape[0] >= MANY and x.shape[0] % 8 == 0 and x.shape[1] % DEPTH == 0 and weight.shape[1] % FEATURES == 0


def swiglu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """nanovllm_jax.kernels.swiglu for what `fits`."""
    (rows, depth), features, dtype = x.shape, weight.shape[1], x.dtype
    tiles, steps = (pl.cdiv(rows, TILE), features // FEATURES), depth // DEPTH

    def pipeline(step, around):
        def loaded(lines):
            options = dict(transforms=SWIZZLED, memory_space=plgpu.SMEM, delay_release=1)
            return plgpu.BlockSpec((lines, DEPTH), lambda k: (0, k), **options)

        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=40,
            in_specs=[loaded(TILE), loaded(FEATURES), loaded(FEATURES)],
            wg_axis="wg",
            num_compute_wgs=COMPUTE,
            max_concurrent_steps=STAGES,
            compute_context=around,
        )

    def hopper_swiglu(x_ref, w_ref, o_ref):
        own = pl.ds(warpgroup() * ROWS, ROWS)

        def run(memory, out):
            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
            def _(info):
                row, feature = plgpu.planar_snake(info.index[0], tiles, 0, ROWS_TOGETHER)
                lines, columns = pl.ds(row * TILE, TILE), pl.ds(feature * FEATURES, FEATURES)

                def multiply(_, x, gate_weight, up_weight, sums):
                    gate, up = sums
                    plgpu.wgmma(gate, x.at[own], gate_weight.transpose((1, 0)))
                    plgpu.wgmma(up, x.at[own], up_weight.transpose((1, 0)))
                    plgpu.wgmma_wait(2)  # for those of the step before, whose memory is free then
                    return sums

                def around(multiply_all):
                    def both(gate, up):
                        multiply_all((gate, up))
                        gate, up = (rounded(total[...], dtype) for total in (gate, up))
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out[warpgroup()] = gated(gate, up, dtype).astype(dtype)
                        plgpu.commit_smem()
                        start = row * TILE + warpgroup() * ROWS
                        plgpu.copy_smem_to_gmem(out.at[warpgroup()], o_ref.at[pl.ds(start, ROWS), columns])

                    total = plgpu.ACC((ROWS, FEATURES), jnp.float32)
                    pl.run_scoped(both, total, total)

                weights = (w_ref.at[i].at[columns, :] for i in range(2))
                pipeline(multiply, around)(x_ref.at[lines, :], *weights, allocations=memory)

        def nothing(*_):
            pass

        memory = pipeline(nothing, nothing).get_allocations(x_ref, w_ref.at[0], w_ref.at[1])
        out = plgpu.SMEM((COMPUTE, ROWS, FEATURES), dtype, transforms=SWIZZLED)
        pl.run_scoped(run, memory, out, collective_axes="wg")
        plgpu.wait_smem_to_gmem(0)

    return hopper_call(hopper_swiglu, x, weight, out_type=(jax.ShapeDtypeStruct((rows, features), dtype),))[0]
