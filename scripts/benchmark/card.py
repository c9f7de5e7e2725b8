"""The card's own rates, measured through JAX: `python -m benchmark.card RESULT.json`."""

import json
import statistics
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
        "bytes_per_second": copy_rate(2**30 if gpu else 2**24),
        "flops_per_second": matmul_rate(8192 if gpu else 512),
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


def copy_rate(count: int) -> float:
    """Bytes read and written per second, copying `count` bfloat16 numbers."""
    source = jnp.ones(count, jnp.bfloat16)
    return 2 * source.nbytes / seconds(jax.jit(lambda x: -x), source)  # a bare copy may be optimised away


def matmul_rate(size: int) -> float:
    """FLOPs per second of a square bfloat16 matmul. The numbers are random: constant ones would draw less power."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, b)


def seconds(call: Callable, *args: jax.Array, calls: int = 20, samples: int = 5) -> float:
    """Of one call, the median of samples of many in a row."""

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = call(*args)
        out.block_until_ready()
        return (time.perf_counter() - start) / calls

    sample()
    return statistics.median(sample() for _ in range(samples))


if __name__ == "__main__":
    main()
