"""Programs for the log probabilities of prompts, each compiled when it is first asked for: few requests want them."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec as Spec

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.models.step import prompt_hidden, prompt_logprobs, prompt_rows
from nanovllm_jax.models.step_programs import StepPrograms
from nanovllm_jax.parallel.backend import compiler_options
from nanovllm_jax.parallel.sharding import DATA_AXIS, per_device, specs_of

HIDDEN = Spec(None, DATA_AXIS)


class ScorePrograms:
    """What goes on from the output of an engine's steps, as compiled functions of (weights, ...)."""

    def __init__(self, steps: StepPrograms):
        """`steps`: the engine's own."""
        self.steps = steps
        self.compiled: dict[BatchShape | str, Callable] = {}

    def hidden(self, shape: BatchShape) -> Callable:
        """models/step.py's `prompt_hidden` of a batch shape: (weights, cache, stream, buffer) -> (hidden, cache)."""
        if shape not in self.compiled:
            cache = specs_of(self.steps.layout()[0])
            function, in_specs = partial(prompt_hidden, shape=shape), (cache, HIDDEN, Spec(DATA_AXIS))
            self.compiled[shape] = self._jit(function, in_specs, (HIDDEN, cache), shape.tokens, donate=1)
        return self.compiled[shape]

    @property
    def rows(self) -> Callable:
        """models/step.py's `prompt_rows`: (hidden, rows) -> array. One program for each T, which compiles quickly.

        So `logprobs`, which takes a second to compile, is one for all.
        """
        if "rows" not in self.compiled:
            whole = per_device(prompt_rows, self.steps.mesh, (HIDDEN, Spec()), Spec())
            self.compiled["rows"] = jax.jit(whole, compiler_options=compiler_options(self.steps.mesh, rows=1))
        return self.compiled["rows"]

    def logprobs(self, size: int) -> Callable:
        """models/step.py's `prompt_logprobs` of always `size` tokens: (weights, hidden, tokens, num_top) -> array."""
        if "logprobs" not in self.compiled:
            self.compiled["logprobs"] = self._jit(prompt_logprobs, (Spec(), Spec(), Spec()), Spec(), size)
        return self.compiled["logprobs"]

    def _jit(self, function: Callable, in_specs, out_specs, rows: int, donate: int | tuple[int, ...] = ()) -> Callable:
        weights = self.steps.weights  # and no self, which would refer to itself by its programs

        def program(arguments, *args):
            return function(weights.model(arguments), *args)

        whole = per_device(program, self.steps.mesh, (specs_of(weights.arguments), *in_specs), out_specs)
        return jax.jit(whole, donate_argnums=donate, compiler_options=compiler_options(self.steps.mesh, rows))
