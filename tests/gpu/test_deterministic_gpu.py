"""deterministic=True on a GPU in bfloat16: equal bits, however a request is computed. Real shapes, random weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import fixed_matmul, token_logprobs
from sampling_array import sampling_array
from test_engine_gpu import COMMON, SIZES, prompts_of_lengths

from nanovllm_jax import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(temperature=1, seed=3, max_tokens=60, logprobs=5, top_p=0.9, ignore_eos=True)
OTHERS = SamplingParams(temperature=1, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module", params=["0.6B", "8B"])
def llm(request, tmp_path_factory):
    """The shape with four layers: bits that differ, differ in the first."""
    config = COMMON | SIZES[request.param] | dict(num_hidden_layers=4)
    directory = tmp_path_factory.mktemp("fixed")
    config |= dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(config))
    return LLM(
        directory,
        load_format="dummy",
        deterministic=True,
        max_num_seqs=64,
        max_num_batched_tokens=1024,  # so that some steps spare the last layer, and others do not
        max_model_len=2048,
        num_kvcache_blocks=300,
    )


def drain(llm, request_id, preempting=()):
    """What becomes of a request; before the steps of these numbers, everything is preempted."""
    outputs, number = [], 0
    while llm.has_unfinished_requests():
        if number in preempting:
            llm.scheduler.preempt_all()
        outputs += llm.step()
        number += 1
    [output] = [output for output in outputs if output.request_id == request_id]
    return output.outputs[0].token_ids, output.outputs[0].logprobs


@pytest.mark.parametrize("length", [1, 255, 300, 1400])
def test_bits_do_not_depend_on_how_a_request_is_computed(llm, length):
    """Alone, in batches of every bucket, in other chunks, from cached prefixes, preempted."""
    [prompt] = prompts_of_lengths(length)
    llm.scheduler.preempt_all()  # nothing is cached
    alone = drain(llm, llm.add_request(prompt, PARAMS))
    assert drain(llm, llm.add_request(prompt, PARAMS)) == alone, "found in the cache"
    for others in (1, 2, 5, 11, 40):
        llm.scheduler.preempt_all()
        rng = np.random.default_rng(others)
        for count in rng.integers(1, 400, others):
            llm.add_request(rng.integers(0, 151000, count).tolist(), OTHERS)
        llm.step()
        request_id = llm.add_request(prompt, PARAMS)
        llm.add_request([*prompt[: length // 2 + 1], 7], OTHERS)
        tokens, logprobs = drain(llm, request_id, preempting=(8, 20, 50))
        assert tokens == alone[0], f"beside {others}"
        assert logprobs == alone[1], f"beside {others}"


def test_scores_are_those_of_sampling(llm):
    prompts = prompts_of_lengths(1, 255, 256, 700)
    params = SamplingParams(temperature=1, max_tokens=100, logprobs=0, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    sampled = [[entry[token].logprob for entry, token in zip(o.logprobs, o.token_ids)] for o in outputs]
    for _ in range(2):
        assert llm.score(prompts, [output.token_ids for output in outputs], use_tqdm=False) == sampled
        llm.scheduler.preempt_all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("features", "depth"), [(4096, 1024), (1000, 80), (24576, 4096)])
def test_fixed_matmul(dtype, features, depth):
    """The product is right, and a row's bits depend on the row alone."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal((n, depth)), dtype) for n in (700, features))
    whole = fixed_matmul(x, weight, dtype=jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(np.asarray(whole, np.float64), want, atol=1e-4 * depth**0.5, rtol=1e-4)
    for start, stop in ((0, 1), (5, 70), (64, 128), (699, 700), (100, 400)):
        part = fixed_matmul(x[start:stop], weight, dtype=jnp.float32)
        np.testing.assert_array_equal(np.asarray(part), np.asarray(whole[start:stop]))


def test_fixed_logprobs():
    """A row's log probabilities depend on the row alone."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((70, 151936)), jnp.float32)
    tokens, sampling = jnp.arange(70), jnp.asarray(sampling_array(70, num_top=5))

    def logprobs(rows):
        return np.asarray(token_logprobs(logits[rows], logits[rows], sampling[rows], tokens[rows], fixed=True))[..., :6]

    whole = logprobs(slice(None))
    for start, stop in ((5, 12), (20, 61), *((row, row + 1) for row in range(70))):
        np.testing.assert_array_equal(logprobs(slice(start, stop)), whole[start:stop])
