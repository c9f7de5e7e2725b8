"""What the kernels for Hopper's tensor cores share. They are written for Mosaic GPU, Pallas' other backend, which has
what Triton's has not: warpgroups with work of their own (one loads, two compute), and matrix products that run while
their warpgroup does something else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import common

# Each SM has one program. A card that this is imported for has been started by then: an H100 for PCIe has but 114.
SMS = jax.local_devices()[0].core_count if common.is_hopper() else common.SMS
ROWS = 64  # of one warpgroup's matrix product
COMPUTE = 2  # warpgroups; the one after them loads
LOADER = COMPUTE


def swizzled(columns: int) -> tuple:
    """How 16-bit shared memory with so many columns, a multiple of 16, is laid out for copies and tensor cores."""
    line = next(size for size in (128, 64, 32) if 2 * columns % size == 0)  # bytes
    return plgpu.TilingTransform((8, line // 2)), plgpu.SwizzleTransform(line)


SWIZZLED = swizzled(64)  # as tensor cores read it best


def hopper_call(
    body: Callable,
    *args: jax.Array,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    pair: int = 1,
    interpret: object = None,
) -> tuple[jax.Array, ...]:
    """Run body(*refs) in one program an SM, which finds its work by `program()`, with three warpgroups.

    pair: programs with the same number, told apart by the axis "pair", which can load for one another.
    interpret: jax's InterpretGPUParams, for tests on any machine.
    """
    options = {} if interpret is None else {"interpret": interpret}
    if pair > 1:
        options |= {"cluster": (pair,), "cluster_names": ("pair",)}
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(SMS // pair,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=params,
        **options,
    )(*args)


def program() -> jax.Array:
    """The number of this program, or of its pair, from 0."""
    return jax.lax.axis_index("sm")


def in_roles(load: Callable[[], None], compute: Callable[[], None]) -> None:
    """load() in the warpgroup that loads, compute() in the others, which have the registers that it can spare."""

    @pl.when(warpgroup() == LOADER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        load()

    @pl.when(warpgroup() < COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute()


def slot_of(n: jax.Array, stages: int) -> jax.Array:
    """Where in shared memory the n-th load goes, where there is room for so many."""
    return jax.lax.rem(n, jnp.int32(stages))


def warpgroup() -> jax.Array:
    """The number of this warpgroup: below COMPUTE it computes, LOADER loads."""
    return jax.lax.axis_index("wg")
