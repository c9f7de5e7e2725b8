"""Random weights, made on the device: for benchmarks and for shapes whose checkpoint is not at hand.

A number depends on its place in the parameter and on nothing else, so each device makes its own shard, and the weights
are the same however many devices share them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from nanovllm_jax.models.parameters import ParameterPath


@partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, target: jax.ShapeDtypeStruct, kv_copies: int | None = None) -> jax.Array:
    """Normal numbers with deviation 0.02 under the target's shape, dtype and sharding.

    `kv_copies`: of a fused qkv projection [K, G + 2, ...], how many neighbours among the K share a key and value.
    """
    if kv_copies is None:
        values = jax.random.normal(key, target.shape)
    else:
        heads, group, *rest = target.shape
        q = jax.random.normal(key, (heads, group - 2, *rest))
        kv = jax.random.normal(jax.random.fold_in(key, 1), (heads // kv_copies, 2, *rest))
        values = jnp.concatenate((q, jnp.repeat(kv, kv_copies, axis=0)), axis=1)
    return jax.lax.with_sharding_constraint((0.02 * values).astype(target.dtype), target.sharding)


def random_parameters(
    seed: int, targets: dict[ParameterPath, jax.ShapeDtypeStruct], kv_copies: int = 1
) -> dict[ParameterPath, jax.Array]:
    """Norm weights are one, all others normal with deviation 0.02, each under its target's dtype and sharding."""
    parameters, key = {}, jax.random.key(seed % 2**63, impl="threefry2x32")
    for number, (path, target) in enumerate(targets.items()):
        if any("norm" in str(part) for part in path):
            parameters[path] = jnp.ones(target.shape, target.dtype, device=target.sharding)
        else:
            copies = kv_copies if "qkv_proj" in path else None
            parameters[path] = normal(jax.random.fold_in(key, number), target, copies)
    return parameters
