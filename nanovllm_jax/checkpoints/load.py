"""From a directory to a model on the devices."""

import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanovllm_jax.checkpoints.huggingface import load_parameters
from nanovllm_jax.checkpoints.random import random_parameters
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.parameters import parameter_targets, set_parameters
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.sharding import ShardingRules

TINY_MODEL = Path(__file__).parent.parent / "assets" / "tiny-qwen3"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def find_checkpoint(model: str | Path) -> Path:
    """The directory of a model: itself, or a Hugging Face Hub id's local copy, downloaded if need be.

    Raises ValueError when it is neither, or is not cached and cannot be downloaded.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a directory or a Hub id, not {model!r}")
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is no checkpoint: it has no config.json")
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise ValueError(f"model {str(model)!r} is neither a directory nor a Hub id of the form 'organisation/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except Exception as error:  # the Hub's client raises many kinds: offline, unknown, gated, no space
        raise ValueError(
            f"model {str(model)!r} is not a local directory, and it could not be had from the Hugging Face Hub or its "
            f"local cache ({type(error).__name__}: {error}). Offline, pass the directory of a downloaded checkpoint."
        ) from error


def load_model(
    directory: Path, config: ModelConfig, *, dtype: np.dtype, mesh: Mesh, load_format: str = "auto", seed: int = 0
) -> Qwen3ForCausalLM:
    """The model with its weights on the mesh, from the checkpoint or (`load_format="dummy"`) random."""
    model = nnx.eval_shape(lambda: Qwen3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    targets = parameter_targets(model, mesh, ShardingRules())
    dummy = load_format == "dummy"
    arrays = random_parameters(seed, targets) if dummy else load_parameters(directory, config, targets)
    set_parameters(model, jax.block_until_ready(arrays))
    return model
