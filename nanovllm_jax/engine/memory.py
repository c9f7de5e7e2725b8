"""How large the pool of KV blocks may be: one factor a line, bytes throughout."""

import os
from dataclasses import dataclass
from typing import Any

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine_config import EngineConfig
from nanovllm_jax.machine import GIB, host_memory

RESERVE = GIB // 2  # cuBLAS workspaces, the arrays of a step in flight, what devices exchange sums by, fragmentation


@dataclass(frozen=True)
class MemoryPlan:
    """What the memory given to the engine is used for, on one device, in bytes."""

    budget: int | None
    """What weights, workspace and cache may take together; None on a CPU, where nothing is counted."""
    weights: int
    """The model's, and whatever else is in use: another engine's."""
    workspace: int
    """The largest temporary memory of a program, and the reserve."""
    block: int
    """One block of the cache, of all layers."""
    rows: int
    """And how many keys and values of a head it holds: kernels number them by 31 bits."""

    @property
    def blocks(self) -> int:
        """Blocks that fit, rounded down to 3 digits so that the compiled programs stay the same from run to run."""
        free = self.budget - self.weights - self.workspace
        blocks = max(0, min(free // self.block, 2**31 // self.rows))
        step = 10 ** max(0, len(str(blocks)) - 3)
        return blocks // step * step


def estimate_workspace(model: ModelConfig, itemsize: int, tokens: int, rows: int, shards: int) -> int:
    """An upper estimate of a step's temporary memory, needed before the programs can be compiled; checked after."""
    widest = 2 * model.intermediate_size + (2 * model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
    activations = tokens * (4 * model.hidden_size + widest // shards) * itemsize
    copies = 3 if shards == 1 else 6  # several devices exchange them, with penalties and without
    logits = copies * rows * model.vocab_size * 4 // shards
    return activations + logits


def largest_matmul(model: ModelConfig, itemsize: int, tokens: int, rows: int, shards: int) -> int:
    """Bytes of the arrays of a step's largest matmul: gate and up, or the head's, in float32."""
    hidden, gated, vocab = model.hidden_size, 2 * model.intermediate_size // shards, model.vocab_size // shards
    gate_up = (tokens * (hidden + gated) + hidden * gated) * itemsize
    return max(gate_up, hidden * vocab * itemsize + rows * vocab * 4)


def memory_stats(device: Any) -> dict[str, int]:
    """What a GPU's allocator says of the memory it has. Raises RuntimeError for one that says nothing."""
    stats = device.memory_stats()
    if stats is None:
        raise RuntimeError(
            f"XLA_PYTHON_CLIENT_ALLOCATOR={os.environ.get('XLA_PYTHON_CLIENT_ALLOCATOR')!r} does not tell how much "
            "memory there is, which decides the size of the KV cache: unset it, or set it to 'default' or 'cuda_async'"
        )
    return stats


def decide_num_blocks(plan: MemoryPlan, config: EngineConfig, wanted: int) -> int:
    """The pool's size in blocks: the user's number, what fits on the GPU, or on a CPU what is wanted within 1 GiB.

    Raises ValueError when it does not fit, saying what would.
    """
    asked = config.num_kvcache_blocks
    if plan.budget is None:
        if plan.workspace > host_memory():
            raise ValueError(
                f"a step takes {plan.workspace / GIB:.2f} GiB, more than this machine's {host_memory() / GIB:.2f} GiB "
                "of memory: lower max_num_seqs or max_num_batched_tokens"
            )
        if asked and asked * plan.block > host_memory():
            raise ValueError(
                f"num_kvcache_blocks={asked} takes {asked * plan.block / GIB:.2f} GiB, more than this machine's "
                f"{host_memory() / GIB:.2f} GiB of memory; lower it"
            )
        return asked or max(1, min(wanted, GIB // plan.block))
    fits = plan.blocks
    if fits < (asked or 1):
        raise ValueError(
            f"the memory does not hold the model: {plan.budget / GIB:.2f} GiB "
            f"(gpu_memory_utilization={config.gpu_memory_utilization}) less weights {plan.weights / GIB:.2f} "
            f"and workspace {plan.workspace / GIB:.2f} GiB leave room for {fits} blocks of {plan.block / GIB:.3f} GiB; "
            f"needed are {asked or 1}. Raise gpu_memory_utilization, or lower "
            "max_num_batched_tokens, max_num_seqs or num_kvcache_blocks, or use more devices (tensor_parallel_size)"
        )
    return asked or fits


def decide_max_model_len(config: EngineConfig, own: int, num_blocks: int) -> int:
    """The longest prompt and answer, in tokens: the user's number, or else what model (`own`) and pool both allow.

    Raises ValueError for a number beyond either.
    """
    asked, pool = config.max_model_len, num_blocks * config.block_size
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
