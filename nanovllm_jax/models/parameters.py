"""A model's parameters by path: the one way in which weights enter and leave the modules."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from reprlib import repr as short_repr
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from xxhash import xxh3_128

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.sharding import parameter_sharding

ParameterPath = tuple[str | int, ...]
ARRAYS = np.ndarray, jax.Array
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_model(model: Any) -> None:
    """Raise TypeError for what is no Qwen3ForCausalLM."""
    if isinstance(model, nnx.State):
        raise TypeError("weights must be a Qwen3ForCausalLM: of an nnx.State make one by nnx.merge(graph, state)")
    if not isinstance(model, Qwen3ForCausalLM):
        raise TypeError(f"weights must be a Qwen3ForCausalLM, not {type(model)}")


def parameters_of(model: nnx.Module) -> dict[ParameterPath, nnx.Param]:
    """Each parameter of a (real or abstract) model."""
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def parameter_targets(model: nnx.Module, mesh: jax.sharding.Mesh) -> dict[ParameterPath, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding on `mesh` of each parameter of a (real or abstract) model."""
    return {
        path: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=parameter_sharding(mesh, param.out_sharding))
        for path, param in parameters_of(model).items()
    }


def abstract_model(
    config: ModelConfig, dtype: np.dtype, mesh: jax.sharding.Mesh, deterministic: bool = False
) -> tuple[Qwen3ForCausalLM, dict[ParameterPath, jax.ShapeDtypeStruct]]:
    """A model of shapes with their shardings on `mesh` in place of arrays, and these shapes by path."""
    options = dict(dtype=dtype, deterministic=deterministic)
    model = nnx.eval_shape(lambda: Qwen3ForCausalLM(config, rngs=nnx.Rngs(0), **options))
    targets = parameter_targets(model, mesh)
    set_parameters(model, targets)
    return model, targets


def set_parameters(model: nnx.Module, arrays: dict[ParameterPath, jax.Array]) -> None:
    """Put arrays in place of a model's parameters."""
    params = parameters_of(model)
    nnx.update(model, nnx.from_flat_state([(path, params[path].replace(array)) for path, array in arrays.items()]))


def checked_weights(
    weights: Qwen3ForCausalLM | Mapping[ParameterPath, Any],
    config: ModelConfig,
    targets: dict[ParameterPath, jax.ShapeDtypeStruct],
) -> Mapping[ParameterPath, Any]:
    """The arrays by path of a model, or of a dict of all its arrays, that may take the places of `targets`.

    A model's kv heads get as many copies as `config` has.

    Raises TypeError for what is neither, and ValueError, naming the array or setting, for what does not fit.
    """
    copies = config.kv_copies
    if isinstance(weights, Qwen3ForCausalLM):
        check_same_model(replace(weights.config, kv_copies=copies), config)
        copies, weights = weights.config.kv_copies, parameters_of(weights)
    if isinstance(weights, nnx.State):
        check_model(weights)  # says what to make of one
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a Qwen3ForCausalLM or a dict of arrays by path, not {type(weights)}")
    weights = {path: _numbers(array) for path, array in weights.items()}
    if copies != config.kv_copies:
        for path, array in weights.items():
            if "qkv_proj" in path and isinstance(array, ARRAYS) and not _is_deleted(array):
                check_copies(name_of(path), array, copies)
                weights[path] = with_heads(array, config.kv_heads)
    check_parameters(weights, targets)
    return weights


def check_parameters(
    arrays: Mapping[ParameterPath, Any], targets: dict[ParameterPath, jax.ShapeDtypeStruct], kinds: Any = ARRAYS
) -> None:
    """Raise ValueError naming the arrays that are missing, unexpected, of another shape, of no float dtype, or deleted.

    `kinds`: of which types they may be.
    """
    problems = [f"{name_of(path)} is missing" for path in targets if path not in arrays]
    for path, array in arrays.items():
        name, target = name_of(path), targets.get(path)
        if target is None:
            problems.append(f"{name} is unexpected")
        elif not isinstance(array, kinds) or isinstance(array, jax.core.Tracer):
            problems.append(f"{name} must be a NumPy or JAX array, not {short_repr(array)}")
        elif tuple(array.shape) != target.shape:
            problems.append(f"{name} has shape {tuple(array.shape)}, not {target.shape}")
        elif jnp.dtype(array.dtype).name not in FLOAT_DTYPES:
            problems.append(f"{name} has dtype {array.dtype}, not one of {', '.join(FLOAT_DTYPES)}")
        elif _is_deleted(array):
            problems.append(f"{name} has been deleted: it was donated to a jitted function")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"these weights do not fit the model: {'; '.join(problems[:8])}{more}")


def _numbers(array: Any) -> Any:
    """A variable's array; an abstract one has none, and stays what it is."""
    try:
        return array[...] if isinstance(array, nnx.Variable) else array
    except TypeError:
        return array


def is_here(array: np.ndarray | jax.Array) -> bool:
    """Whether this process has all of an array's numbers."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _is_deleted(array: Any) -> bool:
    return isinstance(array, jax.Array) and array.is_deleted()


def check_same_model(found: ModelConfig, expected: ModelConfig) -> None:
    """Raise ValueError naming the settings in which one model is another than the one expected."""
    wanted = asdict(expected)
    different = {name: value for name, value in asdict(found).items() if value != wanted[name] and name != "dtype"}
    if different:
        settings = ", ".join(f"{name}={value!r} (here {wanted[name]!r})" for name, value in different.items())
        raise ValueError(f"these weights are another model's: {settings}")


def check_copies(name: str, qkv: np.ndarray | jax.Array, copies: int) -> None:
    """Raise ValueError, naming it, where a fused qkv projection [K, G + 2, ...] has copies of a kv head that differ."""
    if copies > 1:
        module, kv = np if isinstance(qkv, np.ndarray) else jnp, qkv[:, -2:]
        if not module.array_equal(kv, module.repeat(kv[::copies], copies, axis=0), equal_nan=True):
            raise ValueError(
                f"{name}: the {copies} copies of a kv head differ, as they were trained apart, and only one of them "
                "would be left: train a model without copies, as load_model() makes on no more devices than kv heads"
            )


def with_heads(qkv: jax.Array, kv_heads: int) -> jax.Array:
    """A fused qkv projection [K, G + 2, ...] as [kv_heads, K * G / kv_heads + 2, ...]: neighbours are copies, or were.

    A kv head's key and value are those of the head in whose place it is.
    """
    queries = qkv[:, :-2].reshape(kv_heads, -1, *qkv.shape[2:])
    return jnp.concatenate((queries, qkv[np.arange(kv_heads) * len(qkv) // kv_heads, -2:]), axis=1)


def digest_of(arrays: Mapping[ParameterPath, Any]) -> bytes:
    """16 bytes of the arrays' names, shapes and dtypes, and of the numbers of those that this process has whole."""
    digest = xxh3_128()
    for path, array in sorted(arrays.items(), key=lambda item: name_of(item[0])):
        digest.update(f"{name_of(path)} {array.shape} {array.dtype} {is_here(array)}\n".encode())
        if is_here(array):
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.digest()


def name_of(path: ParameterPath) -> str:
    """layers.0.mlp.down_proj.weight."""
    return ".".join(map(str, path)) if isinstance(path, tuple) else repr(path)
