"""Qwen3 (dense), true to transformers' Qwen3ForCausalLM.

Shapes: T tokens (any leading dimensions), N query heads, K kv heads (their copies included), G = N / K, H head_dim,
D hidden, F mlp, V vocab; on a device of several, its parts of N, K, F and V. What layers hand on is S parts of a sum.
Modules carry logical axis names only; `parallel.sharding` maps them to a mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.kernels import Peers
from nanovllm_jax.layers.embedding import Embedding
from nanovllm_jax.layers.linear import GatedLinear, Linear, Parts
from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.layers.rope import rope_angles
from nanovllm_jax.parallel.sharding import is_split

ADDED_SIZE = 8192 * 1024  # a residual stream of so many numbers is added to by matmuls, and not by norms
Attend = Callable  # attend(qkv, q_norm, k_norm, cos, sin, cache) -> (output, cache); see layers.attention


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, fixed: bool):
        c, group = config, config.num_attention_heads // config.kv_heads
        options = dict(use_bias=c.attention_bias, dtype=dtype, rngs=rngs, fixed=fixed)
        # Each kv head's queries, key and value lie together, so that a shard of kv heads is one slice.
        self.qkv_proj = Linear(
            c.hidden_size,
            (c.kv_heads, group + 2, c.head_dim),
            axes=("kv_heads", None, None, "embed"),
            **options,
        )
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, (c.hidden_size,), axes=("embed", "heads"), **options)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype)

    def __call__(self, norm: RMSNorm, residual: jax.Array, delta: Parts, cos, sin, cache, attend: Attend):
        """residual [T, D], and what is to be added -> their sum, the attention over its norm in parts, the cache.

        The parts are of those tokens whose output `attend` returns.
        """
        residual, qkv = self.qkv_proj.of_sum(norm, residual, delta)  # (T, K, G + 2, H)
        with jax.named_scope("attend"):
            out, cache = attend(qkv, self.q_norm, self.k_norm, cos, sin, cache)  # (T, N, H)
        return residual, self.o_proj.parts(out.reshape(*out.shape[:-2], -1), delta.peers), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, fixed: bool):
        d, f, options = config.hidden_size, config.intermediate_size, dict(dtype=dtype, rngs=rngs, fixed=fixed)
        self.gate_up_proj = GatedLinear(d, (2, f), axes=(None, "mlp", "embed"), **options)
        self.down_proj = Linear(f, (d,), axes=("embed", "mlp"), **options)

    def __call__(self, norm: RMSNorm, residual: jax.Array, delta: Parts) -> tuple[jax.Array, Parts]:
        """residual [T, D], and what is to be added -> their sum, and what the layers make of its norm, in parts too."""
        residual, gated = self.gate_up_proj.of_sum(norm, residual, delta)  # (T, F)
        return residual, self.down_proj.parts(gated, delta.peers)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, fixed: bool):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs, fixed=fixed)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs, fixed=fixed)

    def __call__(self, residual: jax.Array, delta: Parts, cos: jax.Array, sin: jax.Array, cache, attend: Attend):
        """The residual stream as [T, D] and what is still to be added -> the same after this layer, and the cache.

        delta comes in parts [S, T, D], for the next norm to add up, of a large stream none.
        """
        residual, delta, cache = self.attention_half(residual, delta, cos, sin, cache, attend)
        residual, delta = self.mlp_half(*self.added(residual, delta))
        return *self.added(residual, delta), cache

    def of_rows(self, rows: jax.Array, residual: jax.Array, delta: Parts, cos, sin, cache, attend: Attend):
        """As a call, but of all tokens only keys and values, and the rest for `rows` [R], for which `attend` is.

        Returns the residual stream [T, D] before this layer too: (it, the stream [R, D], what is to be added, cache).
        """
        before, delta, cache = self.attention_half(residual, delta, cos, sin, cache, attend)
        return before, *self.mlp_half(before[rows], delta), cache

    def added(self, residual: jax.Array, delta: Parts) -> tuple[jax.Array, Parts]:
        """The same stream, a large one with nothing to be added.

        There cuBLAS adds while it multiplies, and the norm reads one array: but not for deterministic layers, which
        have a kernel of their own, and not where other devices have parts of the sum.
        """
        by_cublas = self.mlp.down_proj.is_plain and not is_split()
        if residual.size >= ADDED_SIZE and by_cublas and len(delta.here) == 1:
            return residual + delta.here[0], Parts(delta.here[:0])
        return residual, delta

    @jax.named_scope("attention")
    def attention_half(self, residual: jax.Array, delta: Parts, cos, sin, cache, attend: Attend):
        """The first half of a layer: the delta that comes back is the attention's output."""
        return self.self_attn(self.input_layernorm, residual, delta, cos, sin, cache, attend)

    @jax.named_scope("mlp")
    def mlp_half(self, residual: jax.Array, delta: Parts) -> tuple[jax.Array, Parts]:
        """The second half."""
        return self.mlp(self.post_attention_layernorm, residual, delta)


class Stream(NamedTuple):
    """What one layer hands on to the next."""

    residual: jax.Array
    """[T, D],"""
    delta: Parts
    """and what is still to be added to it."""
    cos: jax.Array
    """[T, 1, H / 2] float32,"""
    sin: jax.Array
    """of the tokens' positions."""


# A module is a pytree, and the layers differ only in their arrays: the inner jit traces one of them for all.
_run_layer = jax.jit(DecoderLayer.__call__)


def run_layer(number: int, layer: DecoderLayer, residual: jax.Array, delta: Parts, cos, sin, cache, attend: Attend):
    """How a model runs its layer `number` (from 0), unless it is told another way."""
    return _run_layer(layer, residual, delta, cos, sin, cache, attend)


_run_rows = jax.jit(DecoderLayer.of_rows)


class Qwen3ForCausalLM(nnx.Module):
    """The whole model. Serving and training run the same modules; `attend` is what differs."""

    def __init__(
        self, config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs, deterministic: bool = False
    ):
        """`deterministic`: a token's numbers do not depend, to the last bit, on what else is computed with it."""
        self.config, self.deterministic = config, deterministic
        options = dict(dtype=dtype, rngs=rngs, fixed=deterministic)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **options)
        self.layers = nnx.List([DecoderLayer(config, **options) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, **options)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any,
        attend: Attend,
        run_layer: Callable = run_layer,
        peers: Peers | None = None,
    ):
        """tokens, positions [T] int32 -> hidden states [T, D] after the last norm, and the cache of all layers.

        `cache` is None where `attend` needs none (`causal_attention`). `run_layer` is for those who want to do more at
        each layer: look inside, or forget activations and compute them again. `peers`: how a device of several finds
        the others, for the norms to add up what each of them has, where T is small.
        """
        stream = self._start(tokens, positions, peers)
        stream, cache = self._through(self.layers, stream, cache, attend, run_layer)
        return self._end(stream.residual, stream.delta), cache

    def of_rows(
        self,
        rows: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any,
        attend: Attend,
        attend_of_rows: Attend,
        peers: Peers | None = None,
    ):
        """As a call, but hidden states [R, D] of `rows` [R] alone: all that is left out is in the last layer.

        `attend_of_rows`: for that one. Returns (hidden, the residual stream [T, D] before the last layer, the cache).
        """
        *others, last = self.layers
        stream = self._start(tokens, positions, peers)
        stream, cache = self._through(others, stream, cache, attend, run_layer)
        before, *rest, cache = _run_rows(last, rows, *stream, cache, attend_of_rows.of_layer(len(others)))
        return self._end(*rest), before, cache

    def from_last_layer(self, residual: jax.Array, positions: jax.Array, cache, attend: Attend):
        """The residual stream [T, D] before the last layer -> hidden states [T, D] after the last norm, the cache."""
        *others, last = self.layers
        nothing = Parts(last.mlp.down_proj.no_parts(residual.shape[:-1]))
        stream = self._stream(residual, nothing, positions)
        *rest, cache = _run_layer(last, *stream, cache, attend.of_layer(len(others)))
        return self._end(*rest), cache

    def _start(self, tokens: jax.Array, positions: jax.Array, peers: Peers | None) -> Stream:
        """What comes before the first layer: where there are peers, all of it is to be added."""
        down_proj = self.layers[0].mlp.down_proj
        if peers is None:
            residual, delta = self.embed_tokens(tokens), Parts(down_proj.no_parts(tokens.shape))
        else:
            own, nothing = self.embed_tokens.own(tokens), down_proj.no_parts(tokens.shape, peers)
            residual, delta = jnp.zeros_like(own), Parts(nothing.at[0].set(own.astype(nothing.dtype)), peers)
        return self._stream(residual, delta, positions)

    def _stream(self, residual: jax.Array, delta: Parts, positions: jax.Array) -> Stream:
        """What a layer is given."""
        angles = rope_angles(positions, self.config.rope, self.config.head_dim)
        return Stream(*self.layers[0].added(residual, delta), *angles)

    @staticmethod
    def _through(layers, stream: Stream, cache, attend: Attend, run_layer: Callable) -> tuple[Stream, Any]:
        """Through the first of the model's layers, or all of them."""
        for number, layer in enumerate(layers):
            own = attend if cache is None else attend.of_layer(number)
            residual, delta, cache = run_layer(number, layer, *stream, cache, own)
            stream = stream._replace(residual=residual, delta=delta)
        return stream, cache

    def _end(self, residual: jax.Array, delta: Parts) -> jax.Array:
        """The last norm."""
        return self.norm.add(residual, delta, fixed=self.deterministic)[1]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> [..., V] float32."""
        return (self.lm_head or self.embed_tokens).attend(hidden)
