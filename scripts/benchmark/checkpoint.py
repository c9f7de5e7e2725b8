"""Write a checkpoint with random weights: `python -m benchmark.checkpoint CONFIG DIRECTORY`.

CONFIG is a config.json, under any name. The weights are bfloat16, norms one and all else normal. The embedded model's
tokenizer goes with them, as nano-vllm starts only with one; ids beyond its vocabulary decode to nothing.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp

from nanovllm_jax.checkpoints.huggingface import save_pretrained
from nanovllm_jax.checkpoints.load import TINY_MODEL, load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.parallel.sharding import make_mesh


def main() -> None:
    write_random_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))


def write_random_checkpoint(config: Path, directory: Path) -> None:
    """The weights come last: a directory that has them has all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        written = Path(scratch) / "checkpoint"
        written.mkdir()
        shutil.copy(config, written / "config.json")
        model_config = ModelConfig.from_pretrained(written)
        model = load_model(written, model_config, dtype=jnp.dtype("bfloat16"), mesh=make_mesh(1), load_format="dummy")
        save_pretrained(model, written)
        for file in TINY_MODEL.glob("tokenizer*"):
            shutil.copy(file, written)
        directory.mkdir(exist_ok=True)
        for name in sorted((file.name for file in written.iterdir()), key="model.safetensors".__eq__):
            (written / name).replace(directory / name)


if __name__ == "__main__":
    main()
