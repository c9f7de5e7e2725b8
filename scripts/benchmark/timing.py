"""How long a program takes on the device."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def seconds_per_run(program: Callable, state: Sequence, inputs: Sequence, samples: int = 7) -> float:
    """Of program(state, inputs), which returns an output and the next state: the median over samples of about 10 ms."""
    state = jax.tree.map(jnp.copy, list(state))  # as a program reuses its memory

    def run(times: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(times):
            out, state = program(state, inputs)
        jax.block_until_ready((out, state))
        return time.perf_counter() - start

    run(2)
    times = max(2, int(0.01 / (run(3) / 3)))
    return statistics.median(run(times) for _ in range(samples)) / times
