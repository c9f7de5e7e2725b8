"""What JAX is told before it starts its devices, and XLA when it compiles for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Thread

import jax
from jax.sharding import AbstractMesh, Mesh

from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.parallel.processes import connect

# From so many rows on kernels take longer, of 0.6B on one GPU, than the host needs to launch them one by one. A CUDA
# graph starts when all of it has been updated, and would make the device wait for that.
NO_GRAPH_ROWS = 8192
# What XLA may put in CUDA graphs where there are several GPUs: not collectives, which have hung there, and which each
# update of a graph makes anew. (A step of few rows has next to none: kernels/exchange.py.)
COMMAND_BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
NO_MESH = AbstractMesh((), ())


@cache
def _process_of_backend() -> int:
    """The process that started JAX here first; what was forked from it remembers that."""
    return os.getpid()


def prepare_backend(config: EngineConfig) -> None:
    """Join the other processes, share the GPU's memory out, name the compilation cache, and begin to start the devices.

    Starting them takes seconds, in which the caller reads what a checkpoint's files say.
    Raises RuntimeError in a process that was forked from one with an engine, and ValueError with 64-bit numbers.
    """
    if _process_of_backend() != os.getpid():
        raise RuntimeError(
            f"process {_process_of_backend()} has made an engine, and this process {os.getpid()} was forked from it, "
            "which JAX does not survive: it would wait forever. Start processes by multiprocessing's 'spawn' method"
        )
    if jax.config.jax_enable_x64:
        raise ValueError("jax_enable_x64 is set, and the engine's programs are made of 32-bit numbers: leave it False")
    if not os.environ.get("XLA_CLIENT_MEM_FRACTION"):
        older = os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # JAX refuses one name beside the other
        os.environ["XLA_CLIENT_MEM_FRACTION"] = older or str(config.gpu_memory_utilization)
    if config.distributed or config.coordinator_address:
        connect(config.coordinator_address, config.num_processes, config.process_id)
    if config.compilation_cache_dir and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    Thread(target=_start_devices).start()


@contextmanager
def own_settings() -> Iterator[None]:
    """What is traced inside has numbers of 32 bits and no mesh around it, whatever the caller has set since the start.

    A program that is compiled already needs none of this.
    """
    with jax.enable_x64(False), jax.sharding.use_abstract_mesh(NO_MESH):
        yield


def _start_devices() -> None:
    with suppress(Exception):  # whoever asks for the devices is told
        jax.devices()


def compiler_options(mesh: Mesh, rows: int) -> dict[str, bool | str]:
    """XLA's flags for a program whose matmuls have so many rows: measured on an H200, see docs/performance.md."""
    options: dict[str, bool | str] = {}
    if mesh.devices.flat[0].platform != "gpu":
        return options
    # XLA counts the cache once more for each kernel that writes in it, takes memory for short, and has every layer
    # compute anew what all could share.
    options["xla_disable_hlo_passes"] = "rematerialization"
    if rows > 16:  # for fewer rows XLA's own kernels are faster
        options |= {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}
        options["xla_gpu_autotune_level"] = 2  # cuBLAS's kernels are timed, on numbers, and not compared
    if mesh.size > 1:
        # Each process tunes for itself: exchanging results would need all of them to compile in the same order.
        options |= {"xla_gpu_enable_command_buffer": COMMAND_BUFFERS, "xla_gpu_shard_autotuning": False}
        if jax.__version_info__ >= (0, 11):  # its kernels for small sums run on streams of their own: NCCL's are faster
            options["xla_gpu_experimental_use_collective_kernels"] = ""
    if rows >= NO_GRAPH_ROWS:
        options["xla_gpu_enable_command_buffer"] = ""
    return options
