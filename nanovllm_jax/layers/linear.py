"""Linear layers: weights stored [out..., in], as in Hugging Face checkpoints."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nanovllm_jax import kernels
from nanovllm_jax.kernels import Peers
from nanovllm_jax.kernels.common import with_rank
from nanovllm_jax.parallel.sharding import is_summed_over, sum_over

STDDEV = 0.02  # of random weights, as Qwen3's initializer_range
# On an H200 cuBLAS is faster where it need not add halves of sums up, for so many rows of 0.6B to 8B.
HALVED_ROWS, HALVED_FEATURES = range(17, 257), 4096


class Parts(NamedTuple):
    """What is still to be added to the residual stream, which the next norm does as it reads it."""

    here: jax.Array
    """[S, ..., features]: its sum over S, rounded; float32 where there are several."""
    peers: Peers | None = None
    """If given, each of these devices has a sum of its own, and theirs is what is to be added."""


def param(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter whose dimensions carry logical axis names; `parallel.sharding` maps them to a mesh."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def matmul(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., D] times weight [*F, D] transposed -> [..., *F], accumulated in float32.

    float32 inputs use full-precision products: on a GPU the default would be TF32.
    """
    if kernels.is_few_rows(x, weight):
        parts = kernels.few_linear(x, weight.reshape(1, -1, weight.shape[-1]), dtype=out_dtype)
        return kernels.whole(parts, out_dtype or x.dtype).reshape(-1, *weight.shape[:-1])
    features = weight.reshape(-1, weight.shape[-1])  # of more dimensions XLA for a CPU would transpose it, each time
    if out_dtype is None and kernels.is_row(x, weight, normed=False):
        return kernels.row_linear(x, features).reshape(1, *weight.shape[:-1])
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(x, features, contract, precision=precision, preferred_element_type=out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], *weight.shape[:-1])


def _is_halved(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `_halved_matmul` is for x [T, D] and weight [F, D]."""
    rows_are_few = x.ndim == 2 and len(x) in HALVED_ROWS
    return rows_are_few and x.dtype.itemsize == 2 and x.shape[1] % 2 == 0 and len(weight) <= HALVED_FEATURES


def _halved_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, D] times weight [F, D] transposed, as the products of both halves of D: [2, T, F] float32."""
    x, weight = (array.reshape(len(array), 2, -1) for array in (x, weight))
    return lax.dot_general(x, weight, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.float32)


def fixed_matmul(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`matmul` in which a row's result is the same to the last bit whatever the other rows, and however many."""
    rows, features = x.reshape(-1, x.shape[-1]), weight.reshape(-1, weight.shape[-1])
    y = kernels.fixed_matmul(rows, features, dtype=jnp.dtype(out_dtype or x.dtype))
    return y.reshape(*x.shape[:-1], *weight.shape[:-1])


class Linear(nnx.Module):
    """y = x @ weight.T (+ bias). One output may be several dimensions: [..., in] -> [..., *out]."""

    products = 1  # of which the output is made

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        use_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        fixed: bool = False,
    ):
        """`axes` names the output dimensions' logical axes, then the input's. `fixed`: see `fixed_matmul`."""
        self.fixed = fixed
        shape = (*out_features, in_features)
        self.in_axis = axes[-1]
        self.weight = param(STDDEV * jax.random.normal(rngs.params(), shape, dtype), *axes)
        self.bias = param(jnp.zeros(out_features, dtype), *axes[:-1]) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., *out]."""
        product = fixed_matmul if self.fixed else matmul
        y = sum_over(self.in_axis, product(x, self.weight[...]))
        return y if self.bias is None else y + with_rank(self.bias[...], y.ndim)

    @property
    def is_plain(self) -> bool:
        """Whether there are kernels for this layer: a product as `matmul` makes it, and no bias."""
        return not self.fixed and self.bias is None

    def parts(self, x: jax.Array, peers: Peers | None = None) -> Parts:
        """x [..., in] -> what this layer gives, in parts [S, ..., *out]: for `of_sum` of the next one.

        `peers`: the devices that have the other parts of `in`, where it is left to the next layer to add theirs.
        """
        weight = self.weight[...]
        if self.is_plain and weight.ndim == 2 and (peers or not is_summed_over(self.in_axis)):
            if kernels.is_few_rows(x, weight):
                here = kernels.few_linear(x, weight[None])
            else:
                here = _halved_matmul(x, weight) if _is_halved(x, weight) else matmul(x, weight)[None]
            return Parts(here, peers)
        return Parts(self(x)[None])

    def no_parts(self, leading: tuple[int, ...], peers: Peers | None = None) -> jax.Array:
        """Zeros like those that `parts` of x [*leading, in] has here."""
        x = jax.ShapeDtypeStruct((*leading, self.weight.shape[-1]), self.weight.dtype)
        return jnp.zeros_like(jax.eval_shape(lambda x: self.parts(x, peers).here, x))

    def of_sum(self, norm: nnx.Module, x: jax.Array, delta: Parts) -> tuple[jax.Array, jax.Array]:
        """x [..., in] and what is to be added to it -> their sum, and this layer of the sum's norm (an RMSNorm)."""
        weight = self.weight[...]
        if delta.peers is None and self.is_plain and kernels.is_row(x, weight, normed=True):
            matrices = weight.reshape(self.products, -1, weight.shape[-1])
            total, y = kernels.row_norm_linear(x, delta.here[0], norm.weight[...], matrices, norm.eps)
            return total, y.reshape(1, *weight.shape[self.products - 1 : -1])
        total, normed = norm.add(x, delta, fixed=self.fixed)
        return total, self(normed)


class GatedLinear(Linear):
    """SwiGLU (Shazeer 2020), silu(gate(x)) * up(x): weights [2, out, in], and x [..., in] -> [..., out]."""

    products = 2

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        weight = self.weight[...]
        if self.is_plain:
            if kernels.is_few_rows(x, weight):
                return kernels.few_linear(x, weight)[0]
            if kernels.is_many_rows(x, weight):
                return kernels.swiglu(x, weight)
        gate_up = super().__call__(x)  # (..., 2, out)
        return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
