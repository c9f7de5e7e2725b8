"""The device side: what is compiled and when, where its memory goes, and what it says about that."""

import logging
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import SMALL, assert_idle, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.memory import MemoryPlan, decide_num_blocks, memory_stats
from nanovllm_jax.engine.model_runner import ModelRunner, _check_for_gpu
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.machine import GIB
from nanovllm_jax.models.parameters import parameters_of
from nanovllm_jax.models.qwen3 import MLP
from nanovllm_jax.sampling_params import MAX_LOGPROBS

GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("runner") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    """Whose cache, and rows, have other sizes than weights."""
    return small_llm(directory, num_kvcache_blocks=13)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """Where it does not matter what is computed."""
    return write_checkpoint(tmp_path_factory.mktemp("runner") / "one_layer", replace(SMALL, num_hidden_layers=1))


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_calling_every_program_changes_nothing(llm):
    """As a start on a GPU does, with nothing but padding."""
    prompts = [[3, 1, 4], [1, 5] * 9]
    params = SamplingParams(temperature=1, seed=5, max_tokens=9, ignore_eos=True, repetition_penalty=1.3)
    before = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    state = jax.tree.map(lambda array: np.asarray(array)[:-1], llm.runner.state)
    cache = np.asarray(llm.runner.cache)
    llm.runner._call_programs()
    np.testing.assert_array_equal(cache, llm.runner.cache)
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old, np.asarray(new)[:-1]), state, llm.runner.state)
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == before
    assert_idle(llm)


# --- compiled programs ---

_compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: _compiled.append(event) if event.startswith("/jax/core/compile") else None
)


@contextmanager
def compiles():
    """The list of what JAX traced, lowered and compiled meanwhile."""
    _compiled.clear()
    yield _compiled


def test_nothing_compiles_once_warm(llm):
    """A random workload in which sequences are batched, chunked, sampled, preempted, aborted and found in the cache."""
    rng = np.random.default_rng(0)
    with compiles() as seen:
        for _ in range(10):
            prompts = [rng.integers(0, 512, rng.integers(1, 100)).tolist() for _ in range(8)]
            prompts += [prompts[0] + [1], "some text"]
            params = [
                SamplingParams(temperature=float(rng.choice([0, 0.6])), max_tokens=int(rng.integers(1, 60)))
                for _ in prompts
            ]
            llm.generate(prompts, params, use_tqdm=False)
            aborted = llm.add_request(prompts[0])
            llm.step()
            llm.abort_request(aborted)
    assert_idle(llm)
    assert llm.scheduler.num_preemptions > 10
    assert llm.scheduler.num_prefix_hit_tokens > 100
    assert seen == []


def test_compiles_are_seen():
    """What the test above counts."""
    with compiles() as seen:
        jax.jit(lambda x: x + len(seen))(jnp.ones(3))
    assert seen


def test_the_cache_is_updated_in_place(directory):
    """Donated: every byte of the cache that goes in comes out at the same place, and no step has room for a copy."""
    llm = small_llm(directory, num_kvcache_blocks=4000)
    cache = llm.runner.cache.nbytes
    assert cache == 4000 * 16 * SMALL.kv_bytes_per_token(4) > 30e6
    for shape, program in llm.runner.programs.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= cache, shape
        assert memory.temp_size_in_bytes < cache / 10, shape
    before = llm.runner.cache.unsafe_buffer_pointer()
    llm.generate([[1] * 100, [2]], GREEDY, use_tqdm=False)
    assert llm.runner.cache.unsafe_buffer_pointer() == before


def test_weights_are_read_where_they_are(llm):
    """A step that decodes makes nothing of a weight's size: as XLA transposes a weight of three dimensions on a CPU."""
    sizes = {leaf.size for leaf in llm.runner.weights.leaves if leaf.ndim > 1}
    assert len(sizes) == 5
    for shape, program in llm.runner.programs.items():
        if not shape.prefill_rows:
            made = re.findall(r" = \w+\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text())
            large = {operation for dims, operation in made if math.prod(map(int, dims.split(","))) in sizes}
            assert large <= {"parameter", "bitcast", "get-tuple-element"}, shape


# --- eager ---


def test_eager_steps(tmp_path, monkeypatch, capsys, caplog):
    """They give the compiled steps' tokens, let a print inside the model see numbers, and warn that they are slow.

    So they do where 64-bit numbers have been switched on since the start.
    """
    config = replace(SMALL, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    write_checkpoint(tmp_path, config)
    options = dict(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=32, num_kvcache_blocks=4)
    compiled = small_llm(tmp_path, **options).generate([1, 2, 3], GREEDY, use_tqdm=False)
    forward = MLP.__call__

    def printing(self, norm, residual, delta):
        print("norm of x:", float(jnp.linalg.norm(delta.here)))  # float() fails on what jit traces
        return forward(self, norm, residual, delta)

    monkeypatch.setattr(MLP, "__call__", printing)
    eager = small_llm(tmp_path, enforce_eager=True, **options)
    assert any("slow" in record.message for record in caplog.records if record.levelno == logging.WARNING)
    with jax.enable_x64(True):
        assert tokens_of(eager.generate([1, 2, 3], GREEDY, use_tqdm=False)) == tokens_of(compiled)
    norms = re.findall(r"norm of x: ([\d.]+)", capsys.readouterr().out)
    assert len(norms) >= 2
    assert all(float(norm) > 0 for norm in norms)


# --- what stays of a step on the device ---


@pytest.mark.parametrize("logprobs", [None, 3])
def test_what_nobody_will_read_of_a_step_is_given_up(llm, monkeypatch, logprobs):
    """Before the next one is dispatched: else a GPU's temporaries move, and graphs are updated for that."""
    steps, dispatch, others = [], llm.runner.dispatch, jax.live_arrays()

    def noting(shape, buffer):
        arrays = {array.shape for array in jax.live_arrays() if not any(array is other for other in others)}
        steps.append((shape, {size for size in arrays if size[:1] == (1,)}))  # of one step; cache and state have more
        return dispatch(shape, buffer)

    monkeypatch.setattr(llm.runner, "dispatch", noting)
    params = replace(GREEDY, max_tokens=4, logprobs=logprobs)
    prompts = [[1 + i, 2, 3] * 20 for i in range(3)]  # of which a step takes one and a bit
    llm.generate(prompts, params, use_tqdm=False)
    assert len(steps) > 3
    assert steps[0][0].prefill_rows
    for (shape, _), (_, arrays) in pairwise(steps):
        tokens = 1, shape.rows
        assert arrays == ({tokens} if logprobs is None else {tokens, (*tokens, 2, 1 + MAX_LOGPROBS)})


# --- what a caller has set around its calls ---


def test_a_callers_mesh(one_layer):
    """A trainer's is not the engine's, whatever is traced within it: at the start, and when it is first asked for."""
    params = SamplingParams(temperature=0, max_tokens=4, repetition_penalty=1.5, prompt_logprobs=1)

    def answers(llm):
        llm.runner.scores.compiled.clear()
        [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
        return output.outputs[0].token_ids, llm.score([[6]], [[7, 8]], use_tqdm=False)

    expected = answers(small_llm(one_layer, num_kvcache_blocks=8))
    with jax.set_mesh(jax.make_mesh((1,), ("fsdp",))):
        llm = small_llm(one_layer, num_kvcache_blocks=8)
        assert answers(llm) == expected
        rounded = {path: np.asarray(array[...]).astype(np.float16) for path, array in parameters_of(llm.model).items()}
        llm.update_weights(rounded)
        llm.runner.reset()  # as after a step that failed
        within = answers(llm)
    assert within == answers(llm)


def test_a_callers_transfer_guard(one_layer):
    """A start under one that refuses transfers says so, and nothing of memory."""
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match=r"Disallowed .* transfer"):
        small_llm(one_layer, num_kvcache_blocks=8)


def test_no_memory_for_the_cache(one_layer, monkeypatch):
    """Says what takes less."""

    def allocate(runner):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    monkeypatch.setattr(ModelRunner, "_allocate", allocate)
    with pytest.raises(RuntimeError, match="no memory in one piece for a KV cache of 8 blocks: lower gpu_memory"):
        small_llm(one_layer, num_kvcache_blocks=8)


# --- the start-up log ---


def test_start_up_log(directory, caplog):
    """What was loaded, where the memory goes, how many blocks and tokens that is, what was compiled in how long."""
    small_llm(directory, num_kvcache_blocks=13)
    log = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("nanovllm_jax"))
    assert re.search(
        rf"loaded {directory} \(safetensors weights\): 0.000 billion parameters in float32, .* s$", log, re.M
    )
    assert re.search(r"GiB weights, .*GiB workspace, .*GiB cache = 13 blocks of 16 tokens = 208 tokens", log)
    assert re.search(r"max_model_len 128$", log, re.M)
    assert re.search(r"compiled 3 batch shapes and found 0 on disk, in \d+\.\d s", log)


# --- dtype ---


@pytest.mark.parametrize("dtype", ["bfloat16", "half"])
def test_dtype_option(one_layer, dtype):
    llm = small_llm(one_layer, dtype=dtype, max_num_seqs=1)
    wanted = jnp.dtype({"half": "float16"}.get(dtype, dtype))
    assert {leaf.dtype for leaf in llm.runner.weights.leaves} == {wanted}
    assert llm.runner.cache.dtype == wanted
    (output,) = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)
    assert len(output["token_ids"]) == 2


def test_a_cpu_computes_16_bit_checkpoints_in_float32(tmp_path):
    config = replace(SMALL, dtype="bfloat16")
    assert small_llm(write_checkpoint(tmp_path, config), num_kvcache_blocks=13).runner.dtype == np.float32


def test_a_gpu_needs_heads_of_a_power_of_two():
    _check_for_gpu(SMALL)
    with pytest.raises(ValueError, match=r"head_dim=96 is no power of two, .* a CPU can"):
        _check_for_gpu(replace(SMALL, head_dim=96))


def test_dummy_weights_need_only_a_config(tmp_path):
    write_checkpoint(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    llm = small_llm(tmp_path, load_format="dummy", num_kvcache_blocks=13)
    (output,) = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)
    assert len(output["token_ids"]) == 2


# --- how large the pool is ---


def plan(budget, weights=1.0, workspace=0.5, block=1e-3, rows=1024):
    return MemoryPlan(int(budget * GIB), int(weights * GIB), int(workspace * GIB), int(block * GIB), rows)


def test_blocks_fill_what_is_left_of_the_budget():
    """Rounded down to three digits, so that small differences between starts do not compile anew."""
    blocks = decide_num_blocks(plan(80.0), EngineConfig(), wanted=1)
    assert blocks == 78_500
    assert 1.5 * GIB + blocks * plan(80.0).block <= 80 * GIB
    assert decide_num_blocks(plan(80.0001), EngineConfig(), wanted=1) == blocks
    assert decide_num_blocks(plan(2.0), EngineConfig(), wanted=1) == 500


def test_keys_that_kernels_can_number():
    """Heads of few numbers in much memory: rows of the whole cache are counted in 32 bits."""
    few = plan(200.0, rows=2**15)
    assert decide_num_blocks(few, EngineConfig(), wanted=1) == 65_500 < 2**16 < (200 - 1.5) * GIB // few.block


def test_the_pool_by_hand():
    assert decide_num_blocks(plan(80.0), EngineConfig(num_kvcache_blocks=1234), wanted=1) == 1234


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (
            1.0,
            {},
            r"1.00 GiB \(gpu_memory_utilization=0.9\) less weights 1.00 and workspace 0.50 GiB leave room for 0 ",
        ),
        (2.0, dict(num_kvcache_blocks=501), "room for 500 blocks of 0.001 GiB; needed are 501. Raise gpu_memory"),
    ],
)
def test_memory_that_does_not_hold_the_model(budget, options, message):
    with pytest.raises(ValueError, match=message):
        decide_num_blocks(plan(budget), EngineConfig(**options), wanted=1)


def test_an_allocator_that_does_not_tell(monkeypatch):
    """As a CPU's does not, and a GPU's of some kinds."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    with pytest.raises(RuntimeError, match=r"XLA_PYTHON_CLIENT_ALLOCATOR='platform' does not tell .* unset it"):
        memory_stats(jax.devices("cpu")[0])


def test_each_sequence_has_whole_blocks(tmp_path):
    """Four of 20 tokens are 80, which five blocks hold, and none of them is for two."""
    write_checkpoint(tmp_path)
    assert small_llm(tmp_path, enforce_eager=True, max_model_len=20).runner.num_blocks == 8


def test_a_cpu_takes_what_is_wanted_within_a_gibibyte():
    on_cpu = replace(plan(1), budget=None)
    config = EngineConfig(block_size=16)
    assert decide_num_blocks(on_cpu, config, wanted=11) == 11
    assert decide_num_blocks(on_cpu, config, wanted=10**9) == 1000
    assert decide_num_blocks(replace(on_cpu, block=2 * GIB), config, wanted=10**9) == 1
