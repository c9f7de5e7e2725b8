"""Between Hugging Face's and Orbax's form of a checkpoint, bit for bit (float64 as float32); the source says which way.

python scripts/convert.py SOURCE TARGET       writes a complete checkpoint: weights, config, tokenizer
python scripts/convert.py --time DIRECTORY    how long its weights take to the devices that JAX finds
"""

import argparse
import shutil
import time
from pathlib import Path

import jax
from options import new_directory

from nanovllm_jax.checkpoints.huggingface import save_pretrained
from nanovllm_jax.checkpoints.load import ModelLoader, find_checkpoint, open_weights
from nanovllm_jax.checkpoints.orbax import FOLDER, save_weights
from nanovllm_jax.config import ModelConfig, read_json
from nanovllm_jax.parallel.sharding import make_mesh

# What a checkpoint has beside its weights.
OTHER_FILES = ("*.json", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")


def loader_of(source: Path) -> ModelLoader:
    """In the dtype that is stored."""
    config, files = ModelConfig.from_pretrained(source), open_weights(source)
    files.check(config)
    return ModelLoader(source, config, dtype=files.dtype, mesh=make_mesh(1))


def convert(source: Path, target: Path) -> None:
    """Write source's weights in the other form, and its other files with them.

    Raises ValueError where target holds another model, or weights in the other form.
    """
    loader, to_orbax = loader_of(source), not (source / FOLDER).is_dir()
    config = target / "config.json"
    if config.exists() and read_json(config) != read_json(source / "config.json"):
        raise ValueError(f"{target} holds another model: its config.json is not that of {source}")
    if ((target / FOLDER).is_dir() and not to_orbax) or (any(target.glob("*.safetensors")) and to_orbax):
        raise ValueError(f"{target} holds weights in the form of {source} already: choose another directory")
    target.mkdir(parents=True, exist_ok=True)
    model = loader.load()
    if to_orbax:
        save_weights(model, target)
    else:
        save_pretrained(model, target)
    for pattern in OTHER_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a directory or Hub id")
    parser.add_argument("target", nargs="?", type=new_directory, help="the directory to write")
    parser.add_argument("--time", action="store_true", help="load source to the devices, and say how long it takes")
    args = parser.parse_args()
    if args.time == (args.target is not None):
        parser.error("give a target directory or --time, one of them")
    if not args.time:
        jax.config.update("jax_platforms", "cpu")
    try:
        source = find_checkpoint(args.source)
        start = time.perf_counter()
        if args.time:
            loader = loader_of(source)
            opened = time.perf_counter()
            loader.load()
            size, read, seconds = loader.device_bytes / 1e9, time.perf_counter() - opened, time.perf_counter() - start
            print(
                f"{source} ({loader.source}): {size:.2f} GB read in {read:.2f} s, {size / read:.2f} GB/s; "
                f"{seconds:.2f} s with checks"
            )
        else:
            convert(source, args.target)
            print(f"{args.target}: written in {time.perf_counter() - start:.1f} s")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
