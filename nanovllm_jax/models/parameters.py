"""A model's parameters by path: the one way in which weights enter and leave the modules."""

import jax
from flax import nnx

from nanovllm_jax.parallel.sharding import ShardingRules

ParameterPath = tuple[str | int, ...]


def parameters_of(model: nnx.Module) -> dict[ParameterPath, nnx.Param]:
    """Each parameter of a (real or abstract) model."""
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def parameter_targets(
    model: nnx.Module, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> dict[ParameterPath, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding on `mesh` of each parameter of a (real or abstract) model."""
    return {
        path: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=rules.sharding(mesh, param.out_sharding))
        for path, param in parameters_of(model).items()
    }


def set_parameters(model: nnx.Module, arrays: dict[ParameterPath, jax.Array]) -> None:
    """Put arrays in place of a model's parameters."""
    params = parameters_of(model)
    nnx.update(model, nnx.from_flat_state([(path, params[path].replace(array)) for path, array in arrays.items()]))
