"""A model as what compiled programs are called with."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nanovllm_jax.kernels import split
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM


class FlatModel:
    """A model's arrays in one order (its leaves), and as a program's arguments, which are fewer.

    For each argument of a call the host takes a microsecond. Half of a model's arrays are vectors, the gains of its
    norms, with a thousandth of its numbers: as arguments they are one array.
    """

    def __init__(self, model: Qwen3ForCausalLM):
        """`model` has shapes with their shardings in place of arrays. (Vectors are whole on every device.)"""
        self.shapes, self.treedef = jax.tree.flatten(model)
        vectors, others = _apart(self.shapes)
        self._sizes = tuple(vector.size for vector in vectors)
        self._joined = jax.ShapeDtypeStruct((sum(self._sizes),), vectors[0].dtype, sharding=vectors[0].sharding)
        self.arguments = [*others, self._joined]
        """Shapes and shardings of what `pack` makes of leaves."""

    def pack(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """A program's arguments: the large arrays themselves, and a copy of the vectors."""
        vectors, others = _apart(leaves)
        return [*others, _join(vectors, self._joined.sharding)]

    def model(self, arguments: Sequence[jax.Array]) -> Qwen3ForCausalLM:
        """The model, inside a program."""
        *others, joined = arguments
        others, vectors = iter(others), iter(split(joined, self._sizes))
        leaves = [next(vectors if _is_vector(shape) else others) for shape in self.shapes]
        return jax.tree.unflatten(self.treedef, leaves)


def _is_vector(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return len(leaf.shape) == 1


def _apart(leaves: Sequence) -> tuple[list, list]:
    """The vectors, and all others."""
    return [leaf for leaf in leaves if _is_vector(leaf)], [leaf for leaf in leaves if not _is_vector(leaf)]


@partial(jax.jit, static_argnums=1)
def _join(vectors: list[jax.Array], sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.concatenate(vectors), sharding)
