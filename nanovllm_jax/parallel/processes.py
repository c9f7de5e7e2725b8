"""Several processes, of one host or many, that run the same script over all their devices together.

Every process has the same requests and so the same schedule; what the devices exchange goes through their programs.
JAX's distributed service connects the processes, and ends them when one is lost.
"""

import logging
from threading import Timer

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30  # a process that has been silent for so long is lost
SHUTDOWN_SECONDS = 30  # how long a process that is done waits for the others
PATIENCE_SECONDS = 60  # for the others to be asked for the same
WAITING = (
    "process %d has waited %.0f s for the others to be asked for the same. If they do nothing that takes so long, they "
    "went on without: each process must add the same requests between the same two steps"
)


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: list[int] | None = None,
) -> None:
    """Join the other processes; without arguments, those that SLURM, Open MPI or another of JAX's clusters started.

    Before JAX has a backend. Does nothing where jax.distributed has been initialized. Raises RuntimeError when JAX
    finds no cluster, or some process does not come within five minutes.
    """
    if not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                local_device_ids,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(
                f"the processes cannot be connected: {error}. Outside of SLURM and other clusters that JAX knows, give "
                "coordinator_address (host:port of process 0), num_processes and process_id, and create the LLM before "
                "anything else uses JAX"
            ) from error
    if jax.process_index():
        logging.getLogger("nanovllm_jax").setLevel(logging.WARNING)  # process 0 speaks for all


def same_everywhere(digest: bytes) -> bool:
    """Whether all processes call this with equal bytes, and equally many. Waits for them, and says so where it is long.

    It cannot end by itself: another process may be busy with something that takes longer.
    """
    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(digest, np.uint8)
    timer = Timer(PATIENCE_SECONDS, logger.warning, [WAITING, jax.process_index(), PATIENCE_SECONDS])
    timer.daemon = True
    timer.start()
    try:
        return bool((multihost_utils.process_allgather(mine) == mine).all())
    finally:
        timer.cancel()


def largest(value: int) -> int:
    """The largest of the processes' values, which are below 2**62 and above -2**62."""
    if jax.process_count() == 1:
        return value
    halves = np.array([value >> 31, value & 0x7FFFFFFF], np.int32)  # JAX's integers have 32 bits
    return max((int(high) << 31) + int(low) for high, low in multihost_utils.process_allgather(halves))
