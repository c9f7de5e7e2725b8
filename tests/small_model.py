"""A small Qwen3 with random weights and the embedded model's tokenizer, which needs neither torch nor training."""

import json
import shutil

import numpy as np
from safetensors.numpy import save_file

from nanovllm_jax import LLM
from nanovllm_jax.checkpoints.huggingface import config_json, parameter_sources
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=512,
)
# Engines with these options compile three programs, and one after another finds them in the tests' compilation cache.
OPTIONS = dict(block_size=16, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)


def random_tensors(config, seed=0, scale=0.15):
    """Float32 tensors under the checkpoint's names, large enough for greedy text to wander."""
    rng, tensors = np.random.default_rng(seed), {}
    for source in parameter_sources(config).values():
        for name, shape in source.shapes.items():
            values = rng.standard_normal(shape, np.float32)
            tensors[name] = 1 + 0.2 * values if "norm" in name else scale * values
    return tensors


def write_checkpoint(directory, config=SMALL, tensors=None, eos_token_id=511):
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files; returns `directory`."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(config, config.dtype)))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    save_file(random_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
    for file in TINY_MODEL.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def small_llm(directory, **options):
    return LLM(directory, **(OPTIONS | options))


def assert_idle(llm):
    """No request is left, and blocks and slots are all free."""
    assert not llm._requests
    assert not llm.scheduler.has_unfinished
    llm.scheduler.check()


def join(outputs):
    """Streamed outputs put together: of each request in order of arrival, of each of its texts, what `whole` has."""
    joined, ended = {}, set()
    for output in outputs:
        request = joined.setdefault(int(output.request_id), {})
        assert output.request_id not in ended, "something comes after the last output"
        assert output.outputs, "an output without news"
        for completion in output.outputs:
            assert completion.token_ids
            text, tokens, reason = request.get(completion.index, ("", [], None))
            assert reason is None, "a text goes on after its end"
            text, tokens = text + completion.text, tokens + completion.token_ids
            request[completion.index] = text, tokens, completion.finish_reason
        if output.finished:
            ended.add(output.request_id)
    assert {int(request_id) for request_id in ended} == set(joined)
    return [[request[index] for index in sorted(request)] for _, request in sorted(joined.items())]


def whole(outputs):
    """Text, tokens and finish reason of each text of each output."""
    return [[(c.text, c.token_ids, c.finish_reason) for c in output.outputs] for output in outputs]
