"""The card's own rates, measured through JAX: `python -m benchmark.card RESULT.json`.

They are to be limits: of several ways to read memory, and of several samples of each, the fastest counts.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    result = {
        "device": jax.devices()[0].device_kind,
        "bytes_per_second": memory_rate(2**28 if gpu else 2**24),
        "flops_per_second": matmul_rate(8192 if gpu else 512, {"xla_gpu_enable_triton_gemm": False} if gpu else {}),
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


def memory_rate(count: int) -> float:
    """Bytes per second: `count` numbers of float32 copied, or only read, by rows or all together."""
    source = jnp.ones((count // 1024, 1024), jnp.float32)
    rates = [2 * source.nbytes / seconds(jax.jit(lambda x: -x), source)]  # a bare copy may be optimised away
    rates += [source.nbytes / seconds(jax.jit(read), source) for read in (jnp.sum, lambda x: x.max(axis=1))]
    return max(rates)


def matmul_rate(size: int, options: dict[str, bool]) -> float:
    """FLOPs per second of a square bfloat16 matmul. The numbers are random: constant ones would draw less power."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / seconds(jax.jit(jnp.matmul, compiler_options=options), a, b)


def seconds(call: Callable, *args: jax.Array, calls: int = 20, samples: int = 5) -> float:
    """Of one call, the fastest of samples of many in a row."""

    def sample() -> float:
        start = time.perf_counter()
        jax.block_until_ready([call(*args) for _ in range(calls)])  # a CPU does them in no order
        return (time.perf_counter() - start) / calls

    sample()
    return min(sample() for _ in range(samples))


if __name__ == "__main__":
    main()
