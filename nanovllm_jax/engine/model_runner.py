"""The device: weights, KV cache, compiled programs, dispatch and collect. The only file of the engine with jax."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from nanovllm_jax.checkpoints.load import ModelLoader
from nanovllm_jax.config import DTYPES, EngineConfig, ModelConfig
from nanovllm_jax.engine.batch import BatchShape, Buckets
from nanovllm_jax.engine.logprobs import TokenLogprobs
from nanovllm_jax.engine.memory import GIB, RESERVE, MemoryPlan, decide_num_blocks, estimate_workspace
from nanovllm_jax.layers.attention import KVCache
from nanovllm_jax.models.draw import DeviceState, LogprobArrays
from nanovllm_jax.models.parameters import ParameterPath, check_parameters, check_same_model, parameters_of
from nanovllm_jax.models.programs import ProgramStore
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.models.step import StepOutput, engine_step, prompt_logprobs
from nanovllm_jax.parallel.sharding import MODEL_AXIS, make_mesh, replicated

logger = logging.getLogger(__name__)

# Up to this many rows, a step takes the GPU less time than the host needs to dispatch it: so several go in one program.
MULTI_STEP_ROWS = 8
GPU_STEPS = 4
PROMPT_CHUNK = 256  # positions whose logits are made at a time where a prompt's log probabilities are asked for


class ModelRunner:
    """Runs batches on the device, with one program a batch shape, compiled when the engine starts."""

    def __init__(self, directory: Path, model_config: ModelConfig, config: EngineConfig):
        """Load weights, size the cache, compile. Raises ValueError for what does not fit together or in memory."""
        _prepare_backend(config)
        self.model_config, self.config = model_config, config
        self.mesh = make_mesh(config.tensor_parallel_size)
        self.device = self.mesh.devices.flat[0]
        self.on_gpu = self.device.platform == "gpu"
        self.dtype = self._resolve_dtype()
        self._check_shards()
        self.max_num_seqs = config.max_num_seqs or (512 if self.on_gpu else 32)
        self.max_num_batched_tokens = config.max_num_batched_tokens or (16384 if self.on_gpu else 1024)
        loading = dict(load_format=config.load_format, seed=config.seed, deterministic=config.deterministic)
        loader = ModelLoader(directory, model_config, dtype=self.dtype, mesh=self.mesh, **loading)
        if config.probe:
            config.probe.check(loader.model, self.dtype)
        self.leaves, self.treedef = jax.tree.flatten(loader.model)  # shapes, so far
        paths = {id(target): path for path, target in loader.targets.items()}
        self.targets = {paths[id(leaf)]: leaf for leaf in self.leaves}  # by path, in the order of the leaves
        self.weight_bytes = loader.device_bytes
        self.bytes_in_use = self._bytes_in_use()
        workspace = self._estimate_workspace()
        self._size_cache(workspace)
        with ThreadPoolExecutor(1) as thread:  # while programs compile
            weights = thread.submit(self._load, directory, loader)
            compiled_workspace = self._compile()
            if self.on_gpu and compiled_workspace > workspace:
                self._size_cache(compiled_workspace)
                self._compile()
            self.leaves = weights.result()
        self._allocate()

    # ------------------------------------------------------------ one step

    def dispatch(self, shape: BatchShape, buffer: np.ndarray) -> StepOutput:
        """Start one step; returns its output without waiting for the device."""
        output, self.caches, self.state = self.programs[shape](self.leaves, self.caches, self.state, buffer)
        output.tokens.copy_to_host_async()
        return output

    def write_tables(self, slot: int, token_counts: np.ndarray, logit_bias: np.ndarray) -> None:
        """Set a slot's lines [V] int32 and float32 of the device's state, for the steps dispatched from now on."""
        self.state = _write_tables(self.state, slot, token_counts, logit_bias)

    def write_steering(self, slot: int, steering: tuple[float, ...] | None) -> None:
        """Set what a slot's sequence brings for the probe, for the steps dispatched from now on; None: zeros."""
        size = self.config.probe.steering_size
        numbers = np.zeros(size, np.float32) if steering is None else np.array(steering, np.float32)
        self.state = _write_steering(self.state, slot, numbers)

    def prompt_logprobs(self, output: StepOutput, wanted: list[tuple[int, int, int]]) -> list[LogprobArrays]:
        """Log probabilities that a step's prefill tokens give: of each its row, the token it predicts, and num_top.

        Like `dispatch`, it does not wait for the device. Returns the parts for `collect_prompt_logprobs`.
        """
        size, parts = max(1, min(PROMPT_CHUNK, output.hidden.shape[1])), []
        for start in range(0, len(wanted), size):
            part = np.array(wanted[start : start + size], np.int32)
            columns = np.full((3, size), [[0], [0], [-1]], np.int32)
            columns[:, : len(part)] = part.T
            parts.append(self.score(self.leaves, output.hidden, *columns))
        return parts

    def collect(self, output: StepOutput) -> list[list[int]]:
        """Wait for a dispatched step and read its tokens: for each of its steps, one a row."""
        return np.asarray(output.tokens).tolist()

    def collect_logprobs(self, output: StepOutput, rows: list[int]) -> list[dict[int, TokenLogprobs]]:
        """For each of its steps the log probabilities of these rows' tokens, by row."""
        tokens, logprobs = np.asarray(output.tokens), jax.tree.map(np.asarray, output.logprobs)
        return [
            dict(zip(rows, _entries(tokens[step, rows], (array[step, rows] for array in logprobs))))
            for step in range(len(tokens))
        ]

    def collect_activations(self, output: StepOutput) -> dict[str, np.ndarray]:
        """What the probe took out of a dispatched step, by place."""
        return jax.tree.map(np.asarray, output.activations)

    def collect_prompt_logprobs(self, tokens: list[int], parts: list[LogprobArrays]) -> list[TokenLogprobs]:
        """The log probabilities of `prompt_logprobs`, token by token."""
        arrays = (np.concatenate(list(map(np.asarray, arrays)))[: len(tokens)] for arrays in zip(*parts))
        return _entries(np.array(tokens), arrays)

    def reset(self) -> None:
        """Drop the device's state, until `restore`: a step that failed, or was interrupted, may have taken it along."""
        self.caches = self.state = None

    def restore(self) -> None:
        """Make the device's state anew after `reset`. Raises RuntimeError while the device has no memory for it."""
        if self.caches is None or self.state is None:
            try:
                self._allocate()
            except Exception as error:
                raise RuntimeError(f"the device failed, and its memory cannot be had back yet: {error}") from error

    def _step(self, shape: BatchShape, leaves, caches, state, buffer):
        # A module is a pytree; passed flat, it costs no Python at a call.
        model = jax.tree.unflatten(self.treedef, leaves)
        mesh = self.mesh if self.mesh.size > 1 else None
        static = dict(shape=shape, block_size=self.config.block_size, mesh=mesh, probe=self.config.probe)
        return engine_step(model, caches, state, buffer, **static)

    def _eager_step(self, shape: BatchShape, leaves, caches, state, buffer):
        with jax.disable_jit():
            return self._step(shape, leaves, caches, state, jnp.asarray(buffer))

    # ------------------------------------------------------------ weights

    def _resolve_dtype(self) -> np.dtype:
        if self.config.dtype != "auto":
            return jnp.dtype(DTYPES[self.config.dtype])
        # CPUs compute in float32 whatever the weights' type: 16 bits would only round more.
        return jnp.dtype(DTYPES[self.model_config.dtype] if self.on_gpu else "float32")

    def _check_shards(self) -> None:
        c, shards = self.model_config, self.mesh.size
        common = math.gcd(c.num_key_value_heads, c.intermediate_size, c.vocab_size)
        if common % shards:
            raise ValueError(
                f"tensor_parallel_size={shards} must divide num_key_value_heads={c.num_key_value_heads}, "
                f"intermediate_size={c.intermediate_size} and vocab_size={c.vocab_size}: use one of "
                f"{[n for n in range(1, common + 1) if common % n == 0]}"
            )

    def _load(self, directory: Path, loader: ModelLoader) -> list[jax.Array]:
        start = time.perf_counter()
        leaves = jax.tree.leaves(loader.load())
        logger.info(
            "loaded %s (%s weights): %.3f billion parameters in %s, %.2f GiB a device, %.1f s",
            directory,
            "random" if self.config.load_format == "dummy" else "checkpoint",
            self.model_config.num_parameters / 1e9,
            self.dtype.name,
            self.weight_bytes / GIB,
            time.perf_counter() - start,
        )
        return leaves

    def check_weights(self, weights: Qwen3ForCausalLM | Mapping[ParameterPath, Any]) -> Mapping[ParameterPath, Any]:
        """Arrays by path from what `update_weights` of the engine may be given; raises as it says."""
        if isinstance(weights, Qwen3ForCausalLM):
            check_same_model(weights.config, self.model_config)
            weights = {path: param[...] for path, param in parameters_of(weights).items()}
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights must be a Qwen3ForCausalLM or a dict of arrays by path, not {type(weights)}")
        check_parameters(weights, self.targets)
        return weights

    def update_weights(self, arrays: Mapping[ParameterPath, Any], donate: bool) -> None:
        """Run the steps dispatched from now on with these arrays, which `check_weights` has passed.

        They take their places one by one, so that the device needs room for the old weights and one array.
        """
        for i, (path, target) in enumerate(self.targets.items()):
            # A jax.Array that lies where it should is shared. NumPy arrays are copied: they may change.
            given = arrays[path] if isinstance(arrays[path], jax.Array) else np.array(arrays[path])
            array = jax.device_put(given, target.sharding, donate=donate)
            if array.dtype != target.dtype:
                array = _cast(array, target.dtype)
                if donate and isinstance(given, jax.Array):
                    given.delete()
            self.leaves[i] = array

    # ------------------------------------------------------------ cache

    def _estimate_workspace(self) -> int:
        tokens = self.max_num_batched_tokens + self.max_num_seqs
        rows = 2 * self.max_num_seqs
        return estimate_workspace(self.model_config, self.dtype.itemsize, tokens, rows, self.mesh.size)

    def _size_cache(self, workspace: int) -> None:
        """Decide the pool's size and, with it, max_model_len and the batch shapes."""
        config, model = self.config, self.model_config
        block = model.kv_bytes_per_token(self.dtype.itemsize) * config.block_size // self.mesh.size
        # Un-jitted steps copy a layer's cache when they store, for nothing is donated.
        copies = 1 + 4 / model.num_hidden_layers if config.enforce_eager else 1
        plan = MemoryPlan(
            budget=self.device.memory_stats()["bytes_limit"] if self.on_gpu else None,
            weights=self.bytes_in_use + self.weight_bytes,
            workspace=workspace + self._state_bytes() + RESERVE,
            block=int(block * copies),
        )
        wanted = self.max_num_seqs * (config.max_model_len or model.max_context)
        self.num_blocks = decide_num_blocks(plan, config, wanted)
        self.max_model_len = self._resolve_max_model_len()
        width = -(-self.max_model_len // config.block_size)
        # A CPU is for small models: there few shapes to compile are worth more than little padding.
        most = self.max_num_seqs
        ratio, mixed = (2, {min(32, most), most}) if self.on_gpu else (16, {most})
        self.buckets = Buckets(
            *(most, self.max_num_batched_tokens, width, ratio, tuple(sorted(mixed))),
            num_steps=config.num_scheduler_steps or (GPU_STEPS if self.on_gpu else 1),
            multi_step_rows=MULTI_STEP_ROWS,
        )
        logger.info(
            "memory a device: %.2f GiB weights, %.2f GiB workspace, %.2f GiB cache = %d blocks of %d tokens = "
            "%d tokens; max_model_len %d",
            self.weight_bytes / GIB,
            plan.workspace / GIB,
            self.num_blocks * block / GIB,
            self.num_blocks,
            config.block_size,
            self.num_blocks * config.block_size,
            self.max_model_len,
        )

    def _bytes_in_use(self) -> int:
        """What others hold of a GPU: another LLM of this process."""
        if not self.on_gpu:
            return 0
        return max(device.memory_stats()["bytes_in_use"] for device in self.mesh.devices.flat)

    def _state_bytes(self) -> int:
        steering = 4 * self.config.probe.steering_size if self.config.probe else 0
        return (self.max_num_seqs + 1) * (self.model_config.vocab_size * 8 + steering)

    def _resolve_max_model_len(self) -> int:
        own, pool = self.model_config.max_context, self.num_blocks * self.config.block_size
        asked = self.config.max_model_len
        if asked is None:
            return min(own, pool)
        if asked > own:
            raise ValueError(f"max_model_len={asked} is more than the model's {own} (max_position_embeddings)")
        if asked > pool:
            raise ValueError(
                f"max_model_len={asked} does not fit in the KV cache of {pool} tokens; "
                f"lower it to {pool} or less, or enlarge the cache (gpu_memory_utilization, num_kvcache_blocks)"
            )
        return asked

    def _layout(self) -> tuple[list[KVCache], DeviceState]:
        """Shapes and shardings of the caches and of the device's state."""
        c, slots, whole, probe = self.model_config, self.max_num_seqs + 1, replicated(self.mesh), self.config.probe
        shape = (self.num_blocks, c.num_key_value_heads, self.config.block_size, c.head_dim)
        pages = jax.ShapeDtypeStruct(shape, self.dtype, sharding=NamedSharding(self.mesh, Spec(None, MODEL_AXIS)))
        state = DeviceState(
            last_tokens=jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=whole),
            token_counts=jax.ShapeDtypeStruct((slots, c.vocab_size), jnp.int32, sharding=whole),
            logit_bias=jax.ShapeDtypeStruct((slots, c.vocab_size), jnp.float32, sharding=whole),
            steering=probe and jax.ShapeDtypeStruct((slots, probe.steering_size), jnp.float32, sharding=whole),
        )
        return [KVCache(pages, pages)] * c.num_hidden_layers, state

    def _allocate(self) -> None:
        """Make the caches and the device's state, all zeros."""
        self.caches, self.state = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), self._layout()
        )

    # ------------------------------------------------------------ programs

    def _compile(self) -> int:
        """Compile every batch shape, in threads; returns the largest temporary memory in bytes."""
        shapes = self.buckets.all_shapes()
        if self.config.enforce_eager:
            logger.warning("enforce_eager=True: steps run un-jitted, for debugging; expect them to be slow")
            self.programs = {shape: partial(self._eager_step, shape) for shape in shapes}
            return 0
        start, store = time.perf_counter(), self._program_store()

        def compile(lowered: jax.stages.Lowered, shape: BatchShape) -> Callable:
            program = lowered.compile(self._compiler_options(shape))
            store.save(repr(shape), program)
            return program

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            loaded = dict(zip(shapes, pool.map(store.load, map(repr, shapes))))
            # Tracing holds the interpreter, compiling does not: each program compiles while the next is traced.
            missing = [shape for shape in shapes if loaded[shape] is None]
            compiling = {shape: pool.submit(compile, self._lower(shape), shape) for shape in missing}
            compiled = {shape: job.result() for shape, job in compiling.items()}
        self.programs: dict[BatchShape, Callable] = loaded | compiled
        workspace = max(program.memory_analysis().temp_size_in_bytes for program in self.programs.values())
        logger.info(
            "compiled %d batch shapes and found %d on disk, in %.1f s; largest workspace %.2f GiB",
            len(compiled),
            len(shapes) - len(compiled),
            time.perf_counter() - start,
            workspace / GIB,
        )
        return workspace

    def _program_store(self) -> ProgramStore:
        # A CPU's larger programs cannot be loaded again (jaxlib 0.11: "Function ... not found").
        # And what a probe's functions do cannot be told from their names.
        kept = self.on_gpu and self.config.compilation_cache_dir and not self.config.probe
        directory = jax.config.jax_compilation_cache_dir if kept else None
        return ProgramStore(
            Path(directory) / "programs" if directory else None,
            list(self.mesh.devices.flat),
            repr((replace(self.config, seed=0), self.model_config, self.dtype, self.leaves, self._layout())),
        )

    def _compiler_options(self, shape: BatchShape) -> dict[str, bool]:
        """XLA flags for one program: measured on an H200, see docs/performance.md."""
        if not self.on_gpu or shape.decode_rows + shape.prefill_tokens <= 32:
            return {}  # XLA's own kernels are the faster ones for a few rows
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}

    def _lower(self, shape: BatchShape):
        caches, state = self._layout()
        whole = replicated(self.mesh)
        step = jax.jit(
            partial(self._step, shape),
            donate_argnums=(1, 2),
            out_shardings=(whole, *jax.tree.map(lambda array: array.sharding, (caches, state))),
        )
        buffer = jax.ShapeDtypeStruct((shape.size,), jnp.int32, sharding=whole)
        return step.lower(self.leaves, caches, state, buffer)

    @cached_property
    def score(self) -> Callable:
        """models/step.py's `prompt_logprobs`, compiled for each number of prefill tokens when it is first asked for."""

        def score(leaves, *args):
            return prompt_logprobs(jax.tree.unflatten(self.treedef, leaves), *args)

        return jax.jit(score)


def _entries(tokens: np.ndarray, logprobs: Iterable[np.ndarray]) -> list[TokenLogprobs]:
    """Arrays over tokens as one TokenLogprobs a token."""
    return [TokenLogprobs(*values) for values in zip(tokens.tolist(), *(array.tolist() for array in logprobs))]


@partial(jax.jit, static_argnums=1)
def _cast(array: jax.Array, dtype: np.dtype) -> jax.Array:
    return array.astype(dtype)


@partial(jax.jit, donate_argnums=0)
def _write_tables(state: DeviceState, slot, token_counts, logit_bias) -> DeviceState:
    return state._replace(
        token_counts=state.token_counts.at[slot].set(token_counts),
        logit_bias=state.logit_bias.at[slot].set(logit_bias),
    )


@partial(jax.jit, donate_argnums=0)
def _write_steering(state: DeviceState, slot, steering) -> DeviceState:
    return state._replace(steering=state.steering.at[slot].set(steering))


def _prepare_backend(config: EngineConfig) -> None:
    """Settings that must be there before JAX starts a GPU, and the compilation cache."""
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(config.gpu_memory_utilization))
    if config.compilation_cache_dir and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
