"""The whole engine on a GPU in bfloat16, against transformers on the same GPU. Real Qwen3 shapes, random weights."""

import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from profile_step import recorded_dispatches

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.batch import StepSizes
from nanovllm_jax.layers.attention import PagedAttention
from nanovllm_jax.models.step_programs import StepPrograms

pytestmark = pytest.mark.gpu

SIZES = {  # published configs; the vocabulary is Qwen3's
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                 tie_word_embeddings=True),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
               tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
}  # fmt: skip
COMMON = dict(num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
              rope_parameters=dict(rope_type="default", rope_theta=1e6), eos_token_id=151645)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
# Standard deviations of transformers' own bfloat16 error in a difference of two logits: under this gap, rounding may
# swap the top two.
NOISE = 4 * 2**0.5


def reference(*args) -> None:
    script = Path(__file__).with_name("transformers_reference.py")
    subprocess.run([sys.executable, str(script), *map(str, args)], check=True)


def small_engine(directory, **options):
    """Few batch shapes and a small pool, so that it starts quickly and leaves the GPU to transformers."""
    sizes = dict(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=2048, num_kvcache_blocks=128)
    return LLM(directory, **(sizes | options))


MANY_BLOCKS = 320  # of 0.6B more than 4 GiB of keys, which kernels address by 64 bits


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    reference("write", directory, json.dumps(COMMON | SIZES[request.param]))
    return directory


def prompts_of_lengths(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 151000, n).tolist() for n in lengths]


def paged_logits(llm, tokens):
    """Logits of every position, through the kernels: a first chunk, then the rest against the cache."""
    model = llm.model
    c = model.config
    shape = 2, c.num_hidden_layers, 10, c.num_key_value_heads, 256, c.head_dim
    cache, table, parts = jnp.full(shape, jnp.nan, llm.runner.dtype), jnp.array([[7, 2, 9, 4]]), []

    @jax.jit
    def forward(model, part, positions, cache, attend):
        hidden, cache = model(part, positions, cache, attend)
        return model.logits(hidden), cache

    for start, stop in ((0, 300), (300, len(tokens))):
        positions = jnp.arange(start, stop)
        attend = PagedAttention(
            slot_mapping=table[0, positions // 256] * 256 + positions % 256,
            tables=table,
            context_lens=jnp.array([stop]),
            starts=jnp.array([0, stop - start]),
            num_decodes=None,
            prefill_rows=1,
        )
        logits, cache = forward(model, jnp.array(tokens[start:stop]), positions, cache, attend)
        parts.append(np.asarray(logits))
    return np.concatenate(parts)


def kl_divergence(exact, logits):
    """Mean over positions of the KL divergence of logits' distributions from the exact ones."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (exact, logits))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def test_eager_equals_compiled(tmp_path):
    """Op by op with the kernels, and as one program."""
    config = COMMON | SIZES["0.6B"] | dict(num_hidden_layers=2, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts, outputs = prompts_of_lengths(5, 300), []
    for eager in (False, True):
        llm = small_engine(tmp_path, load_format="dummy", dtype="float32", enforce_eager=eager)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs.append([out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)])
        del llm
        gc.collect()
    assert outputs[0] == outputs[1]


START = """
import sys
from nanovllm_jax import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", max_num_seqs=8, max_num_batched_tokens=8192, max_model_len=8448,
          num_kvcache_blocks=64, compilation_cache_dir=sys.argv[1] + "/compiled")
prompts = [[7 * i % 1000 for i in range(n)] for n in (5, 300, 4500)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
print([out["token_ids"] for out in outputs])
"""


def test_a_second_start_compiles_nothing(tmp_path):
    """Programs from disk do in a new process what they did in the one that compiled them.

    The prefill, half of it padding, is one of the large ones.
    """
    config = COMMON | SIZES["0.6B"] | dict(num_hidden_layers=2, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", START, str(tmp_path)]
    first, second = (subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(2))
    assert "and found 0 on disk" in first.stderr
    assert "compiled 0 batch shapes" in second.stderr
    assert first.stdout == second.stdout


def test_a_large_cache_has_the_same_programs(tmp_path):
    """XLA takes it for memory that each kernel which writes in it needs anew: it must not spare any for that."""
    config = COMMON | SIZES["0.6B"] | dict(num_hidden_layers=4, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config | dict(dtype="bfloat16")))
    runner, fusions = small_engine(tmp_path, load_format="dummy").runner, []
    shape = runner.buckets.shape_for(StepSizes(4, 0, 4))
    for cache_bytes in (2**29, 2**37):
        num_blocks = cache_bytes // (256 * runner.model_config.kv_bytes_per_token(2))
        steps = StepPrograms.of(runner.steps.settings._replace(num_blocks=num_blocks))
        program = steps.lower(shape).compile(steps.compiler_options(shape))
        fusions.append(len(re.findall(r" fusion\(", program.as_text())))
    assert fusions[0] == fusions[1] > 4, fusions


@pytest.mark.parametrize(("size", "layers"), [("0.6B", 28), ("8B", 4)])
def test_a_large_prefill_agrees_with_small_ones(tmp_path, size, layers):
    """Prompts that fill one step of 16,384 tokens, which has kernels and sums of its own, and the same one by one.

    And the same behind three rows that decode, where 32 might.
    """
    config = COMMON | SIZES[size] | dict(num_hidden_layers=layers)
    config |= dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = dict(max_num_seqs=32, max_num_batched_tokens=16384, num_kvcache_blocks=MANY_BLOCKS)
    llm = small_engine(tmp_path, load_format="dummy", **sizes)
    prompts = prompts_of_lengths(1, 17, 256, 300, 512, 700, 1023, 1024, 1500, 2000, *[1000] * 9)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20)

    def numbers(outputs):
        return [{token: entry.logprob for token, entry in out.outputs[0].logprobs[0].items()} for out in outputs]

    def logprobs(*prompts):
        llm.reset_prefix_cache()
        return numbers(llm.generate(list(prompts), params, use_tqdm=False))

    def logprobs_beside_decodes(*prompts):
        llm.reset_prefix_cache()
        for prompt in prompts_of_lengths(5, 300, 900):
            llm.add_request(prompt, replace(params, max_tokens=16))
        for _ in range(4):
            llm.step()
        ids, outputs = [llm.add_request(prompt, params) for prompt in prompts], {}
        with recorded_dispatches(llm.runner) as shapes:
            while llm.has_unfinished_requests():
                outputs |= {output.request_id: output for output in llm.step()}
        assert (shapes[0].decode_rows, shapes[0].tokens) == (32, 16384)
        return numbers(outputs[request_id] for request_id in ids)

    alone = [logprobs(prompt)[0] for prompt in prompts]
    for together in (logprobs(*prompts), logprobs_beside_decodes(*prompts)):
        shared = [[(a[token], b[token]) for token in a.keys() & b.keys()] for a, b in zip(together, alone)]
        furthest = [np.abs(np.diff(np.array(pairs))).max() for pairs in shared]
        print("furthest log probabilities:", np.round(furthest, 4), "of", [len(pairs) for pairs in shared])
        assert all(len(pairs) >= 15 for pairs in shared)
        assert max(furthest) < 0.1


def test_full_load(tmp_path):
    """256 requests of 100 to 1024 tokens in and out, default options: no out-of-memory, nothing compiled on the way."""
    config = COMMON | SIZES["0.6B"] | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, load_format="dummy")
    stats = jax.devices()[0].memory_stats()
    assert stats["bytes_in_use"] < stats["bytes_limit"]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    rng = np.random.default_rng(0)
    prompts = prompts_of_lengths(*rng.integers(100, 1025, 256))
    params = [SamplingParams(temperature=0.6, max_tokens=int(n), ignore_eos=True) for n in rng.integers(100, 1025, 256)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(out["token_ids"]) for out in outputs] == [p.max_tokens for p in params]
    assert all(0 <= token < 151936 for out in outputs for token in out["token_ids"])
    assert not compiled
    llm.scheduler.check()


def test_transformers_agrees(checkpoint, tmp_path):
    """Greedy tokens wherever float32's gap exceeds bfloat16 noise, and the KL divergence of whole distributions."""
    llm = small_engine(checkpoint, **(dict(num_kvcache_blocks=MANY_BLOCKS) if "0.6B" in checkpoint.name else {}))
    prompts = prompts_of_lengths(1, 17, 256, 300, 512, 700)
    outputs = [out["token_ids"] for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
    ours = paged_logits(llm, prompts[-1])
    del llm
    gc.collect()
    sequences = {str(i): np.array(p + o) for i, (p, o) in enumerate(zip(prompts, outputs))}
    np.savez(tmp_path / "tokens.npz", **sequences)
    reference("score", checkpoint, tmp_path / "tokens.npz", tmp_path / "logits.npz")
    checked = 0
    with np.load(tmp_path / "logits.npz") as logits:
        for i, (prompt, output) in enumerate(zip(prompts, outputs)):
            rows, noise = logits[str(i)][len(prompt) - 1 : -1], NOISE * logits[f"noise_{i}"]
            top = np.sort(rows, axis=-1)
            clear = top[:, -1] - top[:, -2] > noise
            checked += clear.sum()
            behind = top[:, -1] - rows[np.arange(len(output)), output]
            print(f"prompt {i}: noise {noise:.3f}, {clear.sum()} clear, most behind {behind.max():.3f}")
            assert (behind[clear] == 0).all(), f"prompt {i}"
            assert behind.max() < noise, f"prompt {i}: not even a near tie"
        exact, theirs = (logits[name][: len(prompts[-1])] for name in (str(len(prompts) - 1), "rounded"))
    assert checked > 30, "too few positions with a clear winner to say anything"
    ours, theirs = kl_divergence(exact, ours), kl_divergence(exact, theirs)
    print(f"{checked} clear positions; mean KL from float32: {ours:.2e}, transformers' own bfloat16: {theirs:.2e}")
    # Rounding 36 layers' activations to bfloat16 may cost more than 1e-3 in itself. Then it may not cost us more.
    assert ours < max(1e-3, 1.1 * theirs)
