"""What the scripts' options may be: types for argparse, which says in one line what is wrong with the rest.

And what is wrong where only the engine or the disk can tell.
"""

import json
import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PICTURES = (".png", ".svg", ".pdf")


def count(text: str) -> int:
    """1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no integer from 1 on")
    return int(text)


def seed(text: str) -> int:
    """Of a random generator, JAX's as well."""
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text) < 2**63:
        raise ArgumentTypeError(f"{text!r} is no integer of 64 bits")
    return int(text)


def above_zero(text: str) -> float:
    """A positive number."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def from_zero(text: str) -> float:
    """A number that is not negative."""
    number = _number(text)
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"{text!r} is no number from 0 on")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def checkpoint(text: str) -> Path:
    """A checkpoint's directory, or a Hub id: then its local copy."""
    from nanovllm_jax.checkpoints.load import find_checkpoint  # late: it imports jax, and not all scripts do

    try:
        return find_checkpoint(text).resolve()
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def new_directory(text: str) -> Path:
    """A directory to be written."""
    if not text:  # a variable of the shell that is not set: Path() would be the working directory
        raise ArgumentTypeError("the name is empty")
    return Path(text)


def new_file(text: str) -> Path:
    """A file to be written."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{text!r} is no file in a directory that is there")
    return path


def picture(text: str) -> Path:
    """A picture to be drawn, if that can be: said before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ArgumentTypeError("a picture needs matplotlib: pip install matplotlib")
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


def add_card(parser: ArgumentParser, *rates: str) -> None:
    """Options of a card's rates, in TB/s and TFLOP/s: of these, or of both."""
    from benchmark.limits import H200  # which imports jax: in launch.py Ctrl-C would be lost meanwhile

    units = {"bandwidth": ("TB/s", H200.bytes / 1e12), "flops": ("TFLOP/s", H200.flops / 1e12)}
    for rate in rates or units:
        unit, default = units[rate]
        text = f"the card's measured {unit} (H200, bf16: %(default)g)"
        parser.add_argument(f"--{rate}", type=above_zero, default=default, help=text)


@contextmanager
def refusals() -> Iterator[None]:
    """What the engine refuses ends the script in one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A file that cannot be written must not cost what was measured."""
    try:
        yield
    except OSError as error:
        print(f"{path} cannot be written: {error}", flush=True)
