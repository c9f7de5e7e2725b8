"""An engine's programs before they are compiled: what they are made from, and what goes into them."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jax.stages import Lowered

from nanovllm_jax import kernels
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.kernels import Peers
from nanovllm_jax.kernels.exchange import capacity
from nanovllm_jax.models.draw import DeviceState
from nanovllm_jax.models.flat_model import FlatModel
from nanovllm_jax.models.parameters import abstract_model
from nanovllm_jax.models.step import StepOutput, engine_step
from nanovllm_jax.parallel.backend import compiler_options
from nanovllm_jax.parallel.peers import peers_layout
from nanovllm_jax.parallel.sharding import DATA_AXIS, MODEL_AXIS, gather_groups, make_mesh, per_device, specs_of

HOST = "pinned_host"  # JAX's name for the host's memory that a GPU writes


class ProgramSettings(NamedTuple):
    """All that decides an engine's programs, beside the source, JAX and its settings, and the devices; for pickling."""

    config: EngineConfig
    model_config: ModelConfig
    """As `split_config` returns it."""
    dtype: np.dtype
    max_num_seqs: int
    num_blocks: int
    """Of each data group."""
    reach: bool = False
    """parallel.peers.reach_one_another."""


class StepPrograms:
    """The step of each batch shape, as functions of (weights, cache, state, buffer, peers)."""

    def __init__(self, settings: ProgramSettings, mesh: Mesh, weights: FlatModel):
        """`weights`: with shardings on `mesh`."""
        self.settings, self.mesh, self.weights = settings, mesh, weights
        self.by_group = NamedSharding(mesh, Spec(DATA_AXIS))
        is_one_gpu = mesh.size == 1 and mesh.devices.flat[0].platform == "gpu"
        # One GPU writes tokens where the host reads them: else they are asked for when the step has ended.
        tokens = NamedSharding(mesh, Spec(), memory_kind=HOST) if is_one_gpu else None
        self.output_shardings = StepOutput(tokens, logprobs=None, hidden=None, activations=None)

    @classmethod
    def of(cls, settings: ProgramSettings) -> "StepPrograms":
        """Those of these settings, with a mesh and a model's shapes made for them."""
        config = settings.config
        mesh = make_mesh(config.tensor_parallel_size, config.data_parallel_size)
        model, _ = abstract_model(settings.model_config, settings.dtype, mesh, config.deterministic)
        return cls(settings, mesh, FlatModel(model))

    def layout(self) -> tuple[jax.ShapeDtypeStruct, DeviceState]:
        """Shapes and shardings of the cache and of the device's state."""
        s, c, probe = self.settings, self.settings.model_config, self.settings.config.probe
        groups = self.mesh.shape[DATA_AXIS]
        slots = groups * (s.max_num_seqs + 1)
        split = NamedSharding(self.mesh, Spec(DATA_AXIS, MODEL_AXIS))
        # One array for all layers: the host pays for each that comes back from a step, in place though it is.
        shape = 2, c.num_hidden_layers, groups * s.num_blocks, c.kv_heads, s.config.block_size, c.head_dim
        pages = NamedSharding(self.mesh, Spec(None, None, DATA_AXIS, MODEL_AXIS))
        cache = jax.ShapeDtypeStruct(shape, s.dtype, sharding=pages)
        state = DeviceState(
            last_tokens=jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=self.by_group),
            token_counts=jax.ShapeDtypeStruct((slots, c.vocab_size), jnp.int32, sharding=split),
            logit_bias=jax.ShapeDtypeStruct((slots, c.vocab_size), jnp.float32, sharding=split),
            steering=probe and jax.ShapeDtypeStruct((slots, probe.steering_size), jnp.float32, sharding=self.by_group),
        )
        return cache, state

    @cached_property
    def peers(self) -> Peers | None:
        """Shapes and shardings of what devices exchange sums by; None if they do it by collectives alone."""
        config, model = self.settings.config, self.settings.model_config
        if not self.settings.reach or config.enforce_eager or model.attention_bias:  # which each would add to its part
            return None
        return peers_layout(self.mesh, model.hidden_size, self.settings.dtype)

    def exchanges(self, shape: BatchShape) -> bool:
        """Whether devices add up what they have of a layer by themselves: else, and of many rows, collectives do."""
        row = self.settings.model_config.hidden_size, self.settings.dtype.itemsize
        return self.peers is not None and shape.tokens <= capacity(self.mesh.shape[MODEL_AXIS], *row)

    def arguments(self, shape: BatchShape) -> tuple[Any, ...]:
        """Shapes and shardings of what a step is called with."""
        buffer = jax.ShapeDtypeStruct((self.mesh.shape[DATA_AXIS] * shape.size,), jnp.int32, sharding=self.by_group)
        return self.weights.arguments, *self.layout(), buffer, self.peers

    def function(self, shape: BatchShape) -> Callable:
        """The step of all devices, as a function of whole arrays."""
        donated = specs_of(self.layout())
        output = StepOutput(tokens=Spec(), logprobs=Spec(), hidden=Spec(None, DATA_AXIS), activations=Spec())
        in_specs = (specs_of(self.weights.arguments), *donated, Spec(DATA_AXIS), specs_of(self.peers))
        return per_device(partial(self._step, shape), self.mesh, in_specs, (output, *donated))

    def lower(self, shape: BatchShape) -> Lowered:
        """The step, ready to be compiled."""
        out_shardings = (self.output_shardings, *jax.tree.map(lambda array: array.sharding, self.layout()))
        step = jax.jit(self.function(shape), donate_argnums=(1, 2), out_shardings=out_shardings)
        with kernels.traced_for(self.mesh.devices.flat[0].platform):
            return step.lower(*self.arguments(shape))

    def compiler_options(self, shape: BatchShape) -> dict[str, bool | str]:
        """XLA's flags for a shape's step."""
        return compiler_options(self.mesh, shape.tokens)

    def _step(self, shape: BatchShape, weights, cache, state, buffer, peers):
        model = self.weights.model(weights)
        static = dict(shape=shape, probe=self.settings.config.probe)
        peers = peers if self.exchanges(shape) else None
        output, cache, state = engine_step(model, cache, state, buffer, peers, **static)
        tokens, logprobs = map(gather_groups, (output.tokens, output.logprobs))
        return output._replace(tokens=tokens, logprobs=logprobs), cache, state
