"""What the kernels share: how a pallas_call is made, how a tile of the paged cache is addressed, the online softmax.

Shapes: B sequences, K kv heads, G = N / K query heads to a kv head, H head_dim, W blocks in a block table's row.
"""

import functools
import importlib.util
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Known and documented: jax is pinned to versions that have the backend. Users need not hear it at each compile.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

# At each value of one of Triton's types MLIR looks for a Python module of them, along the whole path, as there is none:
# a thousand times a step. An empty one ends that, and with it a third of the time that lowering takes.
TRITON_TYPES = "jaxlib.mlir.dialects.tt"
if TRITON_TYPES not in sys.modules and importlib.util.find_spec(TRITON_TYPES) is None:
    sys.modules[TRITON_TYPES] = types.ModuleType(TRITON_TYPES)

LOG2E = math.log2(math.e)
SMS = 132  # of an H200, and most H100s
NEG_INF = -1e30  # finite, so that the difference of two masked scores is not NaN


@functools.cache
def is_hopper() -> bool:
    """Whether the kernels for Hopper run here: compute capability 9.0, a jax and a CUDA that compile them rightly."""
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    device = jax.local_devices()[0]
    cuda = re.search(r"cuda (\d+)", device.client.platform_version)
    # CUDA 12.8 and 12.9.0 compile causal masks wrongly: jax refuses them in its own kernel of this kind.
    return device.compute_capability == "9.0" and cuda is not None and not 12080 <= int(cuda[1]) < 12091


def pallas_call(
    body: Callable,
    *args: jax.Array,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    num_stages: int = 1,
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
    **static: object,
) -> Sequence[jax.Array]:
    """Run body(*refs, **static) over the grid; each ref is a whole array, as a paged kernel does its own indexing.

    interpret runs it in plain JAX on any machine, slowly: for tests.
    """

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    return pl.pallas_call(
        functools.partial(body, **static),
        grid=grid,
        in_specs=[whole(x) for x in args],
        out_specs=[whole(x) for x in out_shape],
        out_shape=list(out_shape),
        input_output_aliases=aliases or {},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=body.__name__.strip("_"),
    )(*args)


def named_pallas_call(
    body: Callable, args: dict[str, jax.Array], outs: dict[str, jax.ShapeDtypeStruct], **options: object
) -> dict[str, jax.Array]:
    """`pallas_call` of body(ref, **static) with its refs by name, for kernels whose arguments differ from call to call.

    A result with an argument's name is that argument, written in place; the ref of that name is for both.
    """
    names = (*args, *outs)

    @functools.wraps(body)
    def by_name(*refs, **static):
        return body(dict(zip(names, refs)), **static)

    aliases = {list(args).index(name): number for number, name in enumerate(outs) if name in args}
    return dict(
        zip(outs, pallas_call(by_name, *args.values(), out_shape=list(outs.values()), aliases=aliases, **options))
    )


_platform = jax.make_user_context()


def traced_for(platform: str | None) -> AbstractContextManager:
    """Inside, what is traced will run on this platform alone ("gpu", "cpu", ...), and only its part is traced."""
    return _platform(platform)


def either(*args: jax.Array, cuda: Callable, default: Callable) -> Any:
    """cuda(*args) on an NVIDIA GPU, default(*args) anywhere else: whichever it is when the program is lowered.

    Where that is known beforehand, the other one is not traced: that may be half of what tracing a program takes.
    """
    if _platform.value is None:
        return jax.lax.platform_dependent(*args, cuda=cuda, default=default)
    return cuda(*args) if _platform.value == "gpu" else default(*args)


def kernel(function: Callable, *, taken: tuple[str, ...] = (), **options: str | tuple[str, ...]) -> Callable:
    """jax.jit that holds under jax.disable_jit too: a bare pallas_call would be compiled anew at every call.

    taken: arguments that are donated then, as no program around the call can say so.
    """
    compiled = jax.jit(function, **options)
    op_by_op = jax.jit(function, donate_argnames=taken, **options) if taken else compiled

    @functools.wraps(function)
    def call(*args, **arguments):
        chosen = op_by_op if jax.config.jax_disable_jit else compiled
        with jax.disable_jit(False):
            return chosen(*args, **arguments)

    return call


def dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """a @ b (or b.T) in float32 on tensor cores; float32 operands are multiplied exactly, not rounded to tf32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision)


def log2(x: int) -> int:
    """The exponent of a power of two."""
    assert x & (x - 1) == 0, f"{x} is not a power of two"
    return x.bit_length() - 1


class Paging(NamedTuple):
    """How a cache [2, L, num_blocks, K, block_size, H] is cut. Kernels take it as rows: the H numbers of a token."""

    layers: int
    num_blocks: int
    kv_heads: int
    block_size: int

    @classmethod
    def of(cls, kv_cache: jax.Array) -> "Paging":
        """A cache's."""
        return cls(*kv_cache.shape[1:-1])

    @property
    def values(self) -> int:
        """How many rows after its key a token's value is."""
        return self.layers * self.num_blocks * self.kv_heads * self.block_size

    def row(self, layer, block, head, offset):
        """Where the key of a block's token is, by its offset in the block. All may be integers or arrays."""
        return ((layer * self.num_blocks + block) * self.kv_heads + head) * self.block_size + offset

    def row_of_slot(self, layer, slot, head):
        """The same of a slot: block * block_size + offset."""
        return self.row(layer, slot >> log2(self.block_size), head, slot & (self.block_size - 1))

    def tile(self, layer, table_ref, sequence, head, start, limit, *, block_k: int):
        """Where the keys of tokens start to start + block_k of a sequence are: the first's row, or an array of rows.

        start is a multiple of block_k. A tile inside one block lies together, else every token has its own row. Tokens
        from limit on may have no block, so their table entry is not read.
        """
        if block_k <= self.block_size:
            block = table_ref[sequence, start >> log2(self.block_size)]
            return self.row(layer, block, head, start & (self.block_size - 1))
        position = start + jnp.arange(block_k, dtype=jnp.int32)
        entry = table_ref.at[jnp.full_like(position, sequence), position >> log2(self.block_size)]
        blocks = plgpu.load(entry, mask=position < limit, other=0)
        return self.row(layer, blocks, head, position & (self.block_size - 1))


def as_rows(kv_cache: jax.Array) -> jax.Array:
    """A cache [2, L, num_blocks, K, block_size, H] as what kernels take, `Paging`'s rows: the same memory."""
    return kv_cache.reshape(-1, kv_cache.shape[-1])


def as_tiles(kv_cache: jax.Array, block_k: int) -> jax.Array:
    """The same as [tiles, rows, H], of block_k rows or of a block's, for `load_tile`.

    Where a tile begins is then one number, added to what is known when a kernel is compiled: on rows Triton works out
    each thread's addresses one by one, with registers that programs of decode attention do not have to spare.
    """
    return kv_cache.reshape(-1, min(block_k, kv_cache.shape[-2]), kv_cache.shape[-1])


def tile_and_row(cache_ref, row):
    """Where Paging's rows are in a cache that is `as_tiles`: (tiles, rows in them)."""
    rows = cache_ref.shape[1]
    return row >> log2(rows), row & (rows - 1)


def load_tile(cache_ref, rows, block_k: int, mask=None) -> jax.Array:
    """[block_k, H] keys or values in these rows, as Paging.tile has them, zeros where not mask [block_k]."""
    tile, row = tile_and_row(cache_ref, rows)
    if rows.ndim == 0:
        ref = cache_ref.at[tile, :, :]
    else:
        shape = (block_k, cache_ref.shape[-1])
        columns = lax.broadcasted_iota(jnp.int32, shape, 1)
        ref = cache_ref.at[spread(tile, shape), spread(row, shape), columns]
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask[:, None], other=0.0)


def spread(column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[R] -> [R, C], the same value along each row."""
    return jnp.broadcast_to(column[:, None], shape)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 numbers with dtype's precision."""
    return x.astype(dtype).astype(jnp.float32)


def gated(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """silu(gate) * up in float32, of products that are rounded to dtype, as transformers rounds silu too."""
    return rounded(gate / (1 + jnp.exp(-gate)), dtype) * up


def with_rank(x: jax.Array, rank: int) -> jax.Array:
    """x [...] as [1, ..., 1, ...]: what NumPy does unasked, and jax_numpy_rank_promotion="raise" forbids."""
    return jnp.expand_dims(x, range(rank - x.ndim))


def norm_rope(halves, gains, cos, sin, *, eps: float, dtype) -> tuple[jax.Array, jax.Array]:
    """RMS norm of heads, given as their two halves [..., H / 2] with the gains', and their rotation: float32 halves.

    Rounded to dtype where transformers rounds. Halves may be [..., H], with each number twice; so are the results then.
    """
    halves = [half.astype(jnp.float32) for half in halves]
    squares = sum((half * half).sum(axis=-1) for half in halves)
    scale = lax.rsqrt(squares / (2 * halves[0].shape[-1]) + eps)[..., None]
    normed = (rounded(half * scale, dtype) for half in halves)
    gains = (with_rank(gain.astype(jnp.float32), halves[0].ndim) for gain in gains)
    first, second = (rounded(x * gain, dtype) for x, gain in zip(normed, gains))
    return first * cos - second * sin, second * cos + first * sin


def softmax_start(rows: int, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(acc [R, H], m [R], l [R]) before any key: weighted sum of values, highest score, sum of weights."""
    acc = jnp.zeros((rows, head_dim), jnp.float32)
    return acc, jnp.full((rows,), NEG_INF, jnp.float32), jnp.zeros((rows,), jnp.float32)


def softmax_step(state, scores: jax.Array, v: jax.Array, *, scale: float, fused_exp2: bool):
    """Take in a tile of keys: scores [R, block_k] not yet scaled, v [block_k, H] (Milakov and Gimelshein 2018)."""
    acc, m, l = state
    m_new = jnp.maximum(m, scores.max(axis=1))
    to_exponent = scale * LOG2E
    shift = m_new * -to_exponent
    p = exp2_of_line(scores, to_exponent, shift[:, None], fused_exp2)
    # Exactly 1 where m stays: then a tile in which a query sees no key leaves its result as it is, to the last bit.
    alpha = exp2_of_line(m - m_new, to_exponent, jnp.zeros_like(m), fused_exp2)
    return acc * alpha[:, None] + dot(p.astype(v.dtype), v), m_new, l * alpha + p.sum(axis=1)


def exp2_of_line(x: jax.Array, slope: float | jax.Array, shift: jax.Array, fused: bool) -> jax.Array:
    """exp2(x * slope + shift) in float32 as one multiply-add and one exp2 instruction, denormals to zero.

    Triton on its own makes seven instructions of it, and prefill has one of these for every score. The fused form is
    assembly for the GPU, so an interpreted kernel takes the other.
    """
    if not fused:
        return jnp.exp2(x * slope + shift)
    code = "{ .reg .f32 line; fma.rn.f32 line, %x0, %slope0, %shift0; ex2.approx.ftz.f32 %out0, line; }"
    return by_assembly(code, x.dtype, x=x, slope=jnp.full_like(x, slope), shift=jnp.broadcast_to(shift, x.shape))


def by_assembly(code: str, dtype: jax.typing.DTypeLike, pack: int = 1, **args: jax.Array) -> jax.Array:
    """Numbers %out of this dtype, one for each place of the args, arrays of one shape.

    Code sees `pack` places at a time, of each array as so many registers of 4 bytes as they fill: %name0, %name1, ...
    It is taken for a function of its args: what it does besides is done if its result is used, after what they need.
    """
    [shape] = {arg.shape for arg in args.values()}
    out, constraints = jax.ShapeDtypeStruct(shape, dtype), []
    for name, array in {"out": out, **args}.items():
        kind = "f" if array.dtype == jnp.float32 else "r"
        for register in range(pl.cdiv(pack * array.dtype.itemsize, 4)):
            code = code.replace(f"%{name}{register}", f"${len(constraints)}")
            constraints.append(f"={kind}" if name == "out" else kind)
    [y] = plgpu.elementwise_inline_asm(
        code,
        args=list(args.values()),
        constraints=",".join(constraints),
        pack=pack,
        result_shape_dtypes=[out],
    )
    return y


def softmax_end(state) -> jax.Array:
    """[R, H]: the attention output; zeros for rows that saw no key."""
    acc, _, l = state
    return acc / jnp.maximum(l, 1e-30)[:, None]


def search(ends: jax.Array, numbers: jax.Array) -> jax.Array:
    """How many of ends [E], which do not fall, are not above each of numbers [N]: [N] int32.

    All are compared with all, as one kernel: a binary search would be a loop of small ones, launched one by one while
    the device waits.
    """
    return (numbers[:, None] >= ends[None]).sum(axis=1, dtype=jnp.int32)


def prefill_tiles(query_starts: jax.Array, context_lens: jax.Array, tokens: int, block_q: int):
    """Cut T tokens into tiles of at most block_q, each of one sequence.

    Returns int32 arrays [tiles]: a tile's sequence, its first row of the T, how many rows it has (0: an unused tile),
    and its first token's position in the sequence.

    The rows past the last sequence are cut as well, as a sequence P without context: their positions are below 0.
    Example: query_starts [0, 5, 7], T 8, block_q 4 -> rows (0, 4, 5, 7), counts (4, 1, 2, 1).
    """
    starts = jnp.append(query_starts, tokens).astype(jnp.int32)  # [P + 2]
    lengths = jnp.diff(starts)
    first_position = jnp.append(context_lens, 0).astype(jnp.int32) - lengths
    ends = jnp.cumsum((lengths + block_q - 1) // block_q)  # tile count up to and with each sequence
    tile = jnp.arange((tokens + len(lengths) * (block_q - 1)) // block_q, dtype=jnp.int32)
    sequence = search(ends, tile)
    used = sequence < len(lengths)
    owner = jnp.minimum(sequence, len(lengths) - 1)
    in_sequence = (tile - jnp.append(0, ends)[owner]) * block_q
    count = jnp.where(used, jnp.minimum(lengths[owner] - in_sequence, block_q), 0)
    return owner, starts[owner] + in_sequence, count, first_position[owner] + in_sequence
