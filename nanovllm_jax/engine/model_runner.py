"""The device: KV cache, compiled programs, dispatch and collect. Of engine/, only this and weights.py import jax."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Spec
from xxhash import xxh3_128_digest

from nanovllm_jax.checkpoints.load import ModelLoader
from nanovllm_jax.config import DTYPES, ModelConfig
from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.buckets import cpu_buckets, gpu_buckets
from nanovllm_jax.engine.memory import (
    RESERVE,
    MemoryPlan,
    decide_max_model_len,
    decide_num_blocks,
    estimate_workspace,
    largest_matmul,
    memory_stats,
)
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead, Schedule
from nanovllm_jax.engine.weights import ServedWeights
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.machine import GIB
from nanovllm_jax.models.compiling import compile_all, helpers_for
from nanovllm_jax.models.draw import DeviceState, write_tables
from nanovllm_jax.models.parameters import ParameterPath, digest_of
from nanovllm_jax.models.programs import ProgramStore
from nanovllm_jax.models.score_programs import ScorePrograms
from nanovllm_jax.models.step import StepOutput
from nanovllm_jax.models.step_programs import HOST, ProgramSettings, StepPrograms
from nanovllm_jax.parallel.backend import own_settings
from nanovllm_jax.parallel.peers import connect_peers, reach_one_another
from nanovllm_jax.parallel.processes import largest, same_everywhere
from nanovllm_jax.parallel.sharding import make_mesh, per_device, specs_of
from nanovllm_jax.parallel.sizes import split_config

logger = logging.getLogger(__name__)

# The host takes up to 0.9 ms for a step, in which a GPU reads so many bytes. A sequence that is alone and makes it read
# less (of weights, keys and values) would leave it waiting: so several steps go in one program. Steps of more sequences
# take longer, and then whoever arrives would wait for a program's end, and each token for the next one.
DISPATCH_BYTES = 3 * GIB
STEPS_ALONE = 3
ASKED_ROWS = 128  # where the user says how many steps
SPARED_FROM = 1024  # tokens: with fewer, sparing their last layer gains less than compiling that layer twice
PROMPT_CHUNK = 256  # positions whose logits are made at a time where a prompt's log probabilities are asked for


class ModelRunner:
    """Runs batches on the device, with one program a batch shape, compiled when the engine starts."""

    @own_settings()
    def __init__(self, directory: Path, model_config: ModelConfig, config: EngineConfig):
        """Load weights, size the cache, compile. Raises ValueError for what does not fit together or in memory."""
        self.config = config
        self.model_config = model_config = split_config(model_config, config.tensor_parallel_size)
        self.mesh = make_mesh(config.tensor_parallel_size, config.data_parallel_size)
        self.num_shards = config.tensor_parallel_size
        self.device = self.mesh.local_devices[0]
        self.num_processes, self.is_first_process = jax.process_count(), jax.process_index() == 0
        self.on_gpu = self.device.platform == "gpu"
        if self.on_gpu:
            _check_for_gpu(model_config)
        self.dtype = self._resolve_dtype()
        self.max_num_seqs = config.max_num_seqs or (512 if self.on_gpu else 32)
        self.max_num_batched_tokens = config.max_num_batched_tokens or (16384 if self.on_gpu else 1024)
        options = dict(load_format=config.load_format, seed=config.seed, deterministic=config.deterministic)
        loader = ModelLoader(directory, model_config, dtype=self.dtype, mesh=self.mesh, **options)
        if config.probe:
            config.probe.check(loader.model, self.dtype)
        if self.num_processes > 1:
            self.check_agreement([_shared(config), model_config, loader.sample()])
        self.weights = ServedWeights(loader)
        self.bytes_in_use = self._bytes_in_use()
        # In what is left XLA tries matmuls out while it compiles.
        workspace = max(estimate(*self._largest_step()) for estimate in (estimate_workspace, largest_matmul))
        self._make_cache(workspace)
        with ThreadPoolExecutor(1) as thread:  # while programs compile
            loading = thread.submit(self.weights.load, directory, loader)
            compiled_workspace = largest(self._compile())
            if self.on_gpu and compiled_workspace > workspace:
                self.reset()
                self._make_cache(compiled_workspace)
                self._compile()
            loading.result()
        if self.on_gpu and not config.enforce_eager:
            self._call_programs()

    def _resolve_dtype(self) -> np.dtype:
        if self.config.dtype != "auto":
            return jnp.dtype(DTYPES[self.config.dtype])
        # CPUs compute in float32 whatever the weights' type: 16 bits would only round more.
        return jnp.dtype(DTYPES[self.model_config.dtype] if self.on_gpu else "float32")

    # ------------------------------------------------------------ one step

    def dispatch(self, shape: BatchShape, buffer: np.ndarray) -> StepOutput:
        """Start one step; returns its output without waiting for the device."""
        buffer = self._on_devices(buffer)
        arguments = self.weights.arguments, self.cache, self.state, buffer, self.peers
        output, self.cache, self.state = self.programs[shape](*arguments)
        if output.tokens.sharding.memory_kind != HOST:
            output.tokens.copy_to_host_async()
        return output

    @own_settings()
    def write_tables(self, group: int, slot: int, token_counts: np.ndarray, logit_bias: np.ndarray) -> None:
        """Set a slot's lines [V] int32 and float32 of a group's state, for the steps dispatched from now on."""
        line = group * (self.max_num_seqs + 1) + slot
        self.state = self.table_writer(self.state, line, token_counts, logit_bias)

    @own_settings()
    def write_steering(self, slot: int, steering: tuple[float, ...] | None) -> None:
        """Set what a slot's sequence brings for the probe, for the steps dispatched from now on; None: zeros."""
        size = self.config.probe.steering_size
        numbers = np.zeros(size, np.float32) if steering is None else np.array(steering, np.float32)
        self.state = _write_steering(self.state, slot, numbers)

    @own_settings()
    def prompt_logprobs(
        self, output: StepOutput, shape: BatchShape, buffer: np.ndarray, wanted: list[tuple[int, int, int]]
    ) -> list[jax.Array]:
        """Log probabilities that a step's prefill tokens give: of each its row, the token it predicts, and num_top.

        Like `dispatch`, right after which it is called, it does not wait for the device. Returns the parts for
        `collect_prompt_logprobs`.
        """
        parts, hidden, size = [], output.hidden, min(PROMPT_CHUNK, self.max_num_batched_tokens)
        if shape.spared:
            arguments = self.weights.arguments, self.cache, hidden, self._on_devices(buffer)
            hidden, self.cache = self.scores.hidden(shape)(*arguments)
        for start in range(0, len(wanted), size):
            part = np.array(wanted[start : start + size], np.int32)
            columns = np.full((3, size), [[0], [0], [-1]], np.int32)
            columns[:, : len(part)] = part.T
            rows, *asked = columns
            hidden_rows = self.scores.rows(hidden, rows)
            parts.append(self.scores.logprobs(size)(self.weights.arguments, hidden_rows, *asked))
        return parts

    def is_done(self, output: StepOutput) -> bool:
        """Whether the device is done with a dispatched step."""
        return output.tokens.is_ready()

    def wait(self, output: StepOutput) -> None:
        """Wait until the device is done with a dispatched step."""
        output.tokens.block_until_ready()

    def collect(self, output: StepOutput) -> list[list[int]]:
        """Wait for a dispatched step and read its tokens: for each of its steps, one a row."""
        return np.asarray(output.tokens).tolist()

    def collect_logprobs(self, output: StepOutput, rows: list[int]) -> np.ndarray:
        """For each of its steps these rows' log probabilities: [steps, rows, 2, 1 + MAX_LOGPROBS] int32."""
        return np.asarray(output.logprobs)[:, rows]

    def collect_activations(self, output: StepOutput) -> dict[str, np.ndarray]:
        """What the probe took out of a dispatched step, by place."""
        return jax.tree.map(np.asarray, output.activations)

    def collect_prompt_logprobs(self, parts: list[jax.Array]) -> np.ndarray:
        """The log probabilities of `prompt_logprobs`, token by token, and padding: [C, 2, 1 + MAX_LOGPROBS] int32."""
        return np.concatenate(list(map(np.asarray, parts)))

    def check_agreement(self, asked: list, weights: Mapping[ParameterPath, Any] | None = None) -> None:
        """Raise RuntimeError where other processes were asked for something else, or given other weights."""
        content = repr(asked).encode() + (digest_of(weights) if weights else b"")
        if not same_everywhere(xxh3_128_digest(content)):
            raise RuntimeError(
                f"the {jax.process_count()} processes were given different requests, weights or options, or not in the "
                "same order: each must run the same script on the same input"
            )

    def reset(self) -> None:
        """Drop the device's state, until `restore`: a step that failed, or was interrupted, may have taken it along."""
        self.cache = self.state = self.peers = None

    @own_settings()
    def restore(self) -> None:
        """Make the device's state anew after `reset`. Raises RuntimeError while the device has no memory for it."""
        if self.cache is None or self.state is None:
            try:
                self._allocate()
            except Exception as error:
                raise RuntimeError(f"the device failed, and its memory cannot be had back yet: {error}") from error

    def _on_devices(self, buffer: np.ndarray) -> np.ndarray | jax.Array:
        """Numbers of all data groups, one group's after another's, where those groups' devices read them."""
        if self.mesh.size == 1:
            return buffer
        return jax.make_array_from_callback(buffer.shape, self.steps.by_group, buffer.__getitem__)

    # ------------------------------------------------------------ cache

    def _largest_step(self) -> tuple[ModelConfig, int, int, int, int]:
        """The arguments of memory.py's estimates."""
        tokens = max(self.max_num_batched_tokens, self.max_num_seqs)
        return self.model_config, self.dtype.itemsize, tokens, self.max_num_seqs, self.num_shards

    def _make_cache(self, workspace: int) -> None:
        """Decide its size and, with it, max_model_len and the programs; and make it.

        At first that is before there are weights: they are small, and fit in what one large array leaves.
        """
        self._size_cache(workspace)
        self._plan_programs()
        try:
            self._allocate()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise RuntimeError(
                f"the device has no memory in one piece for a KV cache of {self.num_blocks} blocks: lower "
                "gpu_memory_utilization or num_kvcache_blocks, make the LLM before other arrays, and leave "
                "XLA_PYTHON_CLIENT_PREALLOCATE unset"
            ) from error

    def _size_cache(self, workspace: int) -> None:
        """Decide the pool's size and max_model_len."""
        config, model = self.config, self.model_config
        block = model.kv_bytes_per_token(self.dtype.itemsize) * config.block_size // self.num_shards
        plan = MemoryPlan(
            budget=-largest(-memory_stats(self.device)["bytes_limit"]) if self.on_gpu else None,
            weights=largest(self.bytes_in_use) + self.weights.device_bytes,
            workspace=workspace + self._state_bytes() + RESERVE,
            block=block,
            rows=2 * model.num_hidden_layers * model.kv_heads // self.num_shards * config.block_size,
        )
        blocks_each = -(-(config.max_model_len or model.max_context) // config.block_size)
        self.num_blocks = decide_num_blocks(plan, config, wanted=self.max_num_seqs * blocks_each)
        self.max_model_len = decide_max_model_len(config, model.max_context, self.num_blocks)
        logger.info(
            "memory a device: %.2f GiB weights, %.2f GiB workspace, %.2f GiB cache = %d blocks of %d tokens = "
            "%d tokens; max_model_len %d",
            self.weights.device_bytes / GIB,
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
        return max(memory_stats(device)["bytes_in_use"] for device in self.mesh.local_devices)

    def _state_bytes(self) -> int:
        steering = 4 * self.config.probe.steering_size if self.config.probe else 0
        return (self.max_num_seqs + 1) * (self.model_config.vocab_size * 8 // self.num_shards + steering)

    def _allocate(self) -> None:
        """Make the cache and the device's state, all zeros, and the memory that devices exchange sums by."""
        self.peers = connect_peers(self.steps.peers) if self.steps.peers else None
        arrays = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), self.steps.layout()
        )
        # That there is no memory for one may be told when it is waited for: here, and not by some step that reads it.
        self.cache, self.state = jax.block_until_ready(arrays)

    # ------------------------------------------------------------ programs

    def _plan_programs(self) -> None:
        """Decide what is compiled: a step over the sized cache, for a few batch shapes."""
        reach = reach_one_another(self.mesh)
        settings = ProgramSettings(
            self.config, self.model_config, self.dtype, self.max_num_seqs, self.num_blocks, reach
        )
        self.steps = StepPrograms(settings, self.mesh, self.weights.flat)
        self.scores = ScorePrograms(self.steps)
        width = -(-self.max_model_len // self.config.block_size)
        sizes = self.max_num_seqs, self.max_num_batched_tokens, width, self._run_ahead()
        buckets = gpu_buckets(*sizes) if self.on_gpu else cpu_buckets(*sizes)
        self.buckets = replace(buckets, spared_from=math.inf if self.config.probe else SPARED_FROM)

    def _run_ahead(self) -> RunAhead:
        """When one program decodes several steps: as the user says, or where a GPU would wait for the host."""
        if self.config.num_scheduler_steps:
            return RunAhead(self.config.num_scheduler_steps, rows=ASKED_ROWS)
        if self.weights.device_bytes >= DISPATCH_BYTES or not self.on_gpu:
            return ONE_STEP
        return RunAhead(STEPS_ALONE, rows=1, tokens=self._tokens_in_a_dispatch())

    def _tokens_in_a_dispatch(self) -> int:
        """How much context a GPU reads, with a small model's weights, while the host dispatches a step."""
        room = DISPATCH_BYTES - self.weights.device_bytes
        return room * self.num_shards // self.model_config.kv_bytes_per_token(self.dtype.itemsize)

    def _compile(self) -> int:
        """Load or compile every batch shape; returns the largest temporary memory in bytes."""
        shapes = self.buckets.all_shapes()
        if self.num_shards > 1:
            by_kernels = self.steps.peers and self.on_gpu
            logger.info("small sums over devices: by %s", "their kernels" if by_kernels else "collectives")
        if self.config.enforce_eager:
            logger.warning("enforce_eager=True: steps run un-jitted, for debugging; expect them to be slow")
            self.programs = {shape: partial(_eager_step, self.steps.function(shape)) for shape in shapes}
            return 0
        start = time.perf_counter()
        store = self._program_store()
        self.programs: dict[BatchShape, Callable] = store.load_all(shapes)
        missing = [shape for shape in shapes if shape not in self.programs]
        self.programs |= compile_all(self.steps, missing, store, self._num_helpers(len(missing)))
        workspace = max(program.memory_analysis().temp_size_in_bytes for program in self.programs.values())
        logger.info(
            "compiled %d batch shapes and found %d on disk, in %.1f s; largest workspace %.2f GiB",
            len(missing),
            len(shapes) - len(missing),
            time.perf_counter() - start,
            workspace / GIB,
        )
        return workspace

    def _call_programs(self) -> None:
        """Call each program with nothing but padding, twice: first calls load kernels and make CUDA graphs.

        That takes 10 to 40 ms each, for which no request is to wait. All processes call them in the same order.
        """
        start, packer = time.perf_counter(), BatchPacker(self.buckets)
        for shape in self.buckets.all_shapes():
            _, buffer = packer.pack(Schedule(), shape)
            for _ in range(2):
                self.dispatch(shape, np.tile(buffer, self.config.data_parallel_size))
        jax.block_until_ready(self.cache)
        logger.info("called each of them in %.1f s", time.perf_counter() - start)

    def _program_store(self) -> ProgramStore:
        # A CPU's larger programs cannot be loaded again (jaxlib 0.11: "Function ... not found"), what a probe's
        # functions do cannot be told from their names, and of a program over several processes each would have a part.
        kept = self.on_gpu and self.config.compilation_cache_dir and not self.config.probe and self.num_processes == 1
        directory = jax.config.jax_compilation_cache_dir if kept else None
        # Neither what weights there are decides a program, nor where it is kept.
        config = replace(self.config, seed=0, load_format="auto", compilation_cache_dir=None)
        return ProgramStore(
            Path(directory) / "programs" if directory else None,
            list(self.mesh.devices.flat),
            repr((self.steps.settings._replace(config=config), self.weights.flat.shapes, self.steps.layout())),
        )

    def _num_helpers(self, num_programs: int) -> int:
        if not self.on_gpu or self.config.probe or self.num_processes > 1:  # a probe's functions cannot be sent
            return 0
        share = float(os.environ["XLA_CLIENT_MEM_FRACTION"])
        free = memory_stats(self.device)["bytes_limit"] * (1 / share - 1)
        return helpers_for(num_programs, free, largest_matmul(*self._largest_step()))

    @cached_property
    def table_writer(self) -> Callable:
        """models/draw.py's `write_tables`, compiled."""
        state = specs_of(self.steps.layout()[1])
        in_specs = (state, Spec(), Spec(), Spec())
        return jax.jit(per_device(write_tables, self.mesh, in_specs, state), donate_argnums=0)


def _eager_step(step: Callable, weights, cache, state, buffer, peers):
    with jax.disable_jit(), own_settings():
        return step(weights, cache, state, jnp.asarray(buffer), peers)


def _check_for_gpu(config: ModelConfig) -> None:
    if config.head_dim.bit_count() != 1:
        raise ValueError(
            f"head_dim={config.head_dim} is no power of two, which Triton's tiles are: a GPU cannot run this model "
            "here, a CPU can (JAX_PLATFORMS=cpu)"
        )


def _shared(config: EngineConfig) -> EngineConfig:
    """The options in which all processes of an engine must agree: the others as if nobody had set them."""
    own = ("distributed", "coordinator_address", "num_processes", "process_id", "compilation_cache_dir")
    return replace(config, **{name: getattr(EngineConfig(), name) for name in own})


@partial(jax.jit, donate_argnums=0)
def _write_steering(state: DeviceState, slot, steering) -> DeviceState:
    return state._replace(steering=state.steering.at[slot].set(steering))
