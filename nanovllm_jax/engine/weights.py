"""The weights that are served: loaded when the engine starts, swapped between steps."""

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from nanovllm_jax.checkpoints.load import ModelLoader
from nanovllm_jax.machine import GIB
from nanovllm_jax.models.flat_model import FlatModel
from nanovllm_jax.models.parameters import ParameterPath, checked_weights
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.backend import own_settings

logger = logging.getLogger(__name__)


class ServedWeights:
    """A model's arrays, and as the arguments of compiled programs."""

    def __init__(self, loader: ModelLoader):
        # The loader's model comes to hold the arrays that it loads, which `update` is to let go: so it is not kept.
        self.config, self.device_bytes = loader.config, loader.device_bytes
        self.flat = FlatModel(loader.model)
        paths = {id(target): path for path, target in loader.targets.items()}
        self.targets = {paths[id(shape)]: shape for shape in self.flat.shapes}  # by path, in the order of the leaves
        self.leaves: list[jax.Array] = []  # the model's arrays, when they are loaded,
        self.arguments: list[jax.Array] = []  # and what programs take for them
        self.is_whole = True

    @property
    def model(self) -> Qwen3ForCausalLM:
        """The module that is served, with the arrays that it is served with."""
        return jax.tree.unflatten(self.flat.treedef, self.leaves)

    def load(self, directory: Path, loader: ModelLoader) -> None:
        """Take in the checkpoint's arrays."""
        start = time.perf_counter()
        self.serve(jax.tree.leaves(loader.load()))
        logger.info(
            "loaded %s (%s weights): %.3f billion parameters in %s, %.2f GiB a device, %.1f s",
            directory,
            loader.source,
            self.config.num_parameters / 1e9,
            self.leaves[0].dtype.name,
            self.device_bytes / GIB,
            time.perf_counter() - start,
        )

    def serve(self, leaves: list[jax.Array]) -> None:
        """Run the steps dispatched from now on with these arrays, of the model's shapes and in its order."""
        self.leaves, self.arguments = leaves, self.flat.pack(leaves)

    def check(self, weights: Qwen3ForCausalLM | Mapping[ParameterPath, Any]) -> Mapping[ParameterPath, Any]:
        """Arrays by path from what `update_weights` of the engine may be given; raises as it says."""
        return checked_weights(weights, self.config, self.targets)

    @own_settings()
    def update(self, arrays: Mapping[ParameterPath, Any], donate: bool) -> None:
        """Run the steps dispatched from now on with these arrays, which `check` has passed.

        They take their places one by one, so that the device needs room for the old weights and one array.
        """
        self.is_whole = False  # should it fail on the way
        self.arguments.clear()  # which would keep the old ones
        last = {id(arrays[path]): path for path in self.targets}  # an array may be there under several paths
        for i, (path, target) in enumerate(self.targets.items()):
            given = arrays[path]
            is_spare = donate and last.get(id(given), path) == path
            array = _placed(given, target.sharding, is_spare)
            if array.dtype != target.dtype:
                array = _cast(array, target.dtype)
                if is_spare and isinstance(given, jax.Array):
                    given.delete()
            self.leaves[i] = array
        self.serve(self.leaves)
        self.is_whole = True

    def check_whole(self) -> None:
        """Raise RuntimeError where an update has failed on its way, until another comes through."""
        if not self.is_whole:
            raise RuntimeError("update_weights failed half way, and left old weights beside new ones: call it again")


def _placed(given: Any, sharding: NamedSharding, donate: bool) -> jax.Array:
    """A weight where it should lie: a jax.Array that does is shared. NumPy arrays are copied: they may change."""
    # What another process has as well is taken from this one's own: JAX would compare it over the network.
    own = jax.process_count() > 1 and isinstance(given, jax.Array) and given.is_fully_addressable
    if isinstance(given, jax.Array) and not own:
        return jax.device_put(given, sharding, donate=donate)
    values = np.array(given, np.dtype(given.dtype).newbyteorder("="))
    if own and donate:
        given.delete()
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


@partial(jax.jit, static_argnums=1)
def _cast(array: jax.Array, dtype: np.dtype) -> jax.Array:
    return array.astype(dtype)
