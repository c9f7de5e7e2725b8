"""What a model is, as its config.json says."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nanovllm_jax.layers.rope import RopeConfig

logger = logging.getLogger(__name__)
DTYPES = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# No model comes near these, and below them nothing that is computed from a config takes long or overflows. float32
# positions are exact up to the first.
LARGEST_SIZE = 2**24
MOST_LAYERS = 1024
ROPE_RANGES = {"rope_theta": (2, 1e12), "factor": (1, 1e6), "original_max_position_embeddings": (1, LARGEST_SIZE)}
ROPE_RANGES |= dict.fromkeys(("mscale", "mscale_all_dim"), (0, 1e3))  # 0 is as if it were not there


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3 model's shape, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    dtype: str = "float32"
    kv_copies: int = 1
    """How often each kv head is there: more than once where more devices share a model than it has kv heads."""

    def __post_init__(self):
        """Raise ValueError where no model can have this shape."""
        for f in fields(self):
            value = getattr(self, f.name)
            most = MOST_LAYERS if f.name == "num_hidden_layers" else LARGEST_SIZE
            if f.type is int and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"config.json: {f.name} must be an integer from 1 to {most}, not {value!r}")
            if f.type is bool and type(value) is not bool:
                raise ValueError(f"config.json: {f.name} must be true or false, not {value!r}")
        if type(self.rms_norm_eps) not in (int, float) or not 0 <= self.rms_norm_eps < 1:
            raise ValueError(f"config.json: rms_norm_eps must be a small positive number, not {self.rms_norm_eps!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim must be even, not {self.head_dim}")
        if not 2 <= self.max_context <= LARGEST_SIZE:
            raise ValueError(
                f"config.json: max_position_embeddings={self.max_position_embeddings} and the rope settings make a "
                f"context of {self.max_context} tokens, which must be from 2 to {LARGEST_SIZE}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"config.json: dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    @classmethod
    def from_pretrained(cls, directory: Path) -> "ModelConfig":
        """Of `directory`/config.json. Raises as `from_file` does."""
        return cls.from_file(directory / "config.json")

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read a config.json in the form of transformers 4 or 5.

        Raises ValueError for another architecture or a setting that this model code does not have.
        """
        raw = read_json(path)
        architecture = raw.get("architectures") or [raw.get("model_type")]
        architecture = architecture[0] if isinstance(architecture, list) else architecture
        if raw.get("model_type") != "qwen3" or architecture not in ("Qwen3ForCausalLM", "qwen3"):
            raise ValueError(
                f"{path}: this engine runs Qwen3ForCausalLM (model_type qwen3), "
                f"not {architecture} (model_type {raw.get('model_type')})"
            )
        for name in SIZES:  # for which transformers' defaults fit no weights
            if name not in raw:
                raise ValueError(f"{path} has no {name}")
        _refuse_unsupported(raw)
        values = {name: raw[name] for name in PLAIN_SETTINGS & raw.keys()}
        if values["num_key_value_heads"] is None:  # transformers reads it so
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.keys() < PLAIN_SETTINGS:
            # transformers knows the defaults. It is not given the file: it would act on more of it than is checked.
            from transformers import Qwen3Config  # which takes seconds, and published configs are complete

            defaults = Qwen3Config()
            values |= {name: getattr(defaults, name) for name in PLAIN_SETTINGS - values.keys()}
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        dtype = str(dtype).removeprefix("torch.")
        config = cls(**values, dtype="float32" if dtype in ("float64", "double") else dtype)
        return replace(config, rope=_read_rope(raw, config.max_position_embeddings))

    @property
    def max_context(self) -> int:
        """Longest context in tokens: max_position_embeddings, or what rope scaling extends it to (as in vLLM)."""
        base = self.rope.original_max_position_embeddings if self.rope.rope_type == "yarn" else None
        return int((base or self.max_position_embeddings) * self.rope.factor)

    @property
    def kv_heads(self) -> int:
        """Kv heads as the modules and the cache have them: with their copies."""
        return self.num_key_value_heads * self.kv_copies

    @property
    def num_parameters(self) -> int:
        """Number of weights, the tied head not counted twice."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        if self.attention_bias:
            attention += self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads) + self.hidden_size
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size + 2 * self.head_dim
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * layer + self.hidden_size

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token takes in all layers, copies included."""
        return self.num_hidden_layers * 2 * self.kv_heads * self.head_dim * itemsize


PLAIN_SETTINGS = {f.name for f in fields(ModelConfig)} - {"rope", "dtype", "kv_copies"}
"""What stands in config.json under its own name and as it is."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError naming the file when it is missing, no JSON or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: readers do not agree on which of two equal keys counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return content


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"config.json: hidden_act={activation!r} is not supported, only 'silu'")
    if raw.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window=true is not supported; no published Qwen3 sets it")
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError(f"config.json: layer_types={kinds!r} is not supported, only layers of 'full_attention'")
    quantization = raw.get("quantization_config")
    if quantization is not None:
        raise ValueError(
            f"config.json: quantization_config={quantization} is not supported; use the unquantized weights"
        )


def _read_rope(raw: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Rope settings from transformers 5's `rope_parameters` or 4's `rope_theta` and `rope_scaling`."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if new and old and new != old:
        raise ValueError(
            f"config.json has both rope_parameters={new!r} and rope_scaling={old!r}: put all into one of them"
        )
    settings = new or old or {}
    if not isinstance(settings, dict):
        raise ValueError(f"config.json: rope settings must be an object, not {settings!r}")
    if settings.get("truncate", True) is None:  # which transformers takes for false
        settings = settings | {"truncate": False}
    settings = {name: value for name, value in settings.items() if value is not None}
    if any(isinstance(value, dict) for value in settings.values()):
        raise ValueError(f"config.json: rope settings must be those of all layers, not of some kinds: {settings!r}")
    settings = {"rope_theta": raw.get("rope_theta", 10000.0), **settings}
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    if rope_type not in ("default", "linear", "yarn"):
        raise ValueError(f"config.json: rope_type={rope_type!r} is not supported, only default, linear and yarn")
    top = raw.get("original_max_position_embeddings")
    if rope_type == "yarn" and top is not None and settings.setdefault("original_max_position_embeddings", top) != top:
        raise ValueError(
            f"config.json has original_max_position_embeddings={top!r}, and another in its rope settings: {settings!r}"
        )
    partial = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rope_type != "default" and partial not in (None, 1):  # the default type has no use for it
        raise ValueError(f"config.json: partial_rotary_factor={partial!r} is not supported: whole heads are rotated")
    if rope_type == "yarn" and "attn_factor" in settings:  # DeepSeek-R1-0528-Qwen3-8B has it
        logger.warning(
            "config.json: the rope setting attn_factor=%s is read by vLLM, which multiplies by it, and neither here "
            "nor in transformers: set attention_factor to (0.1 ln(factor) + 1) attn_factor for what vLLM makes of it",
            settings["attn_factor"],
        )
    names = {field.name for field in fields(RopeConfig)} - {"rope_type"}
    counts = {"default": {"rope_theta"}, "linear": {"rope_theta", "factor"}}.get(rope_type, names)
    values = {name: value for name, value in settings.items() if name in counts}
    for name, value in values.items():
        _check_rope_setting(name, value)
    if rope_type == "linear" and "factor" not in values:
        raise ValueError("config.json: rope_type 'linear' needs a factor")
    if rope_type == "yarn":
        original = values.setdefault("original_max_position_embeddings", max_position_embeddings)
        values.setdefault("factor", max_position_embeddings / original)
    return RopeConfig(rope_type=rope_type, **values)


def _check_rope_setting(name: str, value: Any) -> None:
    least, most = ROPE_RANGES.get(name, (1e-3, 1e3))
    if name == "truncate":
        good, kind = type(value) is bool, "true or false"
    elif name == "original_max_position_embeddings":
        good, kind = type(value) is int and least <= value <= most, f"an integer from {least} to {most}"
    else:
        good, kind = type(value) in (int, float) and least <= value <= most, f"a number from {least:g} to {most:g}"
    if not good:
        raise ValueError(f"config.json: rope setting {name} must be {kind}, not {value!r}")
