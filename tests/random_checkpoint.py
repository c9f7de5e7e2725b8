"""Small random Qwen3 checkpoints, written by transformers itself."""

import json

import pytest

# A shape of every kind that published sizes have, in small: group sizes 1, 2, 4, 5 and 8, tied and untied heads, a
# head_dim that is not hidden / heads, biases, and each rope scaling in the config.json forms of transformers 4 and 5.
SHAPES = {
    "group2_tied": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "group4_untied": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16),
    "group5_bias": dict(num_attention_heads=5, num_key_value_heads=1, head_dim=16, attention_bias=True),
    "group8_yarn": dict(
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=32,
        rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=128),
        max_position_embeddings=512,
    ),
    "group1_linear": dict(
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    ),
    "group2_old_yarn": dict(  # written in transformers 4's form, see rewrite_config_in_old_form
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=256, beta_fast=16.0
        ),
        max_position_embeddings=512,
    ),
}


def write_random_checkpoint(directory, old_form=False, max_shard_size="50GB", **shape):
    """A Qwen3 of this shape with random weights, saved by transformers. Returns the transformers model."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = dict(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.15,  # large enough for the greedy text to wander
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        bos_token_id=None,
        eos_token_id=319,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | shape))).eval()
    for name, parameter in model.named_parameters():  # norms and biases start as ones and zeros, which hide mistakes
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if old_form:
        rewrite_config_in_old_form(directory / "config.json")
    return model


def rewrite_config_in_old_form(path):
    """Turn transformers 5's rope_parameters and dtype into 4's rope_theta, rope_scaling and torch_dtype."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
