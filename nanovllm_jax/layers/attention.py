"""What a decoder layer may attend with: a paged cache when serving, plain causal attention when training.

An `attend` is called as attend(qkv, q_norm, k_norm, cos, sin, cache) -> (output [..., N, H], cache). It gets the raw
projection qkv [..., K, G + 2, H] (each kv head's queries, key and value together), since normalising, rotating and
storing them is one kernel when serving. One with a cache, of all layers, is asked for each layer's own:
attend.of_layer(number). N query heads, K kv heads, G = N / K, H head_dim, L layers, R rows (sequences), T tokens, W
table width.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_jax.kernels import norm_rope_store, paged_decode_attention, paged_prefill_attention, store_and_decode
from nanovllm_jax.kernels.reference import rope
from nanovllm_jax.layers.norm import RMSNorm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedAttention:
    """Attention of one step against the paged cache; rows are first those that decode, right behind them prefills."""

    slot_mapping: jax.Array
    """[T] int32: block * block_size + offset where a token's key and value go, -1 for padding."""
    tables: jax.Array
    """[R, W] int32 block ids."""
    context_lens: jax.Array
    """[R] int32 tokens in the cache with the new ones, 0 for padding."""
    starts: jax.Array
    """[R + 1] int32: row r's new tokens are starts[r] to starts[r + 1] of the T."""
    num_decodes: jax.Array | None
    """[1] int32: how many of the rows, the first ones, decode, which have one new token each; None: none do."""
    prefill_rows: int = field(metadata={"static": True})
    """How many of the others, at most, prefill: P."""
    newest: jax.Array | None = None
    """[R] int32: each row's last token, if the output is to be of these alone."""
    layer: jax.Array | int = 0
    """int32: the layer's number. Blocks and slots are the same for all."""
    deterministic: bool = field(default=False, metadata={"static": True})
    """A token's output is then the same to the last bit in whatever batch and chunk: all go through one kernel."""

    def of_layer(self, number: int) -> "PagedAttention":
        """What layer `number` (from 0) attends with."""
        return replace(self, layer=np.int32(number))

    def __call__(
        self, qkv, q_norm: RMSNorm, k_norm: RMSNorm, cos, sin, cache: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """qkv [T, K, G + 2, H] -> output [T, N, H] and the cache with the new keys and values stored.

        cache [2, L, num_blocks, K, block_size, H]: keys, and values. If the output is of the newest, [R, N, H].
        """
        gains, angles = (q_norm.weight[...], k_norm.weight[...]), (cos[:, 0], sin[:, 0])
        new, scale, eps = (qkv, *gains, *angles, self.slot_mapping), qkv.shape[-1] ** -0.5, q_norm.eps
        tables, lens, starts = self.tables, self.context_lens, self.starts
        if not (self.prefill_rows or self.deterministic):
            return store_and_decode(*new, cache, self.layer, tables, lens, scale=scale, eps=eps)
        q, cache = norm_rope_store(*new, cache, self.layer, eps=eps, fixed=self.deterministic)
        cached = cache, self.layer
        if self.newest is not None:
            q, starts = q[self.newest], jnp.arange(len(tables) + 1)
        if self.deterministic:  # a decode row is a chunk of one token
            return paged_prefill_attention(q, *cached, tables, starts, lens, scale=scale, fixed=True), cache
        if self.newest is not None:
            return paged_decode_attention(q, *cached, tables, lens, scale=scale), cache
        out = None
        if self.num_decodes is not None:
            out = paged_decode_attention(q, *cached, *self._decodes(), scale=scale)
        # The two share q and out: cutting and joining would copy them.
        return paged_prefill_attention(q, *cached, *self._prefills(), out, scale=scale), cache

    def _decodes(self) -> tuple[jax.Array, jax.Array]:
        """Tables and context lengths of all rows, as if those that do not decode were padding."""
        return self.tables, jnp.where(jnp.arange(len(self.tables)) < self.num_decodes, self.context_lens, 0)

    def _prefills(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tables [P, W], starts [P + 1] and context lengths [P] of as many rows as may prefill, behind the decodes."""
        if self.num_decodes is None:
            return self.tables, self.starts, self.context_lens
        rows = jnp.minimum(self.num_decodes + jnp.arange(self.prefill_rows + 1), len(self.tables))
        own = jnp.minimum(rows[:-1], len(self.tables) - 1)  # beyond the last row there are no tokens
        return self.tables[own], self.starts[rows], self.context_lens[own]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalAttention:
    """Every token attends to itself and those before it; nothing is cached. For training and scoring whole texts.

    A pytree (of no arrays), as a jitted layer is called with it.
    """

    def __call__(self, qkv, q_norm: RMSNorm, k_norm: RMSNorm, cos, sin, cache: None) -> tuple[jax.Array, None]:
        """qkv [..., T, K, G + 2, H] -> output [..., T, N, H]."""
        heads, length, implementation = split_norm_rope(qkv, q_norm, k_norm, cos, sin), qkv.shape[-4], "xla"
        if cudnn_attends(heads[0]):
            # To a length that it is known to do: with 129 tokens gradients failed, with multiples of 16 they did not.
            # No query sees what comes after it.
            implementation = "cudnn"
            heads = [jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (0, -length % 16), (0, 0), (0, 0)]) for x in heads]
        elif qkv.dtype == jnp.float16 and jax.default_backend() == "cpu":  # for which XLA has no such product
            heads = [x.astype(jnp.float32) for x in heads]
        out = jax.nn.dot_product_attention(*heads, is_causal=True, implementation=implementation)
        return out[..., :length, :, :].astype(qkv.dtype), None


def cudnn_attends(q: jax.Array) -> bool:
    """Whether cuDNN has flash attention, forward and backward, for such queries."""
    on_gpu, head_dim = jax.default_backend() == "gpu", q.shape[-1]
    return on_gpu and q.dtype.itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0


def split_norm_rope(qkv, q_norm: RMSNorm, k_norm: RMSNorm, cos, sin) -> tuple[jax.Array, jax.Array, jax.Array]:
    """qkv [..., T, K, G + 2, H] -> normalised and rotated q [..., T, N, H] and k [..., T, K, H], and v like k."""
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    # Reshaped last: cut, reshaped and then normalised, XLA (jaxlib 0.11.2, H100) read other heads' numbers (G = 3, 5).
    q = rope(q_norm(q), cos[..., None, :], sin[..., None, :])
    return q.reshape(*q.shape[:-3], -1, q.shape[-1]), rope(k_norm(k), cos, sin), v


causal_attention = CausalAttention()
