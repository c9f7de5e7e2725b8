"""Settings: what the model is (from its config.json) and how the engine runs it (from the user)."""

import difflib
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nanovllm_jax.layers.rope import RopeConfig
from nanovllm_jax.probe import Probe
from nanovllm_jax.sampling_params import plain

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
        """Read `directory`/config.json in the form of transformers 4 or 5.

        Raises ValueError for another architecture or a setting that this model code does not have.
        """
        raw = read_json(directory / "config.json")
        architecture = raw.get("architectures") or [raw.get("model_type")]
        architecture = architecture[0] if isinstance(architecture, list) else architecture
        if raw.get("model_type") != "qwen3" or architecture not in ("Qwen3ForCausalLM", "qwen3"):
            raise ValueError(
                f"{directory / 'config.json'}: this engine runs Qwen3ForCausalLM (model_type qwen3), "
                f"not {architecture} (model_type {raw.get('model_type')})"
            )
        for name in SIZES:  # for which transformers' defaults fit no weights
            if name not in raw:
                raise ValueError(f"{directory / 'config.json'} has no {name}")
        _refuse_unsupported(raw)
        names = {f.name for f in fields(cls)} - {"rope", "dtype", "kv_copies"}
        values = {name: raw[name] for name in names & raw.keys()}
        if values.keys() < names:
            # transformers knows the defaults. It is not given the file: it would act on more of it than is checked.
            from transformers import Qwen3Config  # which takes seconds, and published configs are complete

            defaults = Qwen3Config()
            values |= {name: getattr(defaults, name) for name in names - values.keys()}
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        config = cls(**values, dtype=str(dtype).removeprefix("torch."))
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError naming the file when it is missing, no JSON or no object.
    """
    import json

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
    if activation != "silu":
        raise ValueError(f"config.json: hidden_act={activation!r} is not supported, only 'silu'")
    if raw.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window=true is not supported; no published Qwen3 sets it")
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
    settings = {name: value for name, value in settings.items() if value is not None}
    settings = {"rope_theta": raw.get("rope_theta", 10000.0), **settings}
    rope_type = settings.get("rope_type") or settings.pop("type", None) or "default"
    if rope_type not in ("default", "linear", "yarn"):
        raise ValueError(f"config.json: rope_type={rope_type!r} is not supported, only default, linear and yarn")
    values = {f.name: settings[f.name] for f in fields(RopeConfig) if settings.get(f.name) is not None}
    values.pop("rope_type", None)
    for name, value in values.items():
        _check_rope_setting(name, value)
    original = values.get("original_max_position_embeddings")
    counts = {"default": ("rope_theta",), "linear": ("rope_theta", "factor")}.get(rope_type, values)
    values = {name: value for name, value in values.items() if name in counts}
    if rope_type == "linear" and "factor" not in values:
        raise ValueError("config.json: rope_type 'linear' needs a factor")
    if rope_type == "yarn":
        if original is None:
            original = values["original_max_position_embeddings"] = max_position_embeddings
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


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model. Names and meaning are vLLM's and nano-vllm's."""

    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens. None: the model's own limit, or what the cache can hold."""
    max_num_seqs: int | None = None
    """Most sequences that run at a time. None: 512 on a GPU, 32 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step. None: 16,384 on a GPU, 1,024 on a CPU."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, workspace and KV cache together."""
    num_scheduler_steps: int | None = None
    """Tokens that one program decodes for each of up to 128 sequences when nobody waits. None: 4 on a GPU where
    model and contexts are so small that it would wait for the host, else 1."""
    tensor_parallel_size: int = 1
    """Number of devices that the model is spread over."""
    data_parallel_size: int = 1
    """Number of such groups of devices, each with sequences and a cache of its own."""
    distributed: bool = False
    """This script runs in several processes, which share the model: JAX finds them, as under SLURM, or what follows."""
    coordinator_address: str | None = None
    """host:port of process 0, on a port that is free there."""
    num_processes: int | None = None
    """How many run this script."""
    process_id: int | None = None
    """Which of them this one is, counted from 0."""
    enforce_eager: bool = False
    """Run the step un-jitted: slow, but prints and a debugger work inside the model."""
    block_size: int = 256
    """Tokens in one block of the KV cache: a power of two from 16 to 256."""
    num_kvcache_blocks: int | None = None
    """Size of the block pool. None: what gpu_memory_utilization leaves; on a CPU at most 1 GiB."""
    enable_prefix_caching: bool = True
    """Reuse the keys and values of prompt prefixes that were computed before."""
    dtype: str = "auto"
    """auto (the checkpoint's own; on a CPU float32 in place of 16 bits), float32, bfloat16 or float16."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own."""
    deterministic: bool = False
    """A request's logits are the same to the last bit whatever the batch and the chunks: slower, and on one device."""
    load_format: str = "auto"
    """auto: read the checkpoint; dummy: random weights, only config.json is needed."""
    compilation_cache_dir: str | Path | None = "~/.cache/nanovllm_jax"
    """Where compiled programs are kept between runs; None keeps none."""
    probe: Probe | None = None
    """What to take out of the compiled step, and what to change in it."""

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """Build from keyword options, refusing unknown names (TypeError) and values that cannot be (ValueError)."""
        if "kvcache_block_size" in options:  # nano-vllm's name
            if "block_size" in options:
                raise TypeError("block_size and kvcache_block_size are the same option; give one of them")
            options["block_size"] = options.pop("kvcache_block_size")
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, "kvcache_block_size"], n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
                raise TypeError(f"LLM() has no option {name!r}{hint}")
        return cls(**options)

    def __post_init__(self):
        """Raise ValueError or TypeError for a value out of range."""
        optional = (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_kvcache_blocks",
            "num_scheduler_steps",
            "num_processes",
            "process_id",
        )
        for name in (*optional, "tensor_parallel_size", "data_parallel_size", "block_size", "seed"):
            value = plain(getattr(self, name))
            if value is None and name in optional:
                continue
            if type(value) is not int:
                raise TypeError(f"{name} must be an integer, not {value!r}")
            object.__setattr__(self, name, value)
            least = {"max_model_len": 2, "process_id": 0}.get(name, 1)  # one token of the prompt, one generated
            if value < least and name != "seed":
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if (self.num_scheduler_steps or 1) > LARGEST_SIZE:
            raise ValueError(f"num_scheduler_steps must be at most {LARGEST_SIZE}, not {self.num_scheduler_steps}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, not {self.seed}")
        for name in ("enforce_eager", "enable_prefix_caching", "deterministic", "distributed"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.deterministic and self.tensor_parallel_size * self.data_parallel_size > 1:
            raise ValueError(
                f"deterministic=True runs on one device, not on tensor_parallel_size={self.tensor_parallel_size} times "
                f"data_parallel_size={self.data_parallel_size}: sums over devices are added up in an order that "
                "depends on the batch"
            )
        if self.block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size must be 16, 32, 64, 128 or 256, not {self.block_size}")
        utilization = plain(self.gpu_memory_utilization)
        object.__setattr__(self, "gpu_memory_utilization", utilization)
        if type(utilization) not in (int, float):
            raise TypeError(f"gpu_memory_utilization must be a number, not {utilization!r}")
        if not 0 < utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, not {utilization!r}")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format must be 'auto' or 'dummy', not {self.load_format!r}")
        if not (self.probe is None or isinstance(self.probe, Probe)):
            raise TypeError(f"probe must be a Probe or None, not {self.probe!r}")
        if self.probe and (self.tensor_parallel_size, self.data_parallel_size) != (1, 1):
            raise ValueError(
                "a probe needs the whole model on one device: tensor_parallel_size=1, data_parallel_size=1"
            )
        self._check_processes()
        if not isinstance(self.compilation_cache_dir, (str, Path, type(None))):
            raise TypeError(f"compilation_cache_dir must be a directory or None, not {self.compilation_cache_dir!r}")

    def _check_processes(self) -> None:
        address, count, number = self.coordinator_address, self.num_processes, self.process_id
        if (address, count, number) == (None, None, None):
            return
        if None in (address, count, number):
            raise ValueError(
                "coordinator_address, num_processes and process_id go together; without them, distributed=True leaves "
                f"it to JAX to find the processes. Given were {address!r}, {count!r} and {number!r}"
            )
        if not isinstance(address, str) or not re.fullmatch(r"\S+:\d+", address):
            raise ValueError(f"coordinator_address must be of the form 'host:port', not {address!r}")
        if number >= count:
            raise ValueError(f"process_id={number} must be below num_processes={count}: they count from 0")
