"""What users give, numbers of any library too: checked, and kept as Python's."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """An array of any library (NumPy's, JAX') or its scalar, as a list or a Python number; all else as it is."""
    return np.asarray(value).tolist() if hasattr(value, "__array__") else value


def is_integer(value: Any) -> bool:
    """Whether this is an integer of any kind; True and False are none."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int, most: float, words: str, optional: bool = False) -> int | None:
    """The value as a Python integer, or None if that is allowed.

    Raises TypeError, naming it, for anything else, and ValueError, with the range in `words`, outside of it.
    """
    value = plain(value)
    if value is None and optional:
        return None
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer{' or None' if optional else ''}, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {words}, not {value}")
    return int(value)


def check_switch(name: str, value: Any) -> None:
    """Raise TypeError, naming it, for anything but True and False."""
    if type(value) is not bool:
        raise TypeError(f"{name} must be True or False, not {value!r}")


def number(name: str, value: Any, least: float, most: float, words: str) -> float:
    """The value as a Python float. Raises as `integer` does; NaN is outside of any range."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):  # the usual ones first, which are quick
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {words}, not {value}")
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf
