"""Pallas kernel: Gumbel noise on logits and the best entry of each row, in one pass over the vocabulary.

Each program goes through some tiles of a row, and keeps in every lane the best that this has met. Logarithms are the
card's own, good to some 1e-6: with XLA's exact ones the pass takes four times as long as reading the logits.
Shapes: R rows, V vocabulary, P programs to a row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import by_assembly, pallas_call
from .sampling import noise_bits, row_key, settings, uniform
from .vocabulary import Tiles, default_tiles, fold_tiles

LN2 = 0.6931471805599453
BLOCK = 512  # entries to a tile, on an H200


def _log2(x: jax.Array, on_gpu: bool) -> jax.Array:
    return by_assembly("lg2.approx.ftz.f32 %out0, %x0;", x.dtype, x=x) if on_gpu else jnp.log2(x)


def _gumbel(bits: jax.Array, on_gpu: bool) -> jax.Array:
    """reference_sampling.gumbel's numbers. The card's logarithm has few digits near 1, so a series is there instead."""
    u = uniform(bits)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u / 5))))
    exponential = jnp.where(u < 1 / 16, series, _log2(1 - u, on_gpu) * -LN2)
    return _log2(exponential, on_gpu) * -LN2


def _noisy_argmax_kernel(*refs, tiles: Tiles, on_gpu: bool):
    logits_ref, sampling_ref, position_ref, threshold_ref, best_ref, entry_ref = refs
    program, row, vocab = pl.program_id(0), pl.program_id(1), logits_ref.shape[1]
    [temperature], threshold = settings(sampling_ref, ["temperature"], row), threshold_ref[row]
    key, scale = row_key(sampling_ref, position_ref, row), 1 / temperature
    lane = jnp.arange(tiles.block, dtype=jnp.int32)

    def take_in(tile, state):
        best, best_entry = state
        entry = tile * tiles.block + lane
        x = plgpu.load(logits_ref.at[row, pl.ds(tile * tiles.block, tiles.block)], mask=entry < vocab, other=-jnp.inf)

        def noisy():
            return x * scale + _gumbel(noise_bits(key, entry.astype(jnp.uint32)), on_gpu)

        # Noise takes longer than reading the logits: greedy rows, which padding is too, do without.
        score = jnp.where(x < threshold, -jnp.inf, lax.cond(temperature == 0, lambda: x, noisy))
        score = jnp.where(score == score, score, jnp.inf)  # NaN is as large as infinity
        return jnp.where(score > best, score, best), jnp.where(score > best, entry, best_entry)

    start = jnp.full(lane.shape, -jnp.inf, jnp.float32), program * tiles.block + lane
    best, entry = fold_tiles(program, vocab, tiles, take_in, start)
    highest = best.max(axis=0)
    best_ref[row, program] = highest
    entry_ref[row, program] = jnp.where(best == highest, entry, vocab).min(axis=0)


def noisy_argmax(
    logits: jax.Array,
    sampling: jax.Array,
    positions: jax.Array,
    threshold: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.noisy_argmax as one kernel, and a reduction by XLA to the best of a row's programs."""
    rows, vocab = logits.shape
    tiles = tiles or default_tiles(rows, vocab, BLOCK)
    shape = rows, tiles.programs
    best, entry = pallas_call(
        _noisy_argmax_kernel,
        *(logits, sampling, positions, threshold),
        grid=(tiles.programs, rows),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        num_warps=tiles.num_warps,
        interpret=interpret,
        tiles=tiles,
        on_gpu=not interpret,
    )
    highest, entry = lax.reduce((best, entry), (jnp.float32(-jnp.inf), jnp.int32(vocab)), _better, dimensions=[1])
    return entry, highest


def _better(one, other):
    """Of two (score, entry) the one with the higher score, of equal ones the lower entry."""
    (score, entry), (others_score, others_entry) = one, other
    others = (others_score > score) | ((others_score == score) & (others_entry < entry))
    return jnp.where(others, others_score, score), jnp.where(others, others_entry, entry)
