"""What the kernels over rows of logits share: the vocabulary in groups of entries, and who reads which.

A first kernel reads a row once, in many programs, and leaves each group's maximum; a second one, with a program a row,
reads only the groups whose maxima say that they matter. Shapes: R rows, V vocabulary, C = V / GROUP groups, rounded up.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

GROUP = 128  # entries: a power of two
PROGRAMS = 2048  # that a pass over all rows is cut into, about: as many as the GPU runs at a time


class Tiles(NamedTuple):
    """How a pass over rows is cut: entries to a tile, programs to a row, a program's warps."""

    block: int
    programs: int
    num_warps: int


def default_tiles(rows: int, vocab: int, block: int = 2048) -> Tiles:
    """Settings for an H200."""
    return Tiles(block, min(pl.cdiv(vocab, block), max(1, PROGRAMS // rows)), num_warps=4)


def as_two_rows(kernel: Callable, *args: jax.Array) -> jax.Array:
    """kernel(*args) of one row, by the code that several rows take.

    Of a grid of one row the compiler knows that more addresses are aligned, and gives each thread four neighbours of a
    sum in place of one: on an H200 log probabilities of a row alone were seen to differ in the last bit.
    """
    return kernel(*(jnp.repeat(x, 2, axis=0) for x in args))[:1]


def groups_of(vocab: int) -> int:
    """C."""
    return pl.cdiv(vocab, GROUP)


def fold_tiles(program, vocab: int, tiles: Tiles, take_in: Callable, state):
    """take_in(tile, state) -> state for the tiles of a row that are one program's, of the row's `tiles.programs`."""
    left = pl.cdiv(vocab, tiles.block) - program
    return lax.fori_loop(
        0, pl.cdiv(left, tiles.programs), lambda i, state: take_in(program + i * tiles.programs, state), state
    )


def for_each_tile(program, vocab: int, tiles: Tiles, do: Callable) -> None:
    """do(tile) for these tiles."""
    fold_tiles(program, vocab, tiles, lambda tile, _: do(tile), None)


def grouped(tile, block: int) -> tuple[jax.Array, jax.Array]:
    """(groups [N], entries [N, GROUP]) of a tile, those past the vocabulary included."""
    groups = tile * (block // GROUP) + jnp.arange(block // GROUP)
    return groups, groups[:, None] * GROUP + jnp.arange(GROUP)[None]
