"""The device mesh and the rules that map the modules' logical axes to it."""

from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

MODEL_AXIS = "model"


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis each logical axis of a parameter is split over; None keeps it whole on every device."""

    vocab: str | None = MODEL_AXIS
    heads: str | None = MODEL_AXIS
    kv_heads: str | None = MODEL_AXIS
    mlp: str | None = MODEL_AXIS
    embed: str | None = None

    def sharding(self, mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
        """The sharding of an array whose dimensions have these logical names."""
        return NamedSharding(mesh, Spec(*(getattr(self, axis) if axis else None for axis in axes)))


def make_mesh(tensor_parallel_size: int) -> Mesh:
    """A mesh of the first `tensor_parallel_size` devices.

    Raises ValueError when there are fewer devices than that.
    """
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} needs as many devices, but JAX sees {len(devices)}: {devices}"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), (MODEL_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:tensor_parallel_size]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that keeps an array whole on every device of the mesh."""
    return NamedSharding(mesh, Spec())
