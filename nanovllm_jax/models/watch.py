"""A probe at work: the layers of one tracing of the model, with the user's functions between them."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.kernels import whole
from nanovllm_jax.layers.linear import Parts
from nanovllm_jax.models.qwen3 import DecoderLayer, run_layer
from nanovllm_jax.probe import Probe


class Watch:
    """One tracing of the model under a probe: it runs the layers, and holds what it took out."""

    def __init__(self, probe: Probe, model: nnx.Module, steering: jax.Array):
        """`steering`: [T, K] float32, what each token's request brought."""
        self.probe, self.model, self.steering = probe, model, steering
        self.captured: dict[str, jax.Array] = {}

    def run_layer(self, number: int, layer: DecoderLayer, residual: jax.Array, delta: Parts, *args):
        """models.qwen3.run_layer, with this probe's functions around the halves of the layer."""
        if not self.probe.watches(number):
            return run_layer(number, layer, residual, delta, *args)
        assert delta.peers is None, "the parts of other devices would be missing"
        residual, delta, cache = layer.attention_half(residual, delta, *args)
        self.take(f"attention.{number}", whole(delta.here, residual.dtype))
        residual, delta = layer.mlp_half(residual, delta)
        stream = residual + whole(delta.here, residual.dtype)
        if edit := self.probe.edit.get(f"residual.{number}"):
            stream = edit(stream, self.steering).astype(stream.dtype)
            residual, delta = stream, Parts(jnp.zeros_like(delta.here))
        self.take(f"residual.{number}", stream)
        return residual, delta, cache

    def take(self, place: str, x: jax.Array) -> None:
        """Keep x [rows, ...], or what the user's function makes of it, if the place is one to take out."""
        if place in self.probe.capture:
            function = self.probe.capture[place]
            self.captured[place] = x if function is None else function(self.model, x)
