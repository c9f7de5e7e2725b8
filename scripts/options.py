"""What the scripts' options may be: types for argparse, which says in one line what is wrong with the rest."""

import json
import math
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

PICTURES = (".png", ".svg", ".pdf")


def count(text: str) -> int:
    """1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no integer from 1 on")
    return int(text)


def above_zero(text: str) -> float:
    """A positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def checkpoint(text: str) -> Path:
    """A checkpoint's directory, or a Hub id: then its local copy."""
    from nanovllm_jax.checkpoints.load import find_checkpoint  # late: it imports jax, and not all scripts do

    try:
        return find_checkpoint(text).resolve()
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def new_file(text: str) -> Path:
    """A file to be written."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{text!r} is no file in a directory that is there")
    return path


def picture(text: str) -> Path:
    """A picture to be drawn."""
    if Path(text).suffix not in PICTURES:
        raise ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURES)}")
    return new_file(text)


def json_object(text: str) -> dict[str, Any]:
    """Settings by name."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is no JSON object")
    return value
