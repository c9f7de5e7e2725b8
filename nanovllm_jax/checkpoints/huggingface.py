"""Hugging Face Qwen3 checkpoints: safetensors to modules and back.

A module's parameter may be several of the checkpoint's tensors: q, k and v are one array, and so are gate and up.
Every device's shard is read from the memory-mapped file straight into its place, so that a host never holds more
than one parameter's shard beside the mapping.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from xxhash import xxh3_128

from nanovllm_jax.checkpoints.orbax import FOLDER
from nanovllm_jax.config import DTYPES, PLAIN_SETTINGS, ModelConfig, read_json
from nanovllm_jax.models.parameters import ParameterPath, check_copies, check_model, is_here, parameters_of
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
SINGLE, INDEX, PARTS = "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"
ROWS_COMPARED = 4096  # at a time
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
STORED_DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32, "F64": jnp.float64}

Index = tuple[slice, ...]
Read = Callable[[str, Index], np.ndarray]


@dataclass(frozen=True)
class Source:
    """Where one parameter's numbers are in a checkpoint."""

    shapes: dict[str, tuple[int, ...]]
    """The tensors that it is made of, and their shapes."""
    join: Callable[[Read, Index], np.ndarray]
    """join(read, index): the parameter's part at `index`, from parts of the tensors."""
    split: Callable[[np.ndarray], list[np.ndarray]]
    """The tensors, from the whole parameter; the inverse of `join`."""


def _copied(name: str, shape: tuple[int, ...]) -> Source:
    return Source({name: shape}, lambda read, index: read(name, index), lambda array: [array])


def _fused_qkv(names: list[str], config: ModelConfig, width: int | None) -> Source:
    """q, k and v [heads * H, D] (or biases [heads * H]) as one [K, G + 2, H, D]: each kv head's parts together.

    K counts copies of kv heads, each with its share of the queries; the checkpoint has one.
    """
    kv_heads, copies, h = config.kv_heads, config.kv_copies, config.head_dim
    group = config.num_attention_heads // kv_heads
    heads_of = (group, 1, 1)  # how many heads of q, k and v belong to one kv head
    tail = () if width is None else (width,)

    def join(read: Read, index: Index) -> np.ndarray:
        first, last, _ = index[0].indices(kv_heads)
        rest = index[3:]
        parts = []
        for name, heads, repeats in zip(names, heads_of, (1, copies, copies)):
            start, stop = first // repeats, -(-last // repeats)  # of what the file has
            rows = read(name, (slice(start * heads * h, stop * heads * h), *rest))
            rows = rows.reshape(stop - start, heads, h, *rows.shape[1:])
            parts.append(rows if repeats == 1 else rows[np.arange(first, last) // repeats - start])
        return np.concatenate(parts, axis=1)

    def split(array: np.ndarray) -> list[np.ndarray]:
        check_copies(names[1], array, copies)
        parts = np.split(array, [group, group + 1], axis=1)
        parts[1:] = [part[::copies] for part in parts[1:]]
        return [np.ascontiguousarray(part).reshape(-1, *tail) for part in parts]

    heads_stored = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    shapes = {name: (heads * h, *tail) for name, heads in zip(names, heads_stored)}
    return Source(shapes, join, split)


def _stacked(names: list[str], shape: tuple[int, ...]) -> Source:
    """Tensors of one shape as one array with a new first axis."""
    return Source(
        dict.fromkeys(names, shape),
        lambda read, index: np.stack([read(name, index[1:]) for name in names[index[0]]]),
        lambda array: [np.ascontiguousarray(part) for part in array],
    )


def parameter_sources(config: ModelConfig) -> dict[ParameterPath, Source]:
    """For each parameter of Qwen3ForCausalLM, by its path: the checkpoint tensors that it is made of."""
    c = config
    d, f, q_width = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    sources: dict[ParameterPath, Source] = {
        ("embed_tokens", "weight"): _copied(TABLE, (c.vocab_size, d)),
        ("norm", "weight"): _copied("model.norm.weight", (d,)),
    }
    if not c.tie_word_embeddings:
        sources["lm_head", "weight"] = _copied(HEAD, (c.vocab_size, d))
    for i in range(c.num_hidden_layers):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        parts = {
            ("input_layernorm", "weight"): _copied(f"{layer}.input_layernorm.weight", (d,)),
            ("post_attention_layernorm", "weight"): _copied(f"{layer}.post_attention_layernorm.weight", (d,)),
            ("self_attn", "q_norm", "weight"): _copied(f"{attention}.q_norm.weight", (c.head_dim,)),
            ("self_attn", "k_norm", "weight"): _copied(f"{attention}.k_norm.weight", (c.head_dim,)),
            ("self_attn", "qkv_proj", "weight"): _fused_qkv([f"{attention}.{x}_proj.weight" for x in "qkv"], c, d),
            ("self_attn", "o_proj", "weight"): _copied(f"{attention}.o_proj.weight", (d, q_width)),
            ("mlp", "gate_up_proj", "weight"): _stacked(
                [f"{layer}.mlp.{x}_proj.weight" for x in ("gate", "up")], (f, d)
            ),
            ("mlp", "down_proj", "weight"): _copied(f"{layer}.mlp.down_proj.weight", (d, f)),
        }
        if c.attention_bias:
            biases = [f"{attention}.{x}_proj.bias" for x in "qkv"]
            parts["self_attn", "qkv_proj", "bias"] = _fused_qkv(biases, c, None)
            parts["self_attn", "o_proj", "bias"] = _copied(f"{attention}.o_proj.bias", (d,))
        sources |= {("layers", i, *path): source for path, source in parts.items()}
    return sources


class CheckpointFiles:
    """The safetensors files of a directory, memory-mapped, read by tensor name."""

    name = "safetensors"

    def __init__(self, directory: Path):
        """Raises ValueError when there is no checkpoint, or naming the file that is missing or corrupt."""
        self.directory = directory
        self.files = {}
        for path in self._paths():
            try:
                with path.open("rb"):  # safetensors finds no file where it may not read one
                    file = safe_open(path, framework="numpy")
                names = file.keys()
            except PermissionError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
            except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
                way_out = "download it again (with git that takes git-lfs)"
                raise ValueError(f"{path} is missing, truncated or corrupt: {error}; {way_out}") from error
            for name in names:
                if name in self.files:
                    raise ValueError(f"{path}: {name} is in another file of the checkpoint too")
                self.files[name] = file

    def _paths(self) -> list[Path]:
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.is_file():  # before an index, which an older, sharded checkpoint may have left; as in transformers
            return [single]
        if not index.is_file():
            raise ValueError(f"{self.directory} holds neither {single.name} nor {index.name}{self._other_weights()}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: weight_map must map tensor names to file names")
        for name in weight_map.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in the same directory")
        return [self.directory / name for name in sorted(set(weight_map.values()))]

    def _other_weights(self) -> str:
        """For a message: what is there in place of a checkpoint."""
        files = (path for path in self.directory.iterdir() if path.is_file())
        found = sorted(path.name for path in files if path.suffix in OTHER_WEIGHTS)
        if found and re.search(r"-of-\d+\.safetensors$", found[0]):
            return f", but {found[0]}: the index of such parts is missing, get it from where they are from"
        return f", but {found[0]}: load it with transformers, and save it by save_pretrained" if found else ""

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError naming the tensors that are missing, unexpected, of another shape or of no float dtype.

        Those that checkpoints may hold beside the model's own are left out from here on.
        """
        sources = parameter_sources(config).values()
        expected = {name: shape for source in sources for name, shape in source.shapes.items()}
        ignored = {HEAD} if config.tie_word_embeddings else set()
        missing = [f"{name} is missing" for name in expected if name not in self.files]
        problems = []
        for name, file in self.files.items():
            if name not in expected:
                if name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                    problems.append(f"{name} is unexpected")
                continue
            tensor = file.get_slice(name)
            shape, stored = tuple(tensor.get_shape()), tensor.get_dtype()
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
            if stored not in STORED_DTYPES:
                problems.append(f"{name} is stored as {stored}, not as one of {', '.join(STORED_DTYPES)}")
        if missing or problems:
            shown = (missing[: 8 - min(len(problems), 4)] + problems)[:8]
            rest = len(missing) + len(problems) - len(shown)
            more = f" and {rest} more" if rest else ""
            raise ValueError(f"{self.directory} does not fit its config.json: {'; '.join(shown)}{more}")
        if ignored & self.files.keys() and not self._are_equal(HEAD, TABLE):
            raise ValueError(
                f"{self.directory}: {HEAD} differs from {TABLE}, and by config.json's tie_word_embeddings=true it is "
                f"not read: set that to false, or take {HEAD} out of the checkpoint"
            )
        self.files = {name: self.files[name] for name in expected}

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, in the dtype of the second, which is a known one."""
        tensors = [self.files[name].get_slice(name) for name in (one, other)]
        (shape, stored), (expected, dtype) = ((tuple(tensor.get_shape()), tensor.get_dtype()) for tensor in tensors)
        if shape != expected or stored not in STORED_DTYPES:
            return False
        parts = (slice(row, min(row + ROWS_COMPARED, shape[0])) for row in range(0, shape[0], ROWS_COMPARED))
        pairs = ((self.read(one, (part,)), self.read(other, (part,))) for part in parts)
        return all(part.astype(STORED_DTYPES[dtype]).tobytes() == known.tobytes() for part, known in pairs)

    def sample(self) -> bytes:
        """A digest of each tensor's name and first row: another checkpoint has other ones."""
        digest = xxh3_128()
        for name in sorted(self.files):
            digest.update(f"{name}\n".encode() + self.read(name, (slice(0, 1),)).tobytes())
        return digest.digest()

    def check_arrays(self, config: ModelConfig, targets: dict[ParameterPath, jax.ShapeDtypeStruct]) -> None:
        """Nothing: by the tensors that `check` has passed, the targets' arrays are known."""

    @property
    def dtype(self) -> np.dtype:
        """What holds all weights exactly (float64 counts as float32), of files that `check` has passed."""
        stored = {file.get_slice(name).get_dtype() for name, file in self.files.items()}
        return jnp.result_type(*(STORED_DTYPES[name] for name in stored))

    def load(
        self, config: ModelConfig, targets: dict[ParameterPath, jax.ShapeDtypeStruct]
    ) -> dict[ParameterPath, jax.Array]:
        """Each parameter in its target's dtype, under its target's sharding, from files that `check` has passed."""
        sources = parameter_sources(config)

        def load(path: ParameterPath) -> jax.Array:
            target, join = targets[path], sources[path].join
            array = jax.make_array_from_callback(
                target.shape, target.sharding, lambda index: join(self.read, index).astype(target.dtype, copy=False)
            )
            return array.block_until_ready()  # or what waits for its copy would pile up

        with ThreadPoolExecutor(4) as pool:  # page-ins and copies to the device overlap
            return dict(zip(targets, pool.map(load, targets)))

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of one tensor, copied out of the mapping."""
        try:
            return self.files[name].get_slice(name)[index]
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{self.directory}: {name} cannot be read: {error}") from error


def make_target(directory: str | Path) -> Path:
    """A directory for `save_pretrained`, made where there is none.

    Raises OSError where it cannot be made, and ValueError where Orbax weights would be loaded in place of the new ones.
    """
    directory = Path(directory)
    if (directory / FOLDER).is_dir():
        raise ValueError(f"{directory} holds Orbax weights, which would be loaded in place of these: choose another")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def save_pretrained(model: Qwen3ForCausalLM, directory: str | Path, dtype: np.dtype | None = None) -> None:
    """Write config.json and model.safetensors that transformers opens; the tokenizer's files are the caller's.

    They take the place of a checkpoint that is there, in whatever number of files. Where several processes have parts
    of the model, all of them are to call this, and the first one writes.

    Raises as `make_target` does, TypeError for what is no Qwen3ForCausalLM, ValueError for a dtype that no checkpoint
    has and for copies of a kv head that differ, and OSError where the disk is full.
    """
    check_model(model)
    _check_dtype(dtype)
    directory, arrays = make_target(directory), {path: param[...] for path, param in parameters_of(model).items()}
    if all(map(is_here, arrays.values())):
        _write(((path, np.asarray(jax.device_get(arrays[path]))) for path in arrays), model.config, directory, dtype)
        return
    whole = []
    for path, array in arrays.items():  # to the end, before anything can fail in the one process that writes
        here = jax.device_get(array) if is_here(array) else multihost_utils.process_allgather(array, tiled=True)
        whole += [(path, np.asarray(here))] if jax.process_index() == 0 else []
    try:
        if whole:
            _write(whole, model.config, directory, dtype)
    finally:  # nobody reads what is not there yet
        multihost_utils.sync_global_devices(f"save_pretrained {directory}")


def _check_dtype(dtype: np.dtype | None) -> None:
    names = sorted({*DTYPES.values()})  # those that config.json may name
    with suppress(TypeError):  # what is no dtype at all
        if dtype is None or jnp.dtype(dtype).name in names:
            return
    raise ValueError(f"dtype must be one of {', '.join(names)}, not {dtype!r}")


def _write(
    arrays: Iterable[tuple[ParameterPath, np.ndarray]], config: ModelConfig, directory: Path, dtype: np.dtype | None
) -> None:
    sources, tensors = parameter_sources(config), {}
    for path, array in arrays:
        parts = sources[path].split(array if dtype is None else array.astype(dtype))
        tensors |= dict(zip(sources[path].shapes, parts))
    weights, config_file = directory / SINGLE, directory / "config.json"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{weights} cannot be written: {error}") from error
    written = str(next(iter(tensors.values())).dtype)
    config_file.write_text(json.dumps(config_json(config, written), indent=2) + "\n")
    shutil.copymode(config_file, weights)  # safetensors lets nobody but the owner read them
    for part in (directory / INDEX, *directory.glob(PARTS)):  # some readers, as vLLM, would take them and not this file
        part.unlink(missing_ok=True)


def config_json(config: ModelConfig, dtype: str) -> dict:
    """A config in the form that transformers 4.51 and later read, published Qwen3 checkpoints' own."""
    rope = config.rope
    scaling = {name: value for name, value in vars(rope).items() if name != "rope_theta" and value is not None}
    if rope.rope_type == "linear":
        scaling = {"rope_type": "linear", "factor": rope.factor}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.rope_type == "default" else scaling,
        "torch_dtype": dtype,
        "use_sliding_window": False,
        **{name: getattr(config, name) for name in sorted(PLAIN_SETTINGS)},
    }
