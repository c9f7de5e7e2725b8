"""config.json in all its forms, and the settings of an engine."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib import xla_client
from small_model import SMALL

from nanovllm_jax import Probe
from nanovllm_jax.checkpoints.huggingface import config_json, parameter_sources
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.layers.rope import RopeConfig
from nanovllm_jax.parallel.backend import prepare_backend

# What the sizes that Qwen publishes have in their config.json, and what they have in common.
PUBLISHED = {
    # size: (hidden, mlp, layers, query heads, tied head, billion parameters)
    "0.6B": (1024, 3072, 28, 16, True, 0.596),
    "1.7B": (2048, 6144, 28, 16, True, 1.721),
    "4B": (2560, 9728, 36, 32, True, 4.022),
    "8B": (4096, 12288, 36, 32, False, 8.191),
    "14B": (5120, 17408, 40, 40, False, 14.768),
    "32B": (5120, 25600, 64, 64, False, 32.762),
}
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def published(size):
    hidden, mlp, layers, heads, tied, _ = PUBLISHED[size]
    return COMMON | {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


@pytest.fixture
def read(tmp_path):
    """read(config) -> the ModelConfig of a directory with this config.json."""

    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelConfig.from_pretrained(tmp_path)

    return read


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


# --- config.json ---


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(read, size):
    hidden, mlp, layers, heads, tied, billions = PUBLISHED[size]
    config = read(published(size))
    assert config == ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=RopeConfig(rope_theta=1e6),
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    assert config.kv_bytes_per_token(2) == layers * 2 * 8 * 128 * 2
    assert config.max_context == 40960


@pytest.mark.parametrize(
    ("setting", "same"), [({"num_key_value_heads": None}, {"num_key_value_heads": 16}), ({"hidden_act": "swish"}, {})]
)
def test_other_words_for_the_same(read, setting, same):
    """As transformers reads them."""
    raw = published("0.6B")
    assert raw["num_attention_heads"] == 16
    assert read(raw | setting) == read(raw | same)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_num_parameters_counts_every_tensor(bias, tied):
    config = replace(SMALL, attention_bias=bias, tie_word_embeddings=tied)
    shapes = [shape for source in parameter_sources(config).values() for shape in source.shapes.values()]
    assert config.num_parameters == sum(map(math.prod, shapes))


ROPES = {
    # transformers 5's rope_parameters, and 4's rope_theta and rope_scaling
    "default": (dict(rope_type="default", rope_theta=1e6), 1e6, None),
    "linear": (
        dict(rope_type="linear", rope_theta=1e4, factor=2.0),
        1e4,
        dict(type="linear", factor=2.0),  # the key of old versions
    ),
    "yarn": (
        dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768, beta_fast=16.0),
        1e6,
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, beta_fast=16.0),
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_old_and_new_forms_are_one_config(read, rope):
    new, theta, old = ROPES[rope]
    base = without(published("4B"), "rope_theta", "rope_scaling", "torch_dtype")
    config = read(base | {"rope_parameters": new, "dtype": "bfloat16"})
    assert config == read(base | {"rope_theta": theta, "rope_scaling": old, "torch_dtype": "bfloat16"})
    assert (config.rope.rope_type, config.rope.rope_theta) == (new["rope_type"], theta)
    assert config.dtype == "bfloat16"
    assert read(config_json(config, "bfloat16")) == config, "what is written is read back"


def test_what_an_old_config_may_leave_out(read):
    config = read(without(published("0.6B"), "rope_theta", "rope_scaling", "torch_dtype", "attention_bias"))
    assert (config.rope, config.dtype, config.attention_bias) == (RopeConfig(rope_theta=1e4), "float32", False)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 40960),
        (dict(rope_type="default", factor=2.0), 40960),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),  # Qwen's own advice
        (dict(rope_type="linear", factor=2.0), 81920),
    ],
)
def test_rope_scaling_extends_the_context(read, scaling, context):
    assert read(published("8B") | {"rope_scaling": scaling}).max_context == context


def test_yarns_first_context_may_be_beside_its_settings(read):
    """As transformers 5 has it."""
    scaling = {"rope_type": "yarn", "factor": 4.0}
    beside = read(published("8B") | {"rope_scaling": scaling, "original_max_position_embeddings": 32768})
    assert beside == read(published("8B") | {"rope_scaling": scaling | {"original_max_position_embeddings": 32768}})
    assert beside.max_context == 131072


BAD_CONFIGS = {
    "another architecture": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "Qwen3ForCausalLM.*LlamaFor",
    ),
    "mixture of experts": ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "not Qwen3MoeFor"),
    "another head": ({"architectures": ["Qwen3ForSequenceClassification"]}, "not Qwen3ForSequenceClassification"),
    "no type": ({"architectures": None, "model_type": None}, "Qwen3ForCausalLM.*None"),
    "architectures of another kind": ({"architectures": "Qwen3ForCausalLM", "model_type": 3}, "Qwen3ForCausalLM"),
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
    "negative size": ({"hidden_size": -64}, "hidden_size.*-64"),
    "size of a wrong type": ({"vocab_size": "many"}, "vocab_size.*many"),
    "fraction": ({"intermediate_size": 96.5}, "intermediate_size.*96.5"),
    "odd head_dim": ({"head_dim": 65}, "head_dim"),
    "heads do not divide": ({"num_attention_heads": 10, "num_key_value_heads": 4}, "=10 must be a multiple.*=4"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4096},
        "layer_types=.*'sliding_attention'.*only layers of 'full_attention'",
    ),
    "kinds of layers of a wrong type": ({"layer_types": "full_attention"}, "layer_types='full_attention'"),
    "dtype": ({"torch_dtype": "int8"}, "dtype must be one of.*not 'int8'"),
    "flag of a wrong type": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*yes"),
    "negative eps": ({"rms_norm_eps": -1}, "rms_norm_eps.*-1"),
    "eps of a wrong type": ({"rms_norm_eps": "small"}, "rms_norm_eps.*small"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope'.*linear and yarn"),
    "rope in both forms": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "both rope_parameters=.*default.* and rope_scaling=.*yarn.*: put all into one",
    ),
    "rope no object": ({"rope_scaling": "yarn"}, "rope settings must be an object, not 'yarn'"),
    "rope theta": ({"rope_theta": 0}, "rope_theta must be a number from 2 to 1e\\+12, not 0"),
    "rope factor": (
        {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
        "factor must be a number from 1 to 1e\\+06, not '4'",
    ),
    "rope of a part": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 is not supported: whole heads",
    ),
    "rope of a part, beside its settings": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5 is not supported: whole heads",
    ),
    "rope by kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        "rope settings must be those of all layers, .*full_attention",
    ),
    "rope's first context twice": (
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            "original_max_position_embeddings": 128,
        },
        "original_max_position_embeddings=128, and another in its rope settings.*256",
    ),
    "linear without a factor": ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs a factor"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(read, case):
    change, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message) as caught:
        read(published("0.6B") | change)
    assert "config.json" in str(caught.value)


def test_what_says_the_same_in_more_words(read):
    """As transformers 5 writes it, and a setting of which its default rope makes no use."""
    words = {"layer_types": ["full_attention"] * published("0.6B")["num_hidden_layers"]}
    words |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}}
    words |= {"partial_rotary_factor": 0.5}
    assert read(published("0.6B") | words) == read(published("0.6B"))


def test_settings_without_a_value(read):
    """As transformers reads them: YaRN's truncate without one is false, and a weight of 0 is none."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

    def rope(**more):
        return read(published("8B") | {"rope_scaling": yarn | more}).rope

    assert rope(truncate=None) == rope(truncate=False) != rope()
    assert rope(factor=None).factor == 40960 / 32768
    assert rope(mscale=0, mscale_all_dim=0).scale == rope().scale
    unused = {"rope_type": "default", "rope_theta": 1e6, "attention_factor": 0}
    assert read(published("0.6B") | {"rope_parameters": unused}) == read(published("0.6B"))


def test_float64_counts_as_float32(read):
    for name in ("float64", "double", "torch.float64"):
        assert read(published("0.6B") | {"torch_dtype": name}).dtype == "float32"


def test_what_vllm_reads_and_transformers_does_not(read, caplog):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(published("8B") | {"rope_scaling": yarn})
    assert not caplog.records
    assert read(published("8B") | {"rope_scaling": yarn | {"attn_factor": 0.878}}) == config
    assert "attn_factor=0.878 is read by vLLM" in caplog.text


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_size_left_out_is_named(read, name):
    """transformers would fill in its own default, which fits no weights."""
    with pytest.raises(ValueError, match=f"config.json.* {name}"):
        read(without(published("0.6B"), name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("[1, 2]", "must hold a JSON object, not list"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


# --- EngineConfig ---


def test_both_names_of_the_block_size():
    assert EngineConfig.from_options(kvcache_block_size=64) == EngineConfig(block_size=64)
    assert EngineConfig.from_options() == EngineConfig(block_size=256)


UNKNOWN_OPTIONS = {
    "max_model_length": "max_model_len",
    "max_num_seq": "max_num_seqs",
    "tensor_parallel": "tensor_parallel_size",
    "gpu_memory_utilisation": "gpu_memory_utilization",
    "kv_cache_block_size": "kvcache_block_size",
    "enforce_eagre": "enforce_eager",
    "num_gpu_blocks": "num_kvcache_blocks",
}


@pytest.mark.parametrize("name", UNKNOWN_OPTIONS)
def test_an_unknown_option_names_the_nearest(name):
    with pytest.raises(TypeError, match=rf"no option '{name}'; did you mean '{UNKNOWN_OPTIONS[name]}'\?"):
        EngineConfig.from_options(**{name: 1})


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(TypeError, match=r"no option 'xyz'; the options are max_model_len, .*load_format"):
        EngineConfig.from_options(xyz=1)


BAD_OPTIONS = [
    (dict(block_size=32, kvcache_block_size=32), TypeError, "block_size and kvcache_block_size are the same option"),
    (dict(block_size=48), ValueError, "block_size must be 16, 32, 64, 128 or 256, not 48"),
    (dict(block_size=8), ValueError, "not 8"),
    (dict(kvcache_block_size=512), ValueError, "not 512"),
    (dict(block_size=None), TypeError, "block_size must be an integer, not None"),
    (dict(max_model_len=0), ValueError, "max_model_len must be at least 2, not 0"),
    (dict(max_model_len=1), ValueError, "max_model_len must be at least 2, not 1"),
    (dict(max_model_len="4096"), TypeError, "max_model_len must be an integer or None, not '4096'"),
    (dict(max_model_len=4096.0), TypeError, "max_model_len must be an integer or None, not 4096.0"),
    (dict(max_num_seqs=0), ValueError, "max_num_seqs must be at least 1, not 0"),
    (dict(max_num_batched_tokens=-1), ValueError, "max_num_batched_tokens must be at least 1, not -1"),
    (dict(num_kvcache_blocks=0), ValueError, "num_kvcache_blocks must be at least 1, not 0"),
    (dict(num_scheduler_steps=0), ValueError, "num_scheduler_steps must be from 1 to 16777216, not 0"),
    (dict(num_kvcache_blocks=True), TypeError, "num_kvcache_blocks must be an integer or None, not True"),
    (dict(tensor_parallel_size=0), ValueError, "tensor_parallel_size must be at least 1, not 0"),
    (dict(tensor_parallel_size=None), TypeError, "tensor_parallel_size must be an integer, not None"),
    (dict(seed=2**64), ValueError, f"seed must be within 64 bits, not {2**64}"),
    (dict(seed=None), TypeError, "seed must be an integer, not None"),
    (dict(enforce_eager=1), TypeError, "enforce_eager must be True or False, not 1"),
    (dict(enable_prefix_caching=None), TypeError, "enable_prefix_caching must be True or False, not None"),
    (dict(gpu_memory_utilization=0), ValueError, "above 0 and at most 1, not 0"),
    (dict(gpu_memory_utilization=90), ValueError, "above 0 and at most 1, not 90"),
    (dict(gpu_memory_utilization=float("nan")), ValueError, "above 0 and at most 1, not nan"),
    (dict(gpu_memory_utilization="0.9"), TypeError, "gpu_memory_utilization must be a number, not '0.9'"),
    (dict(dtype="int8"), ValueError, "dtype must be auto, float32, .*not 'int8'"),
    (dict(dtype=np.float32), ValueError, "dtype must be auto, float32, .*numpy.float32"),
    (dict(dtype=np.array([1, 2])), ValueError, "dtype must be auto, float32, "),
    (dict(load_format="gguf"), ValueError, "load_format must be 'auto' or 'dummy', not 'gguf'"),
    (dict(load_format=None), ValueError, "load_format must be 'auto' or 'dummy', not None"),
    (dict(compilation_cache_dir=3), TypeError, "compilation_cache_dir must be a directory or None, not 3"),
]


def test_integers_of_any_kind():
    options = EngineConfig(max_model_len=np.int64(64), seed=jnp.int32(3), gpu_memory_utilization=np.float32(0.5))
    assert options == EngineConfig(max_model_len=64, seed=3, gpu_memory_utilization=0.5)
    assert {type(value) for value in (options.max_model_len, options.seed)} == {int}
    assert type(options.gpu_memory_utilization) is float
    assert Probe(steering_size=np.int64(3)).steering_size == 3


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_option(options, error, message):
    with pytest.raises(error, match=message):
        EngineConfig.from_options(**options)


def test_64_bit_numbers_are_refused():
    with jax.enable_x64(True), pytest.raises(ValueError, match="jax_enable_x64 is set"):
        prepare_backend(EngineConfig())


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", None])
def test_a_users_share_of_the_memory_counts(monkeypatch, name):
    """Under its newer and its older name; JAX refuses both at once."""
    for each in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(each, "")  # which counts as not set
    if name:
        monkeypatch.setenv(name, "0.3")
    prepare_backend(EngineConfig(gpu_memory_utilization=0.6))
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == (0.3 if name else 0.6)


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn"])
def test_what_is_saved_is_read_again(read, rope_type):
    """With settings that do not count among those that do, and one that is null."""
    rope = dict(rope_type=rope_type, factor=2.0, original_max_position_embeddings=512, beta_fast=16.0, rope_theta=None)
    config = read(published("4B") | {"rope_theta": 1e6, "rope_scaling": rope})
    assert config.rope.rope_theta == 1e6
    assert read(config_json(config, "bfloat16")) == config
