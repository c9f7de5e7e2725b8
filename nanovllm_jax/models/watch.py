"""A probe at work: the layers of one tracing of the model, with the user's functions between them."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.models.qwen3 import DecoderLayer, run_layer
from nanovllm_jax.probe import Probe


class Watch:
    """One tracing of the model under a probe: it runs the layers, and holds what it took out."""

    def __init__(self, probe: Probe, model: nnx.Module, steering: jax.Array):
        """`steering`: [T, K] float32, what each token's request brought."""
        self.probe, self.model, self.steering = probe, model, steering
        self.captured: dict[str, jax.Array] = {}

    def run_layer(self, number: int, layer: DecoderLayer, residual: jax.Array, x: jax.Array, cos, sin, cache, attend):
        """models.qwen3.run_layer, with this probe's functions around the halves of the layer."""
        if not self.probe.watches(number):
            return run_layer(number, layer, residual, x, cos, sin, cache, attend)
        residual, x, cache = layer.attention_half(residual, x, cos, sin, cache, attend)
        self.take(f"attention.{number}", x)
        residual, x = layer.mlp_half(residual, x)
        stream = residual + x
        if edit := self.probe.edit.get(f"residual.{number}"):
            stream = edit(stream, self.steering).astype(x.dtype)
            residual, x = stream, jnp.zeros_like(x)
        self.take(f"residual.{number}", stream)
        return residual, x, cache

    def take(self, place: str, x: jax.Array) -> None:
        """Keep x [rows, ...], or what the user's function makes of it, if the place is one to take out."""
        if place in self.probe.capture:
            function = self.probe.capture[place]
            self.captured[place] = x if function is None else function(self.model, x)
