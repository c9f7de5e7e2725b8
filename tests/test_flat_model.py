"""A model's arrays as a program's arguments, and back inside it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import SMALL

from nanovllm_jax.models.flat_model import FlatModel
from nanovllm_jax.models.parameters import abstract_model
from nanovllm_jax.parallel.sharding import make_mesh


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(tie_word_embeddings=False, attention_bias=True)], ids=["tied", "biased"])
def test_vectors_go_as_one_array_and_all_comes_back(options, dtype):
    config = replace(SMALL, **options)
    flat = FlatModel(abstract_model(config, jnp.dtype(dtype), make_mesh(1))[0])
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.standard_normal(shape.shape), shape.dtype) for shape in flat.shapes]
    arguments = flat.pack(leaves)
    assert len(arguments) <= len(leaves) - 4 * config.num_hidden_layers  # which has four norms, and there is one more
    for given, shape in zip(arguments, flat.arguments, strict=True):
        assert (given.shape, given.dtype) == (shape.shape, shape.dtype)
        assert given.sharding.is_equivalent_to(shape.sharding, given.ndim)
    large = {id(leaf) for leaf in leaves if leaf.ndim > 1}
    assert {id(given) for given in arguments[:-1]} == large, "what is large is not copied"
    model = jax.jit(flat.model)(arguments)
    assert jax.tree.structure(model) == flat.treedef
    for leaf, want in zip(jax.tree.leaves(model), leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want))
