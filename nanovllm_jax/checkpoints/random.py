"""Random weights, made on the device: for benchmarks and for shapes whose checkpoint is not at hand."""

from functools import partial

import jax
import jax.numpy as jnp

from nanovllm_jax.models.parameters import ParameterPath


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, dtype, sharding):
    values = (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jax.lax.with_sharding_constraint(values, sharding)


def random_parameters(seed: int, targets: dict[ParameterPath, jax.ShapeDtypeStruct]) -> dict[ParameterPath, jax.Array]:
    """Norm weights are one, all others normal with deviation 0.02, each under its target's dtype and sharding."""
    parameters, key = {}, jax.random.key(seed)
    for number, (path, target) in enumerate(targets.items()):
        if any("norm" in str(part) for part in path):
            parameters[path] = jnp.ones(target.shape, target.dtype, device=target.sharding)
        else:
            parameters[path] = _normal(jax.random.fold_in(key, number), target.shape, target.dtype, target.sharding)
    return parameters
