"""The training path on a GPU: cuDNN attention in 16 bits, against float32 products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanovllm_jax.checkpoints.load import TINY_MODEL, load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.parallel.sharding import make_mesh
from nanovllm_jax.training import cast, token_logprobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [48, 129])
def test_gradients_go_through_cudnn(length):
    model = load_model(TINY_MODEL, ModelConfig.from_pretrained(TINY_MODEL), dtype=jnp.float32, mesh=make_mesh(1))
    graph, params = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, 500, (8, length)).astype(np.int32)

    def gradient(dtype):
        def loss(params):
            return -jnp.mean(token_logprobs(nnx.merge(graph, cast(params, dtype)), tokens, remat=True))

        lowered = jax.jit(jax.grad(loss)).lower(params)
        gradients = lowered.compile()(params)
        return lowered.as_text(), jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradients)])

    (plain, exact), (fused, rounded) = gradient(jnp.float32), gradient(jnp.bfloat16)
    assert "fmha" not in plain
    assert "fmhaSoftmaxBackward" in fused
    assert rounded.dtype == jnp.float32
    cosine = jnp.vdot(exact, rounded) / jnp.linalg.norm(exact) / jnp.linalg.norm(rounded)
    assert cosine > 0.99
