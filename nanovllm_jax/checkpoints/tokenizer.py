"""A checkpoint's tokenizer and its end-of-sequence tokens."""

from pathlib import Path
from typing import Any

from nanovllm_jax.config import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def load_tokenizer(directory: Path) -> Any | None:
    """transformers' tokenizer, or None where the directory has none (weights alone serve token ids).

    Raises ValueError when its files cannot be read.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(f"{directory}: the tokenizer's files cannot be read: {error}") from error


def stop_token_ids(directory: Path, tokenizer: Any | None) -> frozenset[int]:
    """Every token that ends a text: all of generation_config.json's eos_token_id, and the tokenizer's own.

    Without a generation_config.json, config.json's. Raises ValueError for ids that are no integers.
    """
    path = directory / "generation_config.json"
    path = path if path.is_file() else directory / "config.json"
    listed = read_json(path).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"{path}: eos_token_id must be an integer or a list of them, not {listed!r}")
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(ids if own is None else [*ids, own])
