"""Paged attention (a function each to write the KV cache, decode from it and prefill against it), norms, on one device
and over several, linear layers of one row, of a few and of many, sampling, and what cuts an array.

On an NVIDIA GPU each runs its Pallas kernel, anywhere else its plain-jnp oracle (in the files called reference, same
arguments, but for a `fixed` that one of the two has no need of, and a mesh's axis). Which one is settled when a program
is lowered, or before it is traced (`traced_for`), so a compiled step holds one of the two. Each sits in a jit of its
own: layers that are alike share one trace and one lowering. Of the functions for sampling, but for the draw itself, a
row that asks for nothing takes next to no time. With `fixed`, a row's result is the same to the last bit whatever else
is in the call. `sampling` [R, 12] int32 is how each row samples: `sampling.settings` of it, by name.

Shapes: T tokens, B sequences with one new token each, P sequences in prefill, N query heads, K kv heads, H head_dim,
W blocks in a row of a block table, D hidden, R rows to sample, V vocabulary, S slots of running sequences (in a linear
layer and a norm: parts of a sum).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import (
    adjust,
    common,
    decode,
    exchange,
    few,
    logprobs,
    matmul,
    noise,
    norm,
    pieces,
    prefill,
    reference,
    reference_sampling,
    row,
    store,
    threshold,
)
from .common import either, kernel, traced_for
from .exchange import Peers
from .few import fits as is_few_rows
from .reference import whole
from .row import fits as is_row
from .sampling import ENDS, MAX_LOGPROBS, PROMPT

__all__ = [
    "ENDS",
    "MAX_LOGPROBS",
    "PROMPT",
    "Peers",
    "add_norm",
    "adjust_logits",
    "all_reduce_norm",
    "few_linear",
    "fixed_matmul",
    "is_few_rows",
    "is_many_rows",
    "is_row",
    "load_runtime",
    "noisy_argmax",
    "norm_rope_store",
    "paged_decode_attention",
    "paged_prefill_attention",
    "row_linear",
    "row_norm_linear",
    "sampling_threshold",
    "split",
    "store_and_decode",
    "swiglu",
    "token_logprobs",
    "traced_for",
    "whole",
]


def load_runtime() -> None:
    """Do what a compiled program from disk needs before it is loaded: one that is traced here has done it by then."""
    if common.is_hopper():
        from . import hopper  # noqa: F401  (importing Mosaic GPU tells XLA where its runtime is)


def _differentiable(cuda: Callable, oracle: Callable, **static: Any) -> Callable:
    """The kernel on a GPU and its oracle anywhere else, with the oracle's derivatives."""
    cuda, oracle = (functools.partial(function, **static) for function in (cuda, oracle))

    @jax.custom_jvp
    def function(*args):
        return either(*args, cuda=cuda, default=oracle)

    function.defjvp(functools.partial(jax.jvp, oracle))
    return function


@functools.partial(kernel, static_argnames=("eps", "fixed"), taken=("kv_cache",))
def norm_rope_store(
    qkv: jax.Array,
    q_gain: jax.Array,
    k_gain: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array | int,
    *,
    eps: float,
    fixed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Normalise and rotate queries and keys, and write keys and values into the paged cache.

    qkv [T, K, G + 2, H]: for each kv head its G query heads, its key and its value. q_gain, k_gain [H]: the RMS norms'
    weights. cos, sin [T, H / 2] float32. slot_mapping [T] int32: block * block_size + offset in the block where a
    token's key and value go, no two in one place, or -1 for a padded row, which writes nothing. kv_cache [2, L,
    num_blocks, K, block_size, H], of qkv's dtype: L layers' keys, then their values; a donated one is updated in place.
    layer, int32: which of them.
    Returns (q [T, K * G, H], kv_cache).
    """
    return either(
        *(qkv, q_gain, k_gain, cos, sin, slot_mapping, kv_cache, jnp.int32(layer)),
        cuda=functools.partial(store.norm_rope_store, eps=eps, fixed=fixed),
        default=functools.partial(reference.norm_rope_store, eps=eps, fixed=fixed),
    )


@functools.partial(kernel, static_argnames="scale")
def paged_decode_attention(
    q: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array | int,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention of one new token per sequence over that sequence's cached tokens, itself among them.

    q [B or more, N, H], of which the first B rows are the sequences', query head n belonging to kv head n // (N / K);
    kv_cache and layer as in `norm_rope_store`; block_tables [B, W] int32, of which entries past a sequence's context
    may be anything; context_lens [B] int32 in tokens, 0 for a padded row. scale multiplies the scores. What sequences
    next to one another share, as their tables begin alike, a GPU may read once for several of them.
    Returns an array like q: zeros for padded rows, and rows past B undefined (`paged_prefill_attention` fills them).
    """
    return either(
        *(q, kv_cache, jnp.int32(layer), block_tables, context_lens),
        cuda=functools.partial(decode.paged_decode_attention, scale=scale),
        default=functools.partial(reference.paged_decode_attention, scale=scale),
    )


@functools.partial(kernel, static_argnames=("scale", "eps"), taken=("kv_cache",))
def store_and_decode(
    qkv: jax.Array,
    q_gain: jax.Array,
    k_gain: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array | int,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """`norm_rope_store` of one new token per sequence inside of its `paged_decode_attention`.

    Arguments as in the two, with T = B. A token's slot is where its sequence's table has its last place.
    Returns (out [B, K * G, H], kv_cache).
    """
    return either(
        *(qkv, q_gain, k_gain, cos, sin, slot_mapping, kv_cache, jnp.int32(layer), block_tables, context_lens),
        cuda=functools.partial(decode.store_and_decode, scale=scale, eps=eps),
        default=functools.partial(reference.store_and_decode, scale=scale, eps=eps),
    )


@functools.partial(kernel, static_argnames=("scale", "fixed"))
def paged_prefill_attention(
    q: jax.Array,
    kv_cache: jax.Array,
    layer: jax.Array | int,
    block_tables: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    out: jax.Array | None = None,
    *,
    scale: float,
    fixed: bool = False,
) -> jax.Array:
    """Causal attention of each sequence's newest tokens over all its cached tokens, the new ones among them.

    q [T, N, H], the sequences' new tokens one after another: those of sequence p are rows query_starts[p] to
    query_starts[p + 1], and they are the last of its context_lens[p] cached tokens. So a first prefill, a chunk and a
    prefix hit are one case. query_starts [P + 1] int32 does not fall (a padded sequence is empty), context_lens [P]
    int32, block_tables [P, W] int32; kv_cache, layer and scale as in paged_decode_attention.
    Returns [T, N, H] in q's dtype, zeros in the rows past query_starts[P]. Rows before query_starts[0], where it is not
    0, are those of `out` (like q, written in place where XLA may): what paged_decode_attention made of them.
    """
    return either(
        *(q, kv_cache, jnp.int32(layer), block_tables, query_starts, context_lens, out),
        cuda=functools.partial(_prefill, scale=scale, fixed=fixed),
        default=functools.partial(reference.paged_prefill_attention, scale=scale),
    )


def _prefill(q, kv_cache, *args, scale: float, fixed: bool) -> jax.Array:
    if not fixed and common.is_hopper():
        from . import hopper_prefill  # late, here and below: Mosaic takes 0.3 s to import, and only a Hopper needs it

        if hopper_prefill.fits(q, kv_cache):
            return hopper_prefill.paged_prefill_attention(q, kv_cache, *args, scale=scale)
    return prefill.paged_prefill_attention(q, kv_cache, *args, scale=scale, fixed=fixed)


@functools.partial(kernel, static_argnames="dtype")
def fixed_matmul(x: jax.Array, weight: jax.Array, *, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x [T, D] @ weight [F, D].T in float32, rounded to dtype: [T, F].

    A row's result is the same to the last bit whatever T is, and whatever is in the other rows. Differentiable.
    """
    return _differentiable(matmul.fixed_matmul, reference.fixed_matmul, dtype=dtype)(x, weight)


@functools.partial(kernel, static_argnames=("eps", "fixed"))
def add_norm(
    x: jax.Array, delta: jax.Array, gain: jax.Array, eps: float, *, fixed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The residual sum, and its RMS norm as transformers rounds it: to x's dtype before the gain and after.

    x [T, D]; delta [S, T, D], parts of what is added, whose sum is rounded to x's dtype, or none of them; gain [D].
    Returns (x + that sum, its norm times gain), both [T, D]. Differentiable.
    """
    oracle = functools.partial(reference.add_norm, fixed=fixed)  # the kernel goes row by row anyway
    return _differentiable(norm.add_norm, oracle, eps=eps)(x, delta, gain)


@functools.partial(kernel, static_argnames=("eps", "axis"))
def all_reduce_norm(
    x: jax.Array, delta: jax.Array, gain: jax.Array, peers: Peers, eps: float, *, axis: str
) -> tuple[jax.Array, jax.Array]:
    """`add_norm` where each device of a mesh axis has a delta of its own, and all of them are added.

    x [T, D] and gain, the same on all devices; delta [S, T, D], whose sum is rounded to x's dtype on each device, and
    the sum of these once more. T is at most exchange.capacity. All devices call it for the same rows, in one order.
    """
    return either(
        *(x, delta, gain, peers),
        cuda=functools.partial(exchange.all_reduce_norm, eps=eps),
        default=functools.partial(reference.all_reduce_norm, eps=eps, axis=axis),
    )


@kernel
def row_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [1, D] @ weight [F, D].T in float32, rounded to x's dtype: [1, F]. For what `is_row` says. Differentiable."""
    return _differentiable(row.row_linear, reference.row_linear)(x, weight)


@functools.partial(kernel, static_argnames="eps")
def row_norm_linear(
    x: jax.Array, delta: jax.Array, gain: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """`add_norm` of one row and a linear layer of the norm, for what `is_row` says. Differentiable.

    x, delta [1, D]; gain [D]; weight [1, F, D], or [2, F, D] for SwiGLU: silu(first) * second.
    Returns (x + delta [1, D], the layer's output [1, F]).
    """
    return _differentiable(row.row_norm_linear, reference.row_norm_linear, eps=eps)(x, delta, gain, weight)


@functools.partial(kernel, static_argnames="dtype")
def few_linear(x: jax.Array, weight: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """A linear layer of a few rows in float32, for what `is_few_rows` says. Differentiable.

    x [T, D]; weight [1, F, D], or [2, F, D] for SwiGLU: silu(first) * second. Returns [1, T, F], rounded to dtype (None
    is x's), or where there are few features [S, T, F] float32, whose sum over S it is (`add_norm`, `whole`).
    """
    parts = few.parts_of(weight)
    dtype = jnp.dtype(jnp.float32 if parts > 1 else dtype or x.dtype)
    return _differentiable(few.few_linear, reference.few_linear, parts=parts, dtype=dtype)(x, weight)


def is_many_rows(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `swiglu` has a kernel here for x [T, D] and weights [2, F, D]."""
    if not common.is_hopper():
        return False
    from . import hopper_swiglu

    return hopper_swiglu.fits(x, weight)


@kernel
def swiglu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A gated linear layer, for what `is_many_rows` says: silu(x @ first.T) * (x @ second.T). Differentiable.

    x [T, D], weight [2, F, D], of one dtype, to which the products, silu and the result are rounded: [T, F].
    """
    from . import hopper_swiglu

    return _differentiable(hopper_swiglu.swiglu, reference.swiglu)(x, weight)


@functools.partial(kernel, static_argnames="sizes")
def split(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """x, of one dimension, cut into arrays of these sizes, whose sum is its own.

    These are copies, which are what other kernels can read.
    """
    return either(
        x,
        cuda=functools.partial(pieces.split, sizes=sizes),
        default=functools.partial(reference.split, sizes=sizes),
    )


@kernel
def adjust_logits(
    logits: jax.Array,
    sampling: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    token_counts: jax.Array,
    logit_bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Bias logits, mask what would end a text too early, and penalise what is there already, in the rows that ask.

    logits [R, V] float32; slots [R] int32: a row's sequence; positions [R] int32: of the token to be drawn. A row whose
    `adjusts` is 1 asks; below its `min_len` nothing may end the text. token_counts [S, V] int32: how often a token was
    generated in the low 24 bits, and the flags PROMPT (it is in the prompt) and ENDS (it would end the text);
    logit_bias [S, V] float32. The repetition penalty divides logits above 0 and multiplies the others, for tokens of
    prompt and text; then frequency times the count and, for tokens of the text, presence is taken off.
    Returns (the adjusted logits, the logits as they were), both [R, V]. The first is in place where XLA may; the second
    is undefined in rows that do not ask.
    """
    return either(
        *(logits, sampling, slots, positions, token_counts, logit_bias),
        cuda=adjust.adjust_logits,
        default=reference_sampling.adjust_logits,
    )


@functools.partial(kernel, static_argnames="fixed")
def sampling_threshold(logits: jax.Array, sampling: jax.Array, *, fixed: bool = False) -> jax.Array:
    """From which logit on a row is to be sampled, so that what min_p, top_k and top_p leave out is below it.

    logits [R, V] float32. Of a row's settings top_k is off at 0 and from V on, top_p at 1, min_p at 0.
    min_p keeps entries of at least min_p times the largest probability; top_k keeps the k largest and what equals the
    last of them; top_p keeps, of what the two leave, the fewest largest entries that have at least top_p of the
    probability, and what equals the last of them.
    Returns [R] float32, any number between the largest entry left out and the smallest one kept, itself included;
    -inf for rows that leave nothing out and rows of temperature 0.
    """
    return either(
        *(logits, sampling),
        cuda=functools.partial(threshold.sampling_threshold, fixed=fixed),
        default=reference_sampling.sampling_threshold,
    )


@kernel
def noisy_argmax(
    logits: jax.Array, sampling: jax.Array, positions: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best entry of each row's logits / temperature + Gumbel noise: a draw from softmax(logits / temperature).

    logits [R, V] float32; a temperature of 0 takes them as they are; positions [R] int32: of the token to be drawn. A
    row's noise is a function of its seed, its position and the entry's number; threshold [R] float32: entries below
    it are left out.
    Returns (entries [R] int32, of equal ones the lowest, their scores [R] float32). NaN and infinity are the largest,
    and where one of them is the best, the score is not finite. The noise is one on all machines up to 1e-5.
    """
    return either(
        *(logits, sampling, positions, threshold),
        cuda=noise.noisy_argmax,
        default=reference_sampling.noisy_argmax,
    )


@functools.partial(kernel, static_argnames="fixed")
def token_logprobs(
    logits: jax.Array, raw: jax.Array, sampling: jax.Array, tokens: jax.Array, *, fixed: bool = False
) -> jax.Array:
    """Natural log-probabilities of one token a row, and of the row's most likely tokens.

    logits, raw [R, V] float32, of which a row is read from raw where its `adjusts` is 1; tokens [R] int32. A row's
    `num_top` says how many of the most likely are asked for, at most MAX_LOGPROBS, or -1 if nothing is.
    Returns [R, 2, 1 + MAX_LOGPROBS] int32, one array as each is an output of the step: the token's rank (1 + how many
    are more likely), and the ids of the most likely, the best first, of equal ones the lower id; then as the bits of
    float32 the log-probabilities of the token and of these. Rows that ask nothing, and the places after num_top, hold
    anything.
    """
    return either(
        *(logits, raw, sampling, tokens),
        cuda=functools.partial(logprobs.token_logprobs, fixed=fixed),
        default=reference_sampling.token_logprobs,
    )
