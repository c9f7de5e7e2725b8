"""deterministic=True: equal numbers to the last bit, however a request is computed. Here by the CPU's jnp paths."""

from dataclasses import replace

import numpy as np
import pytest
from small_model import SMALL, assert_idle, random_tensors, small_llm, write_checkpoint

from nanovllm_jax import LLM, SamplingParams

PARAMS = SamplingParams(temperature=1, seed=5, max_tokens=30, logprobs=5, top_p=0.9, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = replace(SMALL, hidden_size=1024)  # a norm over fewer is the same in any batch, whatever is done for it
    return write_checkpoint(tmp_path_factory.mktemp("fixed") / "model", config, random_tensors(config, scale=0.03))


@pytest.fixture(scope="module")
def llm(directory, compiled_as_usual):
    return small_llm(directory, deterministic=True)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 512, length).tolist()


def drain(llm, request_id):
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    [output] = [output for output in outputs if output.request_id == request_id]
    return output.outputs[0].token_ids, output.outputs[0].logprobs


def fresh(llm):
    """Forget cached prefixes."""
    llm.scheduler.preempt_all()


@pytest.mark.parametrize("length", [15, 90])
def test_bits_do_not_depend_on_how_a_request_is_computed(llm, length):
    """Alone, in a batch, in chunks of other sizes, from cached prefixes, preempted: equal tokens and logprobs."""
    prompt = prompt_of(length)
    fresh(llm)
    alone = drain(llm, llm.add_request(prompt, PARAMS))
    assert drain(llm, llm.add_request(prompt, PARAMS)) == alone  # its full blocks are in the cache
    for others in (1, 2, 3):
        fresh(llm)
        for i in range(others):  # they take a part of the budget: the prompt comes in other chunks
            llm.add_request(prompt_of(11 * i + 3, seed=i), SamplingParams(max_tokens=20, ignore_eos=True))
        llm.step()
        request_id = llm.add_request(prompt, PARAMS)
        llm.add_request([*prompt[: length // 2 + 1], 7], SamplingParams(max_tokens=9, ignore_eos=True))
        for _ in range(3 * others):
            llm.step()
        llm.scheduler.preempt_all()
        assert drain(llm, request_id) == alone
    assert_idle(llm)


def test_scores_are_those_of_sampling(llm):
    """Equal, not close: the rollout's numbers are the trainer's, if he scores with the engine."""
    params = SamplingParams(temperature=1, max_tokens=40, logprobs=0, ignore_eos=True)
    prompts = [prompt_of(length, seed=length) for length in (1, 16, 33, 70)]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    sampled = [[entry[token].logprob for entry, token in zip(o.logprobs, o.token_ids)] for o in outputs]
    for _ in range(2):
        assert llm.score(prompts, [output.token_ids for output in outputs], use_tqdm=False) == sampled
        fresh(llm)


def test_the_model_is_the_same(llm, directory, compiled_quickly):
    """But for rounding: the other engine may well be compiled quickly."""
    prompt, completion = prompt_of(50), prompt_of(20, seed=1)
    other = small_llm(directory, max_num_seqs=1)
    [fixed], [usual] = (engine.score([prompt], [completion], use_tqdm=False) for engine in (llm, other))
    assert usual == pytest.approx(fixed, abs=1e-5)


def test_one_device():
    with pytest.raises(ValueError, match="deterministic=True runs on one device, not on tensor_parallel_size=2"):
        LLM(deterministic=True, tensor_parallel_size=2)
