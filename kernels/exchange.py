"""Pallas kernel: the sum of several GPUs' parts, added to the residual stream, and the RMS norm after it.

Each GPU writes its part into the others' memory and waits for theirs in its own, inside of the kernel: a collective
would be a launch of its own, which the host takes longer for than this for all of it. A part is sent as words of 8
bytes, 4 of numbers and 4 of a flag, which arrive together: so who finds the flag has the numbers, and nothing else says
that they are there (NCCL's "LL" protocol does so). A row's flag is how often the row has been exchanged, and its words
go to one place and another in turn: who sends the next but one has heard from all that they have read this one.

Each program sends before it waits, and the programs of a kernel begin in the same order on all devices, so that those
that wait for one another are there together. If a device does not come, the others wait for ever, as in a collective.

Shapes: T rows, D hidden, S parts, N devices, C rows for which there is memory.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import by_assembly, named_pallas_call, rounded

MOST_DEVICES = 8
MOST_BYTES = 4 << 20  # of numbers that a device sends, without flags: larger sums are NCCL's
PAIR = 16  # bytes of two words, which are sent at once
LEAST_BYTES = 1024  # of a row: then each thread has 16 of them, or more


class Peers(NamedTuple):
    """How a device finds the others of its group."""

    table: jax.Array
    """[1, 1 + 2 N] int32: its own number, then the low halves of the addresses of all devices' memory, and the high
    ones."""
    memory: jax.Array
    """[memory_words] int32, the device's own, which the kernels find by its address: zeros on all devices before any of
    them runs. As an argument of a program it stays where it is until the program has ended, and no other device writes
    into it after that."""


def capacity(devices: int, features: int, itemsize: int) -> int:
    """How many rows there is memory for: 0 where there is no kernel for such rows, or for so many devices."""
    if not 2 <= devices <= MOST_DEVICES or features * itemsize < LEAST_BYTES or features * itemsize % (2 * PAIR):
        return 0
    return MOST_BYTES // ((devices - 1) * features * itemsize)


def memory_words(devices: int, features: int, itemsize: int) -> int:
    """How large a device's memory is, in words of 4 bytes."""
    rows = capacity(devices, features, itemsize)
    return (_first_place(rows) + 2 * devices * rows * _row_bytes(features, itemsize)) // 4


def _first_place(rows: int) -> int:
    """Where words begin, in bytes: before them each row has a counter."""
    return pl.cdiv(4 * rows, 256) * 256


def _row_bytes(features: int, itemsize: int) -> int:
    return 2 * features * itemsize  # half of it is flags


AT = "{ .reg .b64 at, more; mov.b64 at, {%low0, %high0}; cvt.u64.u32 more, %offset0; add.u64 at, at, more; "
READ_COUNTER = AT + "ld.relaxed.gpu.global.u32 %out0, [at]; }"
SET_COUNTER = AT + "st.relaxed.gpu.global.u32 [at], %flag0; mov.b32 %out0, %data0; }"
SEND = (
    AT
    + """.reg .b64 first, second; .reg .pred live;
    setp.ge.s32 live, %offset0, 0;
    mov.b64 first, {%data0, %flag0}; mov.b64 second, {%data1, %flag0};
    @live st.relaxed.sys.global.v2.b64 [at], {first, second};
    mov.b32 %out0, %data0; mov.b32 %out1, %data1; }"""
)
RECEIVE = (
    AT
    + """.reg .b64 first, second; .reg .b32 a, b, flag_a, flag_b; .reg .pred p;
    mov.b32 a, 0; mov.b32 b, 0;
    setp.lt.s32 p, %offset0, 0; @p bra END;
    AGAIN: ld.relaxed.sys.global.v2.b64 {first, second}, [at];
    mov.b64 {a, flag_a}, first; mov.b64 {b, flag_b}, second;
    setp.ne.b32 p, flag_a, %flag0; @p bra AGAIN;
    setp.ne.b32 p, flag_b, %flag0; @p bra AGAIN;
    END: mov.b32 %out0, a; mov.b32 %out1, b; }"""
)


def _all_reduce_norm_kernel(ref, *, width: int, rows: int, eps: float):
    features, table = ref["x"].shape[1], ref["table"]
    row, devices, itemsize = pl.program_id(0), table.shape[1] // 2, ref["x"].dtype.itemsize
    dtype, per_pair = ref["x"].dtype, PAIR // 2 // itemsize  # numbers that are sent at once
    column = jnp.arange(width, dtype=jnp.int32)
    at, used = (row, pl.ds(0, width)), column < features
    load, store = partial(plgpu.load, mask=used, other=0), partial(plgpu.store, mask=used)
    parts = (load(ref["delta"].at[jnp.int32(part), *at]) for part in range(ref["delta"].shape[0]))
    own = sum(part.astype(jnp.float32) for part in parts).astype(dtype)

    def spread(x):
        return jnp.broadcast_to(x, (width,))

    def address(device):
        return table[0, 1 + device], table[0, 1 + devices + device]

    me = table[0, 0]
    low, high = (jnp.broadcast_to(half, (1,)) for half in address(me))
    counter = dict(low=low, high=high, offset=jnp.broadcast_to(4 * row, (1,)))
    flag = by_assembly(READ_COUNTER, jnp.int32, **counter) + 1

    # A thread has 16 bytes of a row, two pairs: the first ones lie side by side, and so do the second ones.
    pair, half = column // per_pair, features // per_pair // 2
    in_row = PAIR * ((pair & 1) * half + (pair >> 1))

    def message(device, source):
        """Where a device has what this source sends: nowhere what it would send itself."""
        low, high = map(spread, address(device))
        place = ((spread(flag) & 1) * devices + source) * rows + row
        offset = _first_place(rows) + place * _row_bytes(features, itemsize) + in_row
        return dict(low=low, high=high, offset=jnp.where(used & (device != source), offset, -1), flag=spread(flag))

    sent = own
    for device in range(devices):
        sent = by_assembly(SEND, dtype, per_pair, data=sent, **message(device, source=me))
    total = jnp.zeros((width,), jnp.float32)
    for source in range(devices):  # in the same order on all of them
        received = by_assembly(RECEIVE, dtype, per_pair, sent=sent, **message(me, source))
        total += jnp.where(source == me, own, received).astype(jnp.float32)

    wide = rounded(load(ref["x"].at[at]).astype(jnp.float32) + rounded(total, dtype), dtype)
    store(ref["sum"].at[at], wide.astype(dtype))
    wide = jnp.where(used, wide, 0)
    scale = jnp.broadcast_to(lax.rsqrt((wide * wide).sum() / features + eps), (1,))
    # All threads have read the counter: what they have received is in the sum.
    scale = by_assembly(SET_COUNTER, jnp.float32, data=scale, flag=flag, **counter)
    normed = rounded(wide * spread(scale), dtype)  # where transformers rounds
    gain = plgpu.load(ref["gain"].at[pl.ds(0, width)], mask=used, other=0)
    store(ref["normed"].at[at], (normed * gain.astype(jnp.float32)).astype(dtype))


def all_reduce_norm(
    x: jax.Array, delta: jax.Array, gain: jax.Array, peers: Peers, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.all_reduce_norm as one kernel."""
    tokens, features = x.shape
    width, devices = pl.next_power_of_2(features), peers.table.shape[1] // 2
    sizes = devices, features, x.dtype.itemsize
    rows = capacity(*sizes)
    assert tokens <= rows, "other devices' memory would be written past its end"
    assert peers.memory.shape == (memory_words(*sizes),), "the memory is for other rows"
    args = dict(x=x, delta=delta, gain=gain, table=peers.table, memory=peers.memory)
    results = named_pallas_call(
        _all_reduce_norm_kernel,
        args,
        dict.fromkeys(("sum", "normed"), jax.ShapeDtypeStruct(x.shape, x.dtype)),
        grid=(tokens,),
        num_warps=min(16, width // 256),
        interpret=interpret,
        width=width,
        rows=rows,
        eps=eps,
    )
    return results["sum"], results["normed"]
