"""Orbax checkpoints: a directory like Hugging Face's, in which the weights are in the folder `orbax` instead.

Each save goes to a folder of its own under it, numbered, which gets its name when all of it is written: an interrupted
save leaves the one before. Weights are stored under the modules' own names, so that they fit any mesh, and in small
chunks, of which each device reads those that it has a part of.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.parameters import (
    ParameterPath,
    check_model,
    check_parameters,
    name_of,
    parameters_of,
    with_heads,
)
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM

FOLDER = "orbax"
CHUNK_BYTES = 16 << 20
# The fastest to restore of those that were measured, see docs/research.md.
STORAGE = dict(use_ocdbt=True, use_zarr3=True, use_compression=False)


def saved_weights(directory: Path) -> Path | None:
    """The folder of the last complete save in a checkpoint's directory."""
    folder = directory / FOLDER
    saves = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return max(saves, key=lambda path: int(path.name), default=None)


def save_weights(model: Qwen3ForCausalLM, directory: str | Path) -> None:
    """Write a model's weights; an older save in the directory goes when this one is complete.

    The other files of a checkpoint, config.json and the tokenizer's, are the caller's. Raises TypeError for what is no
    Qwen3ForCausalLM, and ValueError for a model of an engine with more devices than kv heads.
    """
    check_model(model)
    if model.config.kv_copies > 1:
        raise ValueError(
            f"each kv head is there {model.config.kv_copies} times, as the engine has more devices than kv heads: save "
            "the weights that came into it, or with checkpoints.huggingface.save_pretrained, which leaves copies out"
        )
    directory = Path(directory).absolute()
    last, folder = saved_weights(directory), directory / FOLDER
    ocp, tree = _import_orbax(), {name_of(path): param[...] for path, param in parameters_of(model).items()}
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    path = folder / str(1 if last is None else int(last.name) + 1)
    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=options))
    if jax.process_index() == 0:
        for other in folder.iterdir():  # older saves, and what is left of interrupted ones
            if other != path and other.is_dir():
                shutil.rmtree(other)


class OrbaxWeights:
    """The weights in a checkpoint's directory, which are looked at before they are read."""

    name = "Orbax"

    def __init__(self, directory: Path):
        """Raises ValueError naming the folder where it cannot be read."""
        path = saved_weights(directory)
        if path is None:
            raise ValueError(f"{directory / FOLDER} holds no complete checkpoint: was its first save interrupted?")
        self.path = path.absolute()
        try:
            with _checkpointer() as checkpointer:
                self.stored = dict(checkpointer.metadata(self.path).item_metadata.tree)
        except Exception as error:  # Orbax and its storage raise many kinds
            raise ValueError(f"{self.path} is no Orbax checkpoint, or corrupt: {error}") from error

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the weights cannot be this model's, before anything is built from its config."""
        stored = sum(math.prod(array.shape) for array in self.stored.values())
        if stored != config.num_parameters:
            raise ValueError(
                f"{self.path} holds another model: {stored} weights, where config.json makes {config.num_parameters}"
            )

    def sample(self) -> bytes:
        """The arrays' names, shapes and dtypes: none of the numbers, which lie in chunks of many megabytes."""
        return repr(sorted((name, array.shape, str(array.dtype)) for name, array in self.stored.items())).encode()

    def check_arrays(self, config: ModelConfig, targets: dict[ParameterPath, jax.ShapeDtypeStruct]) -> None:
        """Raise ValueError naming the arrays that are not those of the targets."""
        paths = {name_of(path): path for path in targets}
        stored = {paths.get(name, name): array for name, array in self.stored.items()}
        try:
            check_parameters(stored, _as_saved(config, targets), kinds=object)  # as yet without their numbers
        except ValueError as error:
            raise ValueError(f"{self.path} holds another model: {error}") from error

    @property
    def dtype(self) -> np.dtype:
        """What holds all weights exactly; float64 counts as float32."""
        return jax.numpy.result_type(*(array.dtype for array in self.stored.values()))

    def load(
        self, config: ModelConfig, targets: dict[ParameterPath, jax.ShapeDtypeStruct]
    ) -> dict[ParameterPath, jax.Array]:
        """Each parameter in its target's dtype, under its target's sharding: a device reads its own parts alone.

        (Of projections that get copies of kv heads all.) Raises ValueError naming the folder where it is corrupt.
        """
        saved = _as_saved(config, targets)
        wanted = {name_of(path): array for path, array in saved.items()}
        ocp = _import_orbax()
        restore = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        try:
            with _checkpointer() as checkpointer:
                arrays = checkpointer.restore(self.path, args=restore)
        except Exception as error:
            raise ValueError(f"{self.path} is corrupt: {error}") from error
        loaded = {path: arrays[name_of(path)] for path in targets}
        if fused := [path for path in targets if saved[path] is not targets[path]]:
            shardings = [targets[path].sharding for path in fused]
            copy = jax.jit(lambda arrays: [with_heads(a, config.kv_heads) for a in arrays], out_shardings=shardings)
            loaded |= zip(fused, copy([loaded[path] for path in fused]))
        return loaded


def _as_saved(
    config: ModelConfig, targets: dict[ParameterPath, jax.ShapeDtypeStruct]
) -> dict[ParameterPath, jax.ShapeDtypeStruct]:
    """The targets as they were saved, with one copy of each kv head: those that have more are whole on every device."""
    saved, copies = dict(targets), config.kv_copies
    for path, target in targets.items():
        if copies > 1 and "qkv_proj" in path:
            heads, parts, *rest = target.shape
            shape, mesh = (heads // copies, (parts - 2) * copies + 2, *rest), target.sharding.mesh
            saved[path] = jax.ShapeDtypeStruct(shape, target.dtype, sharding=NamedSharding(mesh, Spec()))
    return saved


@contextmanager
def _checkpointer() -> Iterator[Any]:
    ocp = _import_orbax()
    with _own_logging(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**STORAGE)) as checkpointer:
        yield checkpointer


def _import_orbax() -> ModuleType:
    """orbax.checkpoint, only when it is needed: its import takes long."""
    with _own_logging():
        import orbax.checkpoint as ocp
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax says at every call what it does
    return ocp


@contextmanager
def _own_logging() -> Iterator[None]:
    """The import and each use of Orbax take over the program's logging, through absl: give it back."""
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = before
