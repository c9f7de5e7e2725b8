"""The device mesh, the rules that map the modules' logical axes to it, and what devices exchange.

A program over several devices is one function that runs on each of them, on its shards (`per_device`). What it has to
say about other devices is in the functions below, which do nothing where the model is whole.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

DATA_AXIS = "data"
"""Data groups, each with sequences and a cache of its own."""
MODEL_AXIS = "model"
"""The devices of a group, which share the model."""


RULES = {"vocab": MODEL_AXIS, "heads": MODEL_AXIS, "kv_heads": MODEL_AXIS, "mlp": MODEL_AXIS, "embed": None, None: None}
"""Which mesh axis each logical axis of a parameter is split over; None keeps it whole on every device."""


def parameter_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, Spec(*(RULES[axis] for axis in axes)))


def make_mesh(tensor_parallel_size: int, data_parallel_size: int = 1) -> Mesh:
    """A mesh (data, model) of the first devices; those of one data group are neighbours.

    Raises ValueError when there are fewer devices than that, or in several processes more.
    """
    devices, shape = jax.devices(), (data_parallel_size, tensor_parallel_size)
    if math.prod(shape) > len(devices):
        groups = "" if data_parallel_size == 1 else f" for each of data_parallel_size={data_parallel_size} groups"
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} needs as many devices{groups}, "
            f"but JAX sees {len(devices)}: {devices}"
        )
    if jax.process_count() > 1 and math.prod(shape) < len(devices):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} times data_parallel_size={data_parallel_size} must be "
            f"{len(devices)}, all devices of the {jax.process_count()} processes"
        )
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), (DATA_AXIS, MODEL_AXIS))


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """A function of whole arrays that runs `function` on each device's shards; on one device, `function` itself."""
    if mesh.size == 1:
        return function
    # Whether outputs are equal where the specs say so cannot be checked: kernels do not tell.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def specs_of(tree: Any) -> Any:
    """The partition specs of arrays or shapes with a sharding."""
    return jax.tree.map(lambda array: array.sharding.spec, tree)


# ------------------------------------------------------------ inside `per_device`


def is_split(axis: str = MODEL_AXIS) -> bool:
    """Whether the code being traced runs once for each of several devices along this mesh axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


def is_summed_over(logical_axis: str | None) -> bool:
    """Whether each of several devices has a part of a logical axis, so that what adds it up has a part of the sum."""
    axis = RULES[logical_axis]
    return axis is not None and is_split(axis)


def sum_over(logical_axis: str | None, x: jax.Array) -> jax.Array:
    """The sum of the devices' x, each of which has added up its part of a logical axis."""
    return lax.psum(x, RULES[logical_axis]) if is_summed_over(logical_axis) else x


def first_of_shard(size: int, axis: str = MODEL_AXIS) -> jax.Array | int:
    """Where this device's part, `size` long, of what is split over a mesh axis begins."""
    return lax.axis_index(axis) * size if is_split(axis) else 0


def local_index(index: jax.Array, size: int, axis: str = MODEL_AXIS) -> jax.Array:
    """Indices into what is split over a mesh axis as indices into this device's part, `size` long.

    Those of other devices' parts become `size`: out of range, and not negative, which would count from the end.
    """
    local = index - first_of_shard(size, axis)
    return jnp.where((local >= 0) & (local < size), local, size)


def from_group(mine: jax.Array, x: jax.Array) -> jax.Array:
    """Rows of x [R, ...] on every device, each from the data group whose `mine` [R] is true for it."""
    if not is_split(DATA_AXIS):
        return x
    return lax.psum(jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, 0), DATA_AXIS)


def gather_groups(x: jax.Array) -> jax.Array:
    """x [steps, R, ...] with the rows of every data group, on every device."""
    return lax.all_gather(x, DATA_AXIS, axis=1, tiled=True) if is_split(DATA_AXIS) else x
