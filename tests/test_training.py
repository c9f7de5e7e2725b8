"""The training path: log probabilities and gradients of the served modules, against transformers' autograd."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_model import SMALL

from nanovllm_jax.checkpoints.huggingface import parameter_sources
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.layers.attention import causal_attention
from nanovllm_jax.layers.embedding import Embedding
from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.layers.rope import RopeConfig, rope_angles
from nanovllm_jax.models import qwen3
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.sharding import make_mesh
from nanovllm_jax.training import cast, token_logprobs

LENGTHS = (23, 9, 17)


@pytest.fixture(scope="module")
def case(checkpoint):
    """(model, transformers model) with the same float32 weights, biases among them."""
    directory, reference = checkpoint("group5_bias")
    config = ModelConfig.from_pretrained(directory)
    return load_model(directory, config, dtype=jnp.float32, mesh=make_mesh(1)), reference


def padded_batch():
    """Tokens [3, 23] padded at their ends, and which of them are learned."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 319, (len(LENGTHS), max(LENGTHS)))
    learned = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]) & (np.arange(max(LENGTHS)) >= 4)
    return tokens, learned


def loss(params, graph, tokens, learned, dtype=jnp.float32, **options):
    logprobs = token_logprobs(nnx.merge(graph, cast(params, dtype)), tokens, **options)
    return -jnp.sum(logprobs * learned) / jnp.sum(learned)


def value_and_grad(graph, tokens, learned, **options):
    """The jitted loss of a step over the parameters alone."""
    return jax.jit(jax.value_and_grad(lambda params: loss(params, graph, tokens, learned, **options)))


def torch_loss_and_gradients(reference, tokens, learned):
    """transformers on each sequence by itself, without padding."""
    torch = pytest.importorskip("torch")
    reference.zero_grad()
    total = 0
    for row, mask, length in zip(tokens, learned, LENGTHS):
        logits = reference(torch.tensor(row[None, :length])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:length]), reduction="none")
        total = total + (losses * torch.tensor(mask[1:length])).sum() / int(learned.sum())
    total.backward()
    return total.item(), {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [dict(), dict(remat=True, chunk=7)], ids=["plain", "remat_in_chunks"])
@pytest.mark.parametrize("added_size", [qwen3.ADDED_SIZE, 1])
def test_loss_and_gradients_are_those_of_transformers(case, options, added_size, monkeypatch):
    """Also where matmuls add to the residual stream."""
    monkeypatch.setattr(qwen3, "ADDED_SIZE", added_size)
    model, reference = case
    tokens, learned = padded_batch()
    expected_loss, expected = torch_loss_and_gradients(reference, tokens, learned)
    graph, params = nnx.split(model)
    value, gradients = value_and_grad(graph, tokens, learned, **options)(params)
    np.testing.assert_allclose(value, expected_loss, rtol=1e-5)
    for path, gradient in nnx.to_flat_state(gradients):
        source = parameter_sources(model.config)[path]
        for name, ours in zip(source.shapes, source.split(np.asarray(gradient))):
            np.testing.assert_allclose(ours, expected.pop(name), atol=1e-5, rtol=1e-3, err_msg=name)
    assert not expected


def test_a_gradient_through_bfloat16_reaches_float32_master_weights(case):
    """Products are of 16 bits, the gradients that come back are float32 and point the same way."""
    graph, params = nnx.split(case[0])
    batch = padded_batch()
    gradients = [value_and_grad(graph, *batch, dtype=dtype)(params)[1] for dtype in (jnp.float32, jnp.bfloat16)]
    exact, rounded = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in gradients)
    assert rounded.dtype == jnp.float32
    cosine = jnp.vdot(exact, rounded) / jnp.linalg.norm(exact) / jnp.linalg.norm(rounded)
    assert 0.99 < cosine < 1 - 1e-7


def test_optax_learns_a_batch_by_heart(case):
    graph, params = nnx.split(case[0])
    tokens, learned = padded_batch()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        value, gradients = value_and_grad(graph, tokens, learned)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 4
    assert losses[-1] < 1


def test_the_logits_of_a_batch_never_exist_at_once(case):
    """A head chunk is the largest array with a vocabulary's width, forward and backward."""
    graph, params = nnx.split(case[0])
    tokens = np.zeros((4, 64), np.int32)
    text = jax.jit(jax.grad(partial(loss, chunk=16)), static_argnums=1).lower(params, graph, tokens, tokens).as_text()
    assert f"tensor<16x{case[0].config.vocab_size}xf32>" in text
    assert not re.search(rf"tensor<(\d+x)?(63|64|252|256)x{case[0].config.vocab_size}x", text)


@pytest.mark.parametrize("length", [1, 16, 29])
def test_what_is_padded_for_cudnn_changes_nothing(monkeypatch, length):
    """A CPU has no cuDNN: plain products stand in for it, and see the lengths that it would."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((2, length, 2, 4, 16)), jnp.float32)
    cos, sin = rope_angles(jnp.arange(length), RopeConfig(), 16)
    args = qkv, *(RMSNorm(16, 1e-6, dtype=jnp.float32) for _ in "qk"), cos, sin, None
    plain, _ = jax.jit(lambda *args: causal_attention(*args))(*args)
    attend, lengths = jax.nn.dot_product_attention, []

    def attend_as_cudnn(q, k, v, *, is_causal, implementation):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return attend(q, k, v, is_causal=is_causal)

    monkeypatch.setattr("nanovllm_jax.layers.attention.cudnn_attends", lambda q: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend_as_cudnn)
    padded, _ = jax.jit(lambda *args: causal_attention(*args))(*args)  # traced anew
    np.testing.assert_allclose(padded, plain, atol=1e-6)
    assert lengths == [-(-length // 16) * 16]


def test_token_logprobs_of_one_token_each():
    model = Qwen3ForCausalLM(SMALL, rngs=nnx.Rngs(0))
    assert token_logprobs(model, jnp.zeros((2, 1), jnp.int32)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(("shape", "chunk"), [((5,), 8), ((1, 2, 3), 8), ((2, 0), 8), ((0, 3), 8), ((2, 5), 0)])
def test_token_logprobs_of_what_is_no_batch(shape, chunk):
    model = Qwen3ForCausalLM(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\], not .*chunk at least 1, not [08]"):
        token_logprobs(model, jnp.zeros(shape, jnp.int32), chunk=chunk)


def test_a_frequent_tokens_gradient_adds_up_in_16_bits():
    """One token 4,096 times: a sum in bfloat16 would stand still at 256."""
    embedding = Embedding(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens = jnp.zeros(4096, jnp.int32).at[0].set(3)
    graph, params = nnx.split(embedding)
    change = jax.jit(jax.grad(lambda params: nnx.merge(graph, params)(tokens).astype(jnp.float32).sum()))(params)
    [table] = jax.tree.leaves(change)
    assert table.dtype == jnp.bfloat16
    assert table[:, 0].astype(float).tolist() == [4096, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_16_bits(dtype, tolerance):
    """The numbers of float32 but for rounding, on a CPU too, where XLA lacks some products of float16."""
    tokens, _ = padded_batch()
    model = Qwen3ForCausalLM(SMALL, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    run = jax.jit(token_logprobs)
    wanted, found = run(model, tokens), run(nnx.merge(graph, cast(params, jnp.dtype(dtype))), tokens)
    np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_gradients_of_a_deterministic_model():
    """As an engine with deterministic=True serves it."""
    tokens, learned = padded_batch()
    gradients = []
    for deterministic in (False, True):
        graph, params = nnx.split(Qwen3ForCausalLM(SMALL, rngs=nnx.Rngs(0), deterministic=deterministic))
        gradients.append(jax.tree.leaves(value_and_grad(graph, tokens, learned)(params)))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
