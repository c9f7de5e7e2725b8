"""all_reduce_norm for one device of several that are not there: what they would have sent is in its memory already."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from nanovllm_jax.kernels import Peers, add_norm, exchange

EPS, BEFORE = 1e-6, 2**31 - 2  # how often each row has been exchanged before
CASES = [  # devices, this one's number, rows, features, parts, dtype
    (2, 0, 1, 512, 1, jnp.bfloat16),
    (2, 1, 3, 2560, 4, jnp.bfloat16),
    (4, 2, 5, 1024, 2, jnp.float16),
    (8, 7, 2, 1024, 1, jnp.bfloat16),
    (3, 1, 4, 320, 1, jnp.float32),
]


def words_of(row: np.ndarray, flag: int) -> np.ndarray:
    """A row as it is sent: bytes."""
    numbers = row.view(np.uint32)
    pairs = np.stack([numbers, np.full_like(numbers, flag)], axis=1).reshape(-1, 4)
    return np.concatenate([pairs[::2], pairs[1::2]]).ravel().view(np.uint8)


def place_of(source: int, row: int, flag: int, devices: int, features: int, itemsize: int) -> slice:
    """Where that row is in a device's memory, in bytes."""
    rows, size = exchange.capacity(devices, features, itemsize), 2 * features * itemsize
    start = -(-4 * rows // 256) * 256 + ((flag % 2 * devices + source) * rows + row) * size
    return slice(start, start + size)


def check(device_memory, devices, me, rows, features, parts, dtype, **options):
    """Two calls, in which the flags run over: results, what is sent to the others, and the counters.

    device_memory(contents): (address, an array, a function that returns what has become of the contents).
    """
    rng, itemsize = np.random.default_rng(devices), jnp.dtype(dtype).itemsize
    x, gain = (jnp.asarray(rng.standard_normal(size) + 1, dtype) for size in ((rows, features), features))
    deltas = jnp.asarray(rng.standard_normal((2, devices, parts, rows, features)), jnp.float32)
    deltas = deltas if parts > 1 else deltas.astype(dtype)
    sums = np.asarray(deltas, np.float32).sum(axis=2).astype(dtype)  # of each call, what each device has
    place = partial(place_of, devices=devices, features=features, itemsize=itemsize)
    memory = np.zeros((devices, 4 * exchange.memory_words(devices, features, itemsize)), np.uint8)
    flags = BEFORE + 1, BEFORE + 2
    memory[me].view(np.int32)[:rows] = BEFORE
    for flag in flags:
        for source in set(range(devices)) - {me}:
            for row in range(rows):
                memory[me, place(source, row, flag)] = words_of(sums[flag - flags[0], source, row], flag)
    addresses, arrays, contents = zip(*map(device_memory, memory.view(np.int32)))
    halves = np.array(addresses, np.uint64).view(np.int32)
    table = jnp.asarray([[me, *halves[::2], *halves[1::2]]])
    call = jax.jit(partial(exchange.all_reduce_norm, eps=EPS, **options))
    results = [jax.block_until_ready(call(x, deltas[i, me], gain, Peers(table, arrays[me]))) for i in range(2)]
    for flag, got, of_call in zip(flags, results, sums):
        total = sum(of_call.astype(np.float32)).astype(dtype)
        want = add_norm(x, jnp.asarray(total)[None], gain, EPS)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(*(np.asarray(y[1], np.float32) for y in (got, want)), rtol=2.0**-7, atol=1e-6)
        for device in set(range(devices)) - {me}:
            there = contents[device]().view(np.uint8)
            for row in range(rows):
                sent = words_of(of_call[me, row], flag)
                np.testing.assert_array_equal(there[place(me, row, flag)], sent)
    counters = contents[me]()[: rows + 1]
    np.testing.assert_array_equal(counters.view(np.uint32), [flags[1]] * rows + [0])
    np.testing.assert_array_equal(contents[me]().view(np.uint8)[place(me, 0, 1)], 0)  # nothing is sent to oneself
