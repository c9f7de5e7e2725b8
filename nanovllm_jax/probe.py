"""Look inside a running engine: take activations out of the compiled step, and change its residual stream.

    probe = Probe(
        capture=["residual.2", "logits"],
        edit={"residual.3": lambda x, steering: x + steering[:, :1] * vector},
        steering_size=1,
    )
    llm = LLM(model, probe=probe)
    out = llm.generate(prompt, SamplingParams(capture=True, steering=4.0))[0]
    out.outputs[0].activations["residual.2"]  # [positions, D]

The functions are traced into the step's program like the model's own lines. Without a probe the programs are what they
were. Shapes: T tokens, R rows that sample, D hidden, V vocabulary, K numbers that a request steers by.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from nanovllm_jax.values import integer

Capture = Callable[[nnx.Module, jax.Array], jax.Array]
Edit = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class Probe:
    """What to take out of the step, and what to change in it.

    A place is "residual.3" (the residual stream after layer 3, counted from 0; [T, D]), "attention.3" (what layer 3's
    attention adds to it; [T, D]) or "logits" (the raw logits that a token is drawn from; [R, V] float32).
    """

    capture: Mapping[str, Capture | None] | Iterable[str] = ()
    """Places to take out, for requests with SamplingParams(capture=True). As a dict: by place a function
    f(model, x [rows, ...]) -> [rows, ...] of what to keep, or None for all of x."""
    edit: Mapping[str, Edit] = field(default_factory=dict)
    """By place, of those of the residual stream, a function f(x [T, D], steering [T, K] float32) -> [T, D], which layer
    i + 1 then reads. `steering` has for each token what its request brought, zeros where it brought nothing."""
    steering_size: int = 0
    """K: how many numbers SamplingParams(steering=...) brings. One is a strength, D of them are a vector."""

    def __post_init__(self):
        """Raise TypeError or ValueError for what can be no probe of any model."""
        capture = self.capture
        if isinstance(capture, str) or not isinstance(capture, Iterable) or not isinstance(self.edit, Mapping):
            raise TypeError(f"capture is a list or a dict of places, edit is a dict, not {capture!r} and {self.edit!r}")
        places = list(capture)
        for place in [*places, *self.edit]:
            _layer_of(place)
        capture = dict(capture) if isinstance(capture, Mapping) else dict.fromkeys(places)
        object.__setattr__(self, "capture", capture)
        for place, function in [*capture.items(), *self.edit.items()]:
            if not (callable(function) or function is None):
                raise TypeError(f"{place!r} needs a function, not {function!r}")
        for place, function in self.edit.items():
            if function is None:
                raise TypeError(f"an edit of {place!r} needs a function f(x, steering)")
            if not place.startswith("residual."):
                raise ValueError(f"only the residual stream can be edited ('residual.3'), not {place!r}")
        steering_size = integer("steering_size", self.steering_size, 0, math.inf, "at least 0")
        object.__setattr__(self, "steering_size", steering_size)

    def check(self, model: nnx.Module, dtype: jnp.dtype) -> None:
        """Raise ValueError, naming the place, where this (abstract) model lacks the layer or a function fails on it."""
        c, rows = model.config, 3
        steering = jax.ShapeDtypeStruct((rows, self.steering_size), jnp.float32)
        for place in [*self.capture, *self.edit]:
            number = _layer_of(place)
            if number is not None and number >= c.num_hidden_layers:
                raise ValueError(f"there is no {place!r}: the model's layers are 0 to {c.num_hidden_layers - 1}")
        for place, function in self.edit.items():
            x = jax.ShapeDtypeStruct((rows, c.hidden_size), dtype)
            _check_shape(f"edit of {place!r}", function, (x, steering), x.shape)
        for place, function in self.capture.items():
            x = jax.ShapeDtypeStruct((rows, c.hidden_size), dtype)
            if place == "logits":
                x = jax.ShapeDtypeStruct((rows, c.vocab_size), jnp.float32)
            if function is not None:
                _check_shape(f"capture of {place!r}", function, (model, x), (rows, ...))

    def watches(self, number: int) -> bool:
        """Whether anything is taken out or changed at this layer."""
        return any(_layer_of(place) == number for place in (*self.capture, *self.edit))


def _layer_of(place: str) -> int | None:
    """The layer of a place; None for the logits. Raises ValueError for what is no place."""
    match = re.fullmatch(r"logits|(?:residual|attention)\.(0|[1-9][0-9]*)", place) if isinstance(place, str) else None
    if match is None:
        raise ValueError(
            f"{place!r} is no place: there are 'logits', 'residual.0' and 'attention.0', and so for each layer"
        )
    return None if match[1] is None else int(match[1])


def _check_shape(what: str, function: Callable, args: tuple, wanted: tuple) -> None:
    """Raise ValueError where a user's function fails on such arguments, or gives another shape (...: any rest)."""
    shapes = " and ".join(str(list(arg.shape)) for arg in args if hasattr(arg, "shape"))
    try:
        got = jax.eval_shape(function, *args)
        shape = got.shape
    except Exception as error:
        raise ValueError(f"the {what} fails on arrays of shape {shapes}: {type(error).__name__}: {error}") from error
    if shape != wanted and not (wanted[-1] is ... and shape[:1] == wanted[:1]):
        rest = ", ..." if wanted[-1] is ... else f", {wanted[-1]}"
        raise ValueError(f"the {what} must give an array [{wanted[0]}{rest}] for {shapes}, not {list(shape)}")
