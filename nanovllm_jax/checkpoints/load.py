"""From a directory to a model on the devices."""

import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanovllm_jax.checkpoints.huggingface import CheckpointFiles
from nanovllm_jax.checkpoints.orbax import FOLDER, OrbaxWeights
from nanovllm_jax.checkpoints.random import random_parameters
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.machine import GIB, host_memory
from nanovllm_jax.models.parameters import abstract_model, set_parameters
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM

TINY_MODEL = Path(__file__).parent.parent / "assets" / "tiny-qwen3"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
UNUSED_HUB_FILES = ["*/*.json", "*/*.safetensors", "*/*.txt", "consolidated*"]  # what a training run left, and copies


def find_checkpoint(model: str | Path) -> Path:
    """The directory of a model: itself, or a Hugging Face Hub id's local copy, downloaded if need be.

    Raises TypeError for what is no name, and ValueError when it is neither, or is not cached and cannot be downloaded.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a directory or a Hub id, not {model!r}")
    directory = Path(os.path.expanduser(model))
    if model != "" and os.path.isdir(directory):
        return _with_config(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise ValueError(f"model {str(model)!r} is neither a directory nor a Hub id of the form 'organisation/name'")
    from huggingface_hub import snapshot_download

    try:
        files = dict(allow_patterns=HUB_FILES, ignore_patterns=UNUSED_HUB_FILES)
        snapshot = Path(snapshot_download(str(model), **files))
    except Exception as error:  # the Hub's client raises many kinds: offline, unknown, gated, no space
        raise ValueError(
            f"model {str(model)!r} is not a local directory, and it could not be had from the Hugging Face Hub or its "
            f"local cache ({type(error).__name__}: {error}). Offline, pass the directory of a downloaded checkpoint."
        ) from error
    return _with_config(snapshot)


def _with_config(directory: Path) -> Path:
    if not os.access(directory, os.R_OK | os.X_OK):
        raise ValueError(f"cannot read {directory}: no permission")
    if os.path.isfile(directory / "config.json"):
        return directory
    if os.path.isfile(directory / "adapter_config.json"):
        raise ValueError(f"{directory} is an adapter: merge it into its base model, and save that, as by PEFT")
    raise ValueError(f"{directory} is no checkpoint: it has no config.json")


def open_weights(directory: Path) -> CheckpointFiles | OrbaxWeights:
    """A checkpoint's weights, in the form that is there: Orbax where both are.

    Raises ValueError when there are none, or naming what is missing or corrupt.
    """
    return OrbaxWeights(directory) if (directory / FOLDER).is_dir() else CheckpointFiles(directory)


class ModelLoader:
    """A model whose shapes are known, and whose files are checked, before its weights are read."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        *,
        dtype: np.dtype,
        mesh: Mesh,
        load_format: str = "auto",
        seed: int = 0,
        deterministic: bool = False,
    ):
        """Weights come from the checkpoint, or (`load_format="dummy"`) are random.

        Raises ValueError for files that are missing, corrupt or do not fit the config.
        """
        self.config, self.seed = config, seed
        self.files = None if load_format == "dummy" else open_weights(directory)
        # Before anything is built from the config: it may have been written to ask for more than there is.
        if self.files:
            self.files.check(config)
        else:
            _check_room(directory, config, dtype, mesh)
        self.model, self.targets = abstract_model(config, dtype, mesh, deterministic)  # until `load`
        if self.files:
            self.files.check_arrays(config, self.targets)

    def sample(self) -> bytes | None:
        """What tells one checkpoint from another, without reading all of it; None of random weights."""
        return self.files.sample() if self.files else None

    @property
    def source(self) -> str:
        """What the weights come from: safetensors, Orbax or random."""
        return self.files.name if self.files else "random"

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on each device."""
        shards = (math.prod(t.sharding.shard_shape(t.shape)) * t.dtype.itemsize for t in self.targets.values())
        return sum(shards)

    def load(self) -> Qwen3ForCausalLM:
        """The model with its weights on the mesh."""
        if self.files:
            arrays = self.files.load(self.config, self.targets)
        else:
            arrays = random_parameters(self.seed, self.targets, self.config.kv_copies)
        set_parameters(self.model, jax.block_until_ready(arrays))
        return self.model


def load_model(directory: Path, config: ModelConfig, **options: Any) -> Qwen3ForCausalLM:
    """A model with its weights; the options, and what they raise, are ModelLoader's."""
    return ModelLoader(directory, config, **options).load()


def _check_room(directory: Path, config: ModelConfig, dtype: np.dtype, mesh: Mesh) -> None:
    """Raise ValueError for random weights beyond a CPU's memory; a GPU's own allocator refuses."""
    size = config.num_parameters * np.dtype(dtype).itemsize
    if mesh.devices.flat[0].platform == "cpu" and size > host_memory():
        raise ValueError(
            f"{directory / 'config.json'} asks for {size / GIB:.2f} GiB of random weights, more than this machine's "
            f"{host_memory() / GIB:.2f} GiB of memory"
        )
