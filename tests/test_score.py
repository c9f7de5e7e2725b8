"""LLM.score, and that sampling, scoring and training give the same numbers: float32 on a CPU, to 1e-5."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_jax.kernels import norm_rope_store
from small_model import assert_idle, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine import model_runner
from nanovllm_jax.engine.buckets import gpu_buckets
from nanovllm_jax.layers.attention import causal_attention, split_norm_rope
from nanovllm_jax.layers.norm import RMSNorm
from nanovllm_jax.layers.rope import RopeConfig, rope_angles
from nanovllm_jax.models import score_programs
from nanovllm_jax.parallel.backend import compiler_options

pytestmark = pytest.mark.usefixtures("programs_kept")

ABS = 1e-5
PROMPTS = [[5, 6, 7], list(range(40)), [9] * 20, [*range(32)], list(range(40)), [3]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A pool so small that some sequences are preempted."""
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("score") / "model"), num_kvcache_blocks=12)


@pytest.fixture(scope="module")
def trained(llm):
    """trained(prompt, completion): what the training forward says."""
    model = llm.model

    @jax.jit
    def logprobs(tokens):
        hidden, _ = model(tokens, jnp.arange(len(tokens)), None, causal_attention)
        return jax.nn.log_softmax(model.logits(hidden[:-1]))[jnp.arange(len(tokens) - 1), tokens[1:]]

    def of(prompt, completion):
        padded = np.array([*prompt, *completion] + [0] * (128 - len(prompt) - len(completion)))
        return np.asarray(logprobs(padded))[len(prompt) - 1 :][: len(completion)].tolist()

    return of


def test_sampling_scoring_and_training_agree(llm, trained):
    """Logprobs of sampled texts, in every path: decoded, computed in chunks, preempted, found in the prefix cache."""
    params = SamplingParams(temperature=1, max_tokens=60, logprobs=0, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    completions = [output.token_ids for output in outputs]
    sampled = [[entry[token].logprob for entry, token in zip(o.logprobs, o.token_ids)] for o in outputs]
    assert llm.scheduler.num_preemptions > 0
    for _ in range(2):
        scored = llm.score(PROMPTS, completions, use_tqdm=False)
        for prompt, completion, one, other in zip(PROMPTS, completions, sampled, scored, strict=True):
            assert other == pytest.approx(one, abs=ABS)
            assert other == pytest.approx(trained(prompt, completion), abs=ABS)
    assert llm.scheduler.num_prefix_hit_tokens > 0
    arrays = [[np.array(tokens) for tokens in part] for part in (PROMPTS, completions)]
    assert llm.score(*arrays, use_tqdm=False) == [pytest.approx(one, abs=ABS) for one in scored]
    assert_idle(llm)


def test_completions_of_one_prompt_share_it(llm, trained):
    """Of 50 prompt tokens 48 are in full blocks, and computed once."""
    prompt, completions = [7, *range(100, 149)], [[1], [2, 3], [], [4] * 20, [1, 2]]
    before = llm.metrics.num_prefill_tokens
    scored = llm.score([prompt] * 5, completions, use_tqdm=False)
    for completion, found in zip(completions, scored, strict=True):
        assert found == pytest.approx(trained(prompt, completion), abs=ABS)
    lengths = [len(prompt) + max(0, len(completion) - 1) for completion in completions]
    assert llm.metrics.num_prefill_tokens - before == sum(lengths) - 4 * 48
    # A prompt of full blocks: its last block, which holds the token that predicts the completion, is computed again.
    prompt, before = prompt[:48], llm.metrics.num_prefill_tokens
    assert llm.score(prompt, [9], use_tqdm=False)[0] == pytest.approx(trained(prompt, [9]), abs=ABS)
    assert llm.metrics.num_prefill_tokens - before == 16


def test_longest(llm, trained):
    """Prompt and completion may fill max_model_len, as generated texts do."""
    prompt, completion = [8] * 28, np.random.default_rng(0).integers(0, 512, 100).tolist()
    [found] = llm.score([prompt], [completion], use_tqdm=False)
    assert found == pytest.approx(trained(prompt, completion), abs=ABS)
    with pytest.raises(ValueError, match=r"28 \+ 101 tokens, which must fit in max_model_len=128") as error:
        llm.score([[1], prompt], [[1], [*completion, 1]])
    assert "This is prompt 1 of 2" in error.value.__notes__[0]


def test_texts(llm):
    """A completion's text is tokenised on its own."""
    prompt, completion = "What is 2 + 3?", " It is 5."
    tokens = llm.tokenizer.encode(completion, add_special_tokens=False)
    [found] = llm.score(prompt, completion, use_tqdm=False)
    assert len(found) == len(tokens)
    assert [found] == llm.score([llm.tokenizer.encode(prompt)], [tokens], use_tqdm=False)
    assert llm.score([], [], use_tqdm=False) == []


def test_64_bit_numbers_set_after_the_start(llm):
    """What is compiled when it is wanted is compiled as at the start."""
    expected = llm.score([[6]], [[7, 8]], use_tqdm=False)
    llm.runner.scores.compiled.clear()
    with jax.enable_x64(True):
        assert llm.score([[6]], [[7, 8]], use_tqdm=False) == expected


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1], [2]], [[1]], "as many completions as prompts, not 1 for 2"),
        ([[1]], [[512]], "token id 512 is not in the vocabulary"),
        ([[1]], [[1.5]], "token ids must be integers, not 1.5"),
        ([[]], [[1]], "has no tokens"),
        ([[1]], [{"prompt": "a"}], "a completion is a string or a list of token ids, not {'prompt': 'a'}"),
    ],
)
def test_bad_input(llm, prompts, completions, message):
    with pytest.raises((TypeError, ValueError), match=message):
        llm.score(prompts, completions)
    assert_idle(llm)


def test_other_requests_are_in_the_way(llm):
    request_id = llm.add_request([1])
    with pytest.raises(RuntimeError, match=r"score\(\) needs the engine for itself"):
        llm.score([1], [2])
    llm.abort_request(request_id)


def test_prompt_logprobs_after_preemption(llm, trained):
    """The chunks of a prompt that is computed twice may be cut another way; each token counts once."""
    prompt = np.random.default_rng(1).integers(0, 512, 110).tolist()
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    for others in range(3):
        request_id = llm.add_request(prompt, params)
        for _ in range(others):
            llm.step()
        llm.scheduler.preempt_all()
        llm.add_request([others] * 9, SamplingParams(max_tokens=3, ignore_eos=True))
        outputs = []
        while llm.has_unfinished_requests():
            outputs += llm.step()
        [output] = [output for output in outputs if output.request_id == request_id]
        found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        assert found == pytest.approx(trained(prompt[:1], prompt[1:]), abs=ABS)


def test_training_rounds_where_serving_rounds():
    """bfloat16 queries and keys, bit for bit: compiled, a conversion to 16 bits and back would be left out."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((40, 2, 4, 32)), jnp.bfloat16)
    norms = [RMSNorm(32, 1e-6, dtype=jnp.bfloat16) for _ in range(2)]
    for norm in norms:
        norm.weight[...] = jnp.asarray(rng.uniform(0.5, 2, 32), jnp.bfloat16)
    cos, sin = rope_angles(jnp.arange(40), RopeConfig(), 32)
    pages = jnp.zeros((2, 1, 3, 2, 16, 32), jnp.bfloat16)
    gains = [norm.weight[...] for norm in norms]
    q, kv_cache = norm_rope_store(qkv, *gains, cos[:, 0], sin[:, 0], jnp.arange(40), pages, 0, eps=1e-6)
    trained_q, trained_k, _ = jax.jit(split_norm_rope)(qkv, *norms, cos, sin)
    np.testing.assert_array_equal(trained_q, q)
    np.testing.assert_array_equal(trained_k, kv_cache[0, 0].swapaxes(1, 2).reshape(48, 2, 32)[:40])


@pytest.mark.parametrize("program", [0, 1, 2])
def test_it_is_compiled_with_the_options_of_a_step(tmp_path, monkeypatch, program):
    """Which XLA refuses here, so that it can be seen that they reach the last layer's program and the two after it."""
    monkeypatch.setattr(model_runner, "SPARED_FROM", 64)
    llm, asked = small_llm(write_checkpoint(tmp_path / "model")), []

    def options(mesh, rows):
        asked.append((mesh, rows))
        return {"no_such_option": True} if len(asked) > program else {}

    monkeypatch.setattr(score_programs, "compiler_options", options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        llm.score([5, 6, 7], [8, 9], use_tqdm=False)
    assert asked == [(llm.runner.mesh, rows) for rows in (64, 1, 64)[: program + 1]]


def test_prompts_of_all_sizes_share_the_head(tmp_path, monkeypatch):
    """A step has many sizes beside what decodes, and whoever is there waits for what is compiled."""
    monkeypatch.setattr(model_runner, "cpu_buckets", gpu_buckets)
    llm = small_llm(write_checkpoint(tmp_path / "model"), max_num_batched_tokens=200)
    for number in (1, 2):
        llm.score([[5] * 20] * number, [[1] * 80] * number, use_tqdm=False)
    programs = llm.runner.scores.compiled
    assert programs["rows"]._cache_size() > 1
    assert programs["logprobs"]._cache_size() == 1


def test_options_for_gpus():
    """cuBLAS for many rows, no CUDA graphs for large prefills, and no collectives in those of several GPUs."""

    def of(platform, devices, rows):
        devices = np.array([SimpleNamespace(platform=platform)] * devices)
        return compiler_options(SimpleNamespace(devices=devices, size=devices.size), rows)

    assert of("cpu", 8, 256) == {}
    assert of("gpu", 1, 16) == {"xla_disable_hlo_passes": "rematerialization"}
    cublas = of("gpu", 1, 16)
    cublas |= {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True, "xla_gpu_autotune_level": 2}
    assert of("gpu", 1, 17) == cublas
    for rows in (1, 256):
        several = of("gpu", 2, rows)
        assert several.items() > of("gpu", 1, rows).items()
        assert "FUSION" in several["xla_gpu_enable_command_buffer"]
        assert "COLLECTIVES" not in several["xla_gpu_enable_command_buffer"]
        assert several["xla_gpu_shard_autotuning"] is False
    for devices in (1, 2):
        large, smaller = (of("gpu", devices, rows) for rows in (8192, 8191))
        assert large == smaller | {"xla_gpu_enable_command_buffer": ""}
