"""Logits that are NaN or infinite: who gets an error, who does not, and what stays behind."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_array import sampling_array
from small_model import SMALL, assert_idle, join, random_tensors, small_llm, whole, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.models.draw import DeviceState, draw

pytestmark = pytest.mark.usefixtures("programs_kept")

POISONED = 300  # a token whose embedding is NaN
VOCAB = 7


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(SMALL)


@pytest.fixture(scope="module")
def llm(tmp_path_factory, tensors):
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[POISONED] = np.nan
    poisoned = tensors | {"model.embed_tokens.weight": embedding}
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("nan") / "model", tensors=poisoned))


GOOD = [[5, 6, 7], [9] * 40, [1, 2], [8] * 20]
BAD = [[5, POISONED], [POISONED] * 70, [3] * 33 + [POISONED]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logit_bias={POISONED: -100}),
    SamplingParams(seed=1, max_tokens=20, ignore_eos=True, logprobs=2, logit_bias={POISONED: -100}),
    SamplingParams(seed=2, max_tokens=5, ignore_eos=True, top_k=9, presence_penalty=1, logit_bias={POISONED: -100}),
    SamplingParams(seed=3, max_tokens=12, ignore_eos=True, n=2, stop=["never"], logit_bias={POISONED: -100}),
]


def assert_errors(outputs, texts=1):
    for output in outputs:
        assert [(c.text, c.token_ids, c.finish_reason) for c in output.outputs] == [("", [], "error")] * texts
        assert output.metrics.first_token_time is None


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "logprobs", "penalty", "two"])
def test_the_others_get_what_they_get_alone(llm, caplog, params):
    expected = whole(llm.generate(GOOD, params, use_tqdm=False))
    mixed = [prompt for pair in zip(GOOD, [*BAD, [POISONED]]) for prompt in pair]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second time, with what is in the prefix cache
            outputs = llm.generate(mixed, params, use_tqdm=False)
            assert whole(outputs[::2]) == expected
            assert_errors(outputs[1::2], texts=params.n)
            assert_idle(llm)
    for output in outputs[1::2]:
        assert f"request {output.request_id!r} ends with finish_reason 'error' after 0 tokens" in caplog.text
    assert caplog.text.count("finish_reason 'error'") == 2 * 4 * params.n


def with_embedding(leaves, token, value):
    """A model's arrays, in which a token's embedding is this number."""
    embedding = next(i for i, leaf in enumerate(leaves) if leaf.shape == (512, 48))
    return [*leaves[:embedding], leaves[embedding].at[token].set(value), *leaves[embedding + 1 :]]


def test_in_the_middle_of_a_text(llm):
    """The tokens before are told, and none after."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logit_bias={POISONED: -100})
    tokens = llm.generate([5, 6, 7], params, use_tqdm=False)[0]["token_ids"]
    last = tokens[9]
    count = tokens.index(last) + 1
    poisoned = replace(params, logit_bias={last: -100} | {POISONED: -100})
    assert len(llm.generate([5, 6, 7], poisoned, use_tqdm=False)[0]["token_ids"]) == 20
    weights = llm.runner.weights
    leaves = weights.leaves
    try:
        weights.serve(with_embedding(leaves, last, jnp.inf))
        llm.reset_prefix_cache()
        [output] = llm.generate([5, 6, 7], params, use_tqdm=False)
        streamed = list(llm.stream([5, 6, 7], params))
    finally:
        weights.serve(leaves)
    expected = llm.tokenizer.decode(tokens[:count], skip_special_tokens=True), tokens[:count], "error"
    assert whole([output]) == [[expected]]
    assert [text.token_ids for out in streamed for text in out.outputs] == [*([token] for token in tokens[:count]), []]
    assert streamed[-1].finished
    assert "".join(out["text"] for out in streamed) == expected[0]
    assert_idle(llm)


def test_a_stream_that_ends_before_its_first_token(llm):
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1, prompt_logprobs=1, n=2)
    outputs = list(llm.stream([[POISONED, 1]], params))
    assert sum(len(output.outputs) for output in outputs) == 2
    assert {(c.finish_reason, *c.token_ids) for output in outputs for c in output.outputs} == {("error",)}
    assert [output.prompt_logprobs is None for output in outputs] == [False] + [True] * (len(outputs) - 1)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_nothing_but_nan(tmp_path, tensors, value):
    """Every request is told, and none of them takes long."""
    bad = tensors | {"model.norm.weight": np.full_like(tensors["model.norm.weight"], value)}
    llm = small_llm(write_checkpoint(tmp_path / "model", tensors=bad))
    for params in PARAMS:
        assert_errors(llm.generate(GOOD * 3, params, use_tqdm=False), texts=params.n)
        assert_idle(llm)
    assert np.isnan(llm.score([[1, 2]], [[3, 4, 5]], use_tqdm=False)).all()


def test_a_fault_that_passes_leaves_nothing_in_the_cache(llm):
    """Keys and values that were NaN once are not found by who has the same prompt later."""
    params, prompt = PARAMS[0], [11] * 100
    expected = whole(llm.generate(prompt, params, use_tqdm=False))
    llm.reset_prefix_cache()
    weights = llm.runner.weights
    leaves = weights.leaves
    try:
        weights.serve([jnp.full_like(leaf, jnp.nan) for leaf in leaves])
        assert_errors(llm.generate(prompt, params, use_tqdm=False))
    finally:
        weights.serve(leaves)
    assert llm.scheduler.block_manager.num_cached_blocks == 0
    [output] = llm.generate(prompt, params, use_tqdm=False)
    assert (whole([output]), output.num_cached_tokens) == (expected, 0)


def test_several_steps_in_one_program(tmp_path, tensors):
    llm = small_llm(write_checkpoint(tmp_path / "model", tensors=tensors), num_scheduler_steps=4)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    tokens = llm.generate([5, 6, 7], params, use_tqdm=False)[0]["token_ids"]
    count = tokens.index(tokens[9]) + 1
    llm.runner.weights.serve(with_embedding(llm.runner.weights.leaves, tokens[9], jnp.nan))
    llm.reset_prefix_cache()
    assert join(llm.stream([5, 6, 7], params))[0][0][1:] == (tokens[:count], "error")
    assert_idle(llm)


# --- the draw alone ---

BAD_ROWS = {
    "one nan": [0.0, np.nan, 9, 1, 2, 3, 4],
    "nan alone": [np.nan] * VOCAB,
    "one infinity": [0.0, 1, np.inf, 1, 2, 3, 4],
    "infinities": [np.inf] * VOCAB,
    "all masked": [-np.inf] * VOCAB,
    "nan and infinities": [-np.inf, np.inf, np.nan, 0, 0, 0, 0],
}
SETTINGS = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(),
    "cut": dict(top_k=3, top_p=0.7, min_p=0.1),
    "adjusted": dict(adjusts=1, repetition=1.5, frequency=0.5, presence=0.5, num_top=5),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_without_a_token_to_draw(settings):
    """They give -1, and their neighbours what they give alone; the state never has -1."""
    good = np.linspace(-1, 3, VOCAB, dtype=np.float32)
    logits = np.array([row for bad in BAD_ROWS.values() for row in (bad, good)] + [good], np.float32)
    count = len(logits)
    state = DeviceState(
        last_tokens=jnp.full(count, 5, jnp.int32),
        token_counts=jnp.zeros((count, VOCAB), jnp.int32),
        logit_bias=jnp.zeros((count, VOCAB)),
    )
    slots = jnp.arange(count, dtype=jnp.int32)
    run = jax.jit(draw)
    sampling = jnp.array(sampling_array(count, seed_low=3, **settings))
    tokens, _, after = run(jnp.array(logits), sampling, slots, jnp.full(count, 9, jnp.int32), state)
    alone, _, _ = run(jnp.array(logits[-1:]), sampling[-1:], slots[:1], jnp.full(1, 9, jnp.int32), state)
    assert tokens.tolist() == [-1, int(alone[0])] * len(BAD_ROWS) + [int(alone[0])]
    assert ((after.last_tokens >= 0) & (after.last_tokens < VOCAB)).all()
    assert after.token_counts.sum(axis=1).tolist() == [settings.get("adjusts", 0)] * count
