"""Pallas kernel: bias, mask and penalties, in place. Shapes: R rows, V vocabulary, S slots."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .common import pallas_call
from .sampling import PENALTIES, adjusted, settings
from .vocabulary import Tiles, default_tiles, for_each_tile


def _adjust_kernel(*refs, tiles: Tiles):
    x_ref, sampling_ref, slot_ref, position_ref, counts_ref, bias_ref, out_ref, raw_ref = refs
    row, program, vocab = pl.program_id(0), pl.program_id(1), x_ref.shape[1]
    asks, min_len, *penalties = settings(sampling_ref, ("adjusts", "min_len", *PENALTIES), row)

    @pl.when(asks > 0)
    def _():
        slot, too_early = slot_ref[row], position_ref[row] < min_len

        def adjust(tile):
            at = pl.ds(tile * tiles.block, tiles.block)
            live = tile * tiles.block + jnp.arange(tiles.block) < vocab
            x = plgpu.load(x_ref.at[row, at], mask=live, other=0)
            counts = plgpu.load(counts_ref.at[slot, at], mask=live, other=0)
            bias = plgpu.load(bias_ref.at[slot, at], mask=live, other=0)
            plgpu.store(raw_ref.at[row, at], x, mask=live)
            plgpu.store(out_ref.at[row, at], adjusted(x, counts, bias, too_early, *penalties), mask=live)

        for_each_tile(program, vocab, tiles, adjust)


def adjust_logits(
    logits: jax.Array,
    sampling: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    token_counts: jax.Array,
    logit_bias: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """nanovllm_jax.kernels.adjust_logits as one kernel, with the logits aliased to its first result."""
    rows, vocab = logits.shape
    tiles = tiles or default_tiles(rows, vocab)
    out, raw = pallas_call(
        _adjust_kernel,
        *(logits, sampling, slots, positions, token_counts, logit_bias),
        grid=(rows, tiles.programs),
        out_shape=[jax.ShapeDtypeStruct(logits.shape, logits.dtype)] * 2,
        aliases={0: 0},
        num_warps=tiles.num_warps,
        interpret=interpret,
        tiles=tiles,
    )
    return out, raw
