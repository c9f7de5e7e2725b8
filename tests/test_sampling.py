"""SamplingParams through the whole engine: against plain NumPy, and the same whatever else runs."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import sampling
from small_model import assert_idle, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.tables import ENDS, PROMPT
from nanovllm_jax.layers.attention import causal_attention
from nanovllm_jax.sampling_params import MAX_LOGPROBS

VOCAB = 512


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def llm(directory, quick_to_run):
    """Room for all that a test asks for at once."""
    return small_llm(directory, max_num_seqs=32, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def logits_of(llm):
    """logits_of(tokens) -> [len(tokens), V]: one plain forward pass, no cache, no kernels, no engine."""

    @jax.jit
    def forward(model, tokens):
        return model.logits(model(tokens, jnp.arange(len(tokens)), None, causal_attention)[0])

    @cache
    def padded(tokens):
        rows = jnp.array(tokens + (0,) * (128 - len(tokens)))
        return np.asarray(forward(llm.runner.weights.model, rows))[: len(tokens)]

    return lambda tokens: padded(tuple(tokens))


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist()


def run(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return outputs


def adjusted(logits, prompt, generated, params, stops):
    """The definition: bias, least length, then repetition, frequency and presence penalties."""
    logits = logits.astype(np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if len(generated) < params.min_tokens:
        logits[list(stops)] = -np.inf
    counts = np.bincount(generated, minlength=VOCAB) if generated else np.zeros(VOCAB)
    seen = counts > 0
    seen[prompt] = True
    penalty = params.repetition_penalty
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_the_flags_are_the_kernels():
    assert (PROMPT, ENDS) == (sampling.PROMPT, sampling.ENDS)
    assert sampling.MAX_LOGPROBS == MAX_LOGPROBS


ADJUSTING = [
    dict(logit_bias={7: 3.0, 11: -100.0, 300: 5.5}),
    dict(presence_penalty=1.5),
    dict(frequency_penalty=-0.7),
    dict(repetition_penalty=1.8),
    dict(repetition_penalty=0.6, presence_penalty=-0.5, frequency_penalty=0.9, logit_bias={3: 2.0}),
    dict(min_tokens=12, stop_token_ids=list(range(0, 512, 2))),
]


@pytest.mark.parametrize("options", ADJUSTING, ids=lambda options: "+".join(options))
def test_greedy_with_adjusted_logits(llm, logits_of, options):
    """Prompts that repeat themselves, all at once, beside one that adjusts nothing."""
    params = SamplingParams(temperature=0, max_tokens=20, **options)
    prompts = [prompt_of(n, seed=n) * 2 for n in (1, 9, 20)]
    outputs = run(llm, [*prompts, prompts[1]], [params] * 3 + [SamplingParams(temperature=0, max_tokens=20)])
    plain = outputs.pop().outputs[0].token_ids
    stops = {*llm.eos_token_ids, *params.stop_token_ids}
    for prompt, output in zip(prompts, outputs):
        tokens = []
        while len(tokens) < params.max_tokens and not (tokens and tokens[-1] in stops):
            tokens.append(int(np.argmax(adjusted(logits_of(prompt + tokens)[-1], prompt, tokens, params, stops))))
        assert output.outputs[0].token_ids == tokens
    assert plain != outputs[1].outputs[0].token_ids, "the settings changed nothing: the test says nothing"


def test_a_slot_forgets_its_last_owner(llm):
    """A request whose slot had penalties and biases before gives what it gives in a fresh engine."""
    prompt, plain = prompt_of(10), SamplingParams(temperature=0, max_tokens=8)
    penalties = SamplingParams(temperature=0, max_tokens=8, presence_penalty=2.0)
    before = [run(llm, [prompt], [p])[0]["token_ids"] for p in (plain, penalties)]
    drawn = dict.fromkeys(itertools.chain(*before), 100.0)  # the texts' own tokens, which would count in each slot
    for bias in ({5: 100.0}, drawn):
        others = SamplingParams(max_tokens=24, logit_bias=bias, frequency_penalty=2, ignore_eos=True)
        run(llm, [prompt_of(10, seed=i) for i in range(32)], others)
        assert [run(llm, [prompt], [p])[0]["token_ids"] for p in (plain, penalties)] == before


def test_sampled_tokens_are_among_those_allowed(llm, logits_of):
    """top_k, top_p and min_p mixed in one batch; what each may draw follows from the plain definition."""
    options = [dict(top_k=3), dict(top_p=0.5), dict(min_p=0.3), dict(top_k=50, top_p=0.7, min_p=0.01), dict(top_k=1)]
    params = [
        SamplingParams(temperature=1.3, max_tokens=24, seed=i, ignore_eos=True, **o) for i, o in enumerate(options)
    ]
    prompts = [prompt_of(5 + i, seed=i) for i in range(len(params))]
    for prompt, p, output in zip(prompts, params, run(llm, prompts, params)):
        tokens, drawn = output["token_ids"], set()
        for i, token in enumerate(tokens):
            probs = np.exp(log_softmax(logits_of(prompt + tokens[:i])[-1] / p.temperature))
            order = np.argsort(-probs)
            kept = order[probs[order] >= p.min_p * probs.max()][: p.top_k or None]
            mass = np.cumsum(probs[kept]) / probs[kept].sum()
            kept = kept[: np.searchsorted(mass, p.top_p - 1e-6) + 1]
            assert token in kept
            drawn.add(list(kept).index(token))
        assert p.top_k == 1 or len(drawn) > 1, "it samples"


def test_logprobs(llm, logits_of, monkeypatch):
    """Of generated and prompt tokens: log_softmax of the raw logits, rank and the best, whatever adjusts the draw."""
    monkeypatch.setattr(llm.scheduler, "max_num_batched_tokens", 64)
    params = [
        SamplingParams(temperature=0.9, max_tokens=10, logprobs=5, prompt_logprobs=3, seed=1, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=10, logprobs=0, ignore_eos=True),
        SamplingParams(max_tokens=10, logprobs=20, frequency_penalty=2, logit_bias={9: 50.0}, top_k=4, ignore_eos=True),
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        SamplingParams(max_tokens=10, ignore_eos=True),
    ]
    prompts = [prompt_of(n, seed=n) for n in (90, 17, 30, 64, 1)]  # 90 and 64: in chunks
    for _ in range(2):  # the second time, prefixes are in the cache
        for prompt, p, output in zip(prompts, params, run(llm, prompts, params)):
            [completion] = output.outputs
            logprobs = np.array([log_softmax(row) for row in logits_of(prompt + completion.token_ids)])
            if p.logprobs is None:
                assert completion.logprobs is completion.cumulative_logprob is None
            else:
                check_logprobs(completion.logprobs, completion.token_ids, logprobs[len(prompt) - 1 :], p.logprobs)
                own = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids)]
                assert completion.cumulative_logprob == pytest.approx(sum(own))
            if p.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert output.prompt_logprobs[0] is None
                check_logprobs(output.prompt_logprobs[1:], prompt[1:], logprobs, p.prompt_logprobs)


def check_logprobs(entries, tokens, expected, num_top):
    assert len(entries) == len(tokens)
    for entry, token, row in zip(entries, tokens, expected):
        best = np.argsort(-row, kind="stable")[:num_top].tolist()
        assert list(entry) == [token] + [other for other in best if other != token]
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[other], abs=1e-5)
            assert logprob.rank == 1 + (row > row[other]).sum()


def requests(count=50):
    """Seeded requests of every kind, some with a common prefix."""
    rng, common, params, prompts = np.random.default_rng(0), prompt_of(40, seed=99), [], []
    for i in range(count):
        options = [dict(), dict(top_k=30), dict(top_p=0.9), dict(min_p=0.02, presence_penalty=0.5), dict(temperature=0)]
        options += [dict(repetition_penalty=1.2, top_k=9), dict(min_tokens=9, logit_bias={511: 4.0})]
        own = dict(temperature=0.8, seed=1000 + i, max_tokens=int(rng.integers(9, 15)), logprobs=2)
        params.append(SamplingParams(**(own | options[i % len(options)])))
        own_prompt = rng.integers(0, VOCAB - 1, rng.integers(1, 40)).tolist()
        prompts.append(common + own_prompt if i % 3 == 0 else own_prompt)
    return prompts, params


def test_a_seeded_request_is_the_same_whatever_runs_beside_it(directory, llm):
    """Alone; batched in another order; chunked and preempted; with prefix hits: tokens, and logprobs to 1e-5."""
    prompts, params = requests()
    alone = []
    for prompt, p in zip(prompts, params):
        llm.reset_prefix_cache()
        alone += run(llm, [prompt], [p])
    llm.reset_prefix_cache()
    tight = small_llm(directory, max_num_seqs=16, max_num_batched_tokens=9, num_kvcache_blocks=10)
    order = np.random.default_rng(1).permutation(len(prompts))
    for engine in (llm, tight):
        before = engine.scheduler.num_prefix_hit_tokens
        for _ in range(2):  # the second time with prefix hits
            outputs = run(engine, [prompts[i] for i in order], [params[i] for i in order])
            for i, output in zip(order, outputs):
                assert_same(output.outputs[0], alone[i].outputs[0], f"request {i}")
        assert engine.scheduler.num_prefix_hit_tokens > before
    assert tight.scheduler.num_preemptions > 0


def assert_same(completion, expected, message):
    assert completion.token_ids == expected.token_ids, message
    assert completion.finish_reason == expected.finish_reason, message
    for entry, other in zip(completion.logprobs, expected.logprobs, strict=True):
        assert {token: logprob.logprob for token, logprob in entry.items()} == pytest.approx(
            {token: logprob.logprob for token, logprob in other.items()}, abs=1e-5
        ), message
