"""A checkpoint's tokenizer and its end-of-sequence tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovllm_jax.config import read_json

# transformers and tokenizers do what these files ask for. They come from anywhere, so they may ask only for what a
# Qwen3's tokenizer needs: other classes reserve memory for any number of tokens, other parts rewrite text to any
# length, and the settings that are refused name files anywhere, or stand for Python objects.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
CLASSES = ("Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")  # or these and "Fast"
REFUSED_SETTINGS = (
    "__slow_tokenizer",
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
    "merges",
    "merges_file",
    "tokenizer_file",
    "tokenizer_object",
    "vocab",
    "vocab_file",
)
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PART_TYPES = ("ByteLevel", "Digits", "NFC", "Sequence", "Split", "TemplateProcessing")


def load_tokenizer(directory: Path) -> Any | None:
    """transformers' tokenizer, or None where the directory has none (weights alone serve token ids).

    Raises ValueError when its files cannot be read, or ask for more than byte-level BPE.
    """
    kind = tokenizer_class(directory)
    if kind is None:
        return None
    # Not AutoTokenizer: it would read the directory's config.json, of which only a part has been checked, and imports
    # torch where there is one, which takes seconds.
    from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast

    loader = Qwen2TokenizerFast if kind.startswith("Qwen2Tokenizer") else PreTrainedTokenizerFast
    try:
        tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        problem = _problem(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises plain Exceptions; its panics are not even these
        raise ValueError(f"{directory}: the tokenizer's files cannot be read: {error}") from error
    if problem:
        raise ValueError(f"{directory / 'tokenizer.json'}: {problem}")
    return tokenizer


def tokenizer_class(directory: Path) -> str | None:
    """What the tokenizer's files call it, None without any. Raises ValueError for what they must not ask for."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(f"{directory} has no tokenizer.json; save the tokenizer anew with transformers")
    settings = {name: _read_settings(directory / name) for name in SETTINGS_FILES}
    return settings["tokenizer_config.json"].get("tokenizer_class") or "Qwen2Tokenizer"


def _read_settings(path: Path) -> dict[str, Any]:
    """What a file says, where there is one; raises ValueError for what it must not say."""
    if not path.is_file():
        return {}
    settings = read_json(path)
    kind = settings.get("tokenizer_class")
    if kind is not None and str(kind).removesuffix("Fast") not in CLASSES:
        raise ValueError(f"{path}: tokenizer_class={kind!r} is not supported, only {', '.join(CLASSES)}")
    for name in REFUSED_SETTINGS:
        if settings.get(name) is not None:
            raise ValueError(f"{path}: {name}={settings[name]!r} is not supported; remove it")
    return settings


def _problem(tokenizer: Any) -> str | None:
    """What makes a tokenizer unfit; raises whatever it raises where it cannot even encode."""
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE":
        return f"model.type={type(backend.model).__name__!r} is not supported, only 'BPE'"
    for part in PARTS:
        value = getattr(backend, part)
        for kind in () if value is None else _types(json.loads(value.__getstate__())):
            if kind not in PART_TYPES:
                return f"{part}: the type {kind!r} is not supported, only {', '.join(PART_TYPES)}"
    tokenizer.decode(tokenizer.encode("A trial."))
    return None


def _types(value: Any) -> Iterator[str]:
    """The type of a part, and those of the parts in it."""
    if isinstance(value, dict):
        if "type" in value:
            yield value["type"]
        for inner in value.values():
            yield from _types(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _types(inner)


def stop_token_ids(directory: Path) -> frozenset[int]:
    """The tokens that end a text, as the tokenizer's own eos_token_id does: all of generation_config.json's.

    Without a generation_config.json, config.json's. Raises ValueError for ids that cannot be.
    """
    path = directory / "generation_config.json"
    path = path if path.is_file() else directory / "config.json"
    listed = read_json(path).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{path}: eos_token_id must be an integer or a list of them, none below 0, not {listed!r}")
    return frozenset(ids)
