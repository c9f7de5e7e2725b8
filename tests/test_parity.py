"""The model and the whole engine against transformers' own Qwen3, on a CPU in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import SHAPES

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.layers.attention import PagedAttention, causal_attention
from nanovllm_jax.models import qwen3
from nanovllm_jax.parallel.sharding import make_mesh

torch = pytest.importorskip("torch")

BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module", params=SHAPES)
def case(request, checkpoint):
    """(directory, transformers model) of each shape in turn."""
    return checkpoint(request.param)


def reference_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def assert_greedy(model, prompt, output):
    """Each token of `output` is transformers' most likely one after those before it: its own greedy text."""
    logits = reference_logits(model, prompt + output)[len(prompt) - 1 : -1]
    assert output == logits.argmax(axis=-1).tolist()


def random_prompts(count, seed=0):
    """Prompts of 1 to 90 tokens, exact multiples of the block size among them."""
    rng = np.random.default_rng(seed)
    lengths = [BLOCK, 2 * BLOCK, 1, BLOCK + 1, BLOCK - 1, *rng.integers(2, 90, count)][:count]
    return [rng.integers(0, 319, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model(case):
    directory, _ = case
    return load_model(directory, ModelConfig.from_pretrained(directory), dtype=jnp.float32, mesh=make_mesh(1))


def test_logits_of_the_training_forward(case, model):
    _, reference = case
    tokens = random_prompts(8)[-1]
    forward = jax.jit(lambda model, *args: model.logits(model(*args, None, causal_attention)[0]))
    logits = forward(model, np.array([tokens]), np.arange(len(tokens)))[0]
    np.testing.assert_allclose(logits, reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("chunk", "added_rows"), [(1, 8192), (7, 8192), (100, 8192), (7, 7), (100, 1)])
def test_logits_of_the_paged_forward(case, model, chunk, added_rows, monkeypatch):
    """The serving path, `chunk` tokens at a time, through a shuffled block table; matmuls may add to the residual."""
    monkeypatch.setattr(qwen3, "ADDED_SIZE", added_rows * model.config.hidden_size)
    _, reference = case
    tokens = random_prompts(7, seed=1)[-1]
    tokens = tokens[: len(tokens) // chunk * chunk or None]  # whole chunks: another length is another program
    c = model.config
    shape = 2, c.num_hidden_layers, 12, c.num_key_value_heads, BLOCK, c.head_dim
    cache = jnp.full(shape, jnp.nan)  # unwritten slots must never show
    table, logits = np.array([[7, 2, 9, 4, 11, 0]]), []

    @jax.jit  # the weights in it: as arguments, on a mesh, they would have the cache that comes out compile it again
    def forward(*args):
        hidden, cache = model(*args)
        return model.logits(hidden), cache

    for start in range(0, len(tokens), chunk):
        part = np.array(tokens[start : start + chunk])
        positions = start + np.arange(len(part))
        attend = PagedAttention(
            slot_mapping=table[0, positions // BLOCK] * BLOCK + positions % BLOCK,
            tables=table,
            context_lens=np.array([start + len(part)]),
            starts=np.array([0, len(part)]),
            num_decodes=None,
            prefill_rows=1,
        )
        of_part, cache = forward(part, positions, cache, attend)
        logits.append(of_part)
    np.testing.assert_allclose(np.concatenate(logits), reference_logits(reference, tokens), atol=1e-4, rtol=1e-4)


# A step of one chunk that holds all or a part of several prompts: fewer shapes to compile than a larger budget has.
SIZES = dict(block_size=BLOCK, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=192)


@pytest.fixture(scope="module")
def llm(case, quick_to_run):
    return LLM(case[0], **SIZES)


def generate(llm, prompts):
    outputs = [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
    llm.scheduler.check()
    assert not llm.scheduler.running
    return outputs


def test_greedy_tokens_of_the_engine(case, llm):
    """64 greedy tokens: alone, 32 mixed lengths, 16 at a time, with prefix hits, and in chunks of every size."""
    _, reference = case
    prompts = random_prompts(32)
    expected = generate(llm, prompts)
    assert llm.scheduler.num_prefix_hit_tokens == 0
    for prompt, output in zip(prompts, expected, strict=True):
        assert len(output) == 64
        assert_greedy(reference, prompt, output)
    assert generate(llm, prompts) == expected, "with every prompt's full blocks in the prefix cache"
    assert llm.scheduler.num_prefix_hit_tokens > 500
    llm.reset_prefix_cache()
    assert generate(llm, prompts[-1:]) == expected[-1:], "alone"
    for chunk in range(1, BLOCK + 2):
        llm.reset_prefix_cache()
        llm.scheduler.max_num_batched_tokens = chunk  # the shapes are compiled for 64 tokens and for anything less
        assert generate(llm, prompts[5:8]) == expected[5:8], f"chunks of {chunk}"


def test_greedy_tokens_when_preempted(case, llm, monkeypatch):
    """A pool of which one sequence alone takes most: nearly everybody is preempted, and nothing changes."""
    _, reference = case
    prompts = random_prompts(12)
    monkeypatch.setattr(llm, "scheduler", Scheduler(num_blocks=14, **SIZES))  # of the engine's blocks it knows 14
    for prompt, output in zip(prompts, generate(llm, prompts), strict=True):
        assert_greedy(reference, prompt, output)
    assert llm.scheduler.num_preemptions > 3
