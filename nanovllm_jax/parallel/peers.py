"""The memory by which the devices of a data group exchange small sums inside of their kernels (kernels/exchange.py)."""

import ctypes
import os
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from nanovllm_jax.kernels import Peers
from nanovllm_jax.kernels.exchange import capacity, memory_words
from nanovllm_jax.parallel.sharding import DATA_AXIS, MODEL_AXIS


def reach_one_another(mesh: Mesh) -> bool:
    """Whether the devices of each group are several, and can read and write one another's memory, as XLA lets them."""
    if mesh.shape[MODEL_AXIS] == 1 or jax.process_count() > 1:  # addresses are one process's own
        return False
    if mesh.devices.flat[0].platform != "gpu":
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default") not in ("", "default", "bfc", "platform"):
        return False  # CUDA's own pools have rules of their own for who may reach their memory
    can = ctypes.c_int(0)
    pairs = [pair for group in mesh.devices for pair in permutations(group, 2)]
    numbers = [[device.local_hardware_id for device in pair] for pair in pairs]
    return all(driver.cuDeviceCanAccessPeer(ctypes.byref(can), *pair) == 0 and can.value for pair in numbers)


def peers_layout(mesh: Mesh, features: int, dtype: np.dtype) -> Peers | None:
    """Shapes and shardings of what devices that reach one another need for rows of so many features.

    None where there is no kernel for such rows, or for so many devices.
    """
    devices = mesh.shape[MODEL_AXIS]
    if not capacity(devices, features, dtype.itemsize):
        return None
    sharding = NamedSharding(mesh, Spec((DATA_AXIS, MODEL_AXIS)))
    words = mesh.size * memory_words(devices, features, dtype.itemsize)
    return Peers(
        table=jax.ShapeDtypeStruct((mesh.size, 1 + 2 * devices), jnp.int32, sharding=sharding),
        memory=jax.ShapeDtypeStruct((words,), jnp.int32, sharding=sharding),
    )


def connect_peers(layout: Peers) -> Peers:
    """New memory on each device, and who finds it where."""
    memory = jnp.zeros(layout.memory.shape, layout.memory.dtype, device=layout.memory.sharding)
    address = {shard.device: shard.data.unsafe_buffer_pointer() for shard in memory.addressable_shards}
    groups = layout.memory.sharding.mesh.devices
    halves = [np.array([[address[device] for device in group]], np.uint64).view(np.int32) for group in groups]
    # Of a number of 64 bits the low half comes first: on all machines that have such devices.
    rows = [[number, *half[0, ::2], *half[0, 1::2]] for half in halves for number in range(groups.shape[1])]
    peers = Peers(jax.device_put(np.array(rows, np.int32), layout.table.sharding), memory)
    # One device's work is in order, but not with another's: which would write before the zeros are there.
    return jax.block_until_ready(peers)
