"""Rotary position embedding (Su et al., 2021) with linear and YaRN (Peng et al., 2023) context extension."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings, under the names of config.json's `rope_parameters`."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    """default, linear or yarn."""
    factor: float = 1.0
    """How many times longer the context is than the one trained on."""
    original_max_position_embeddings: int = 0
    """The context length trained on (yarn)."""
    attention_factor: float | None = None
    """Scale of cos and sin (yarn); None computes the paper's 0.1 ln(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def scale(self) -> float:
        """The factor on cos and sin: 1 but for yarn."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def magnitude(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Rotation in radians per token of each pair of dimensions: [head_dim / 2] float32."""
    frequencies = 1.0 / rope.rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "yarn":
        keep = _yarn_keep(rope, head_dim)
        frequencies = frequencies / rope.factor * (1 - keep) + frequencies * keep
    return frequencies.astype(np.float32)


def _yarn_keep(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Share of each dimension's original frequency that YaRN keeps: 1 for fast ones, 0 for slow ones."""

    def dimension_of(rotations: float) -> float:
        ratio = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)


def rope_angles(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """positions [...] int32 -> cos and sin [..., 1, head_dim / 2] float32, broadcast over heads."""
    frequencies = np.expand_dims(inverse_frequencies(rope, head_dim), tuple(range(positions.ndim + 1)))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale
