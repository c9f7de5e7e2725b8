"""How the engine runs a model, as the user says."""

import difflib
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanovllm_jax.config import DTYPES, LARGEST_SIZE
from nanovllm_jax.probe import Probe
from nanovllm_jax.values import check_switch, integer, number

SHARE = (math.ulp(0.0), 1, "above 0 and at most 1")
INTEGERS = {  # least, most, and both in words
    "max_model_len": (2, math.inf, "at least 2"),  # one token of the prompt, one generated
    "max_num_seqs": (1, math.inf, "at least 1"),
    "max_num_batched_tokens": (1, math.inf, "at least 1"),
    "num_kvcache_blocks": (1, math.inf, "at least 1"),
    "num_scheduler_steps": (1, LARGEST_SIZE, f"from 1 to {LARGEST_SIZE}"),
    "num_processes": (1, math.inf, "at least 1"),
    "process_id": (0, math.inf, "at least 0"),
    "tensor_parallel_size": (1, math.inf, "at least 1"),
    "data_parallel_size": (1, math.inf, "at least 1"),
    "block_size": (16, 256, "16, 32, 64, 128 or 256"),
    "seed": (-(2**63), 2**64 - 1, "within 64 bits"),
}


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model. Names and meaning are vLLM's and nano-vllm's."""

    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens. None: the model's own limit, or what the cache can hold."""
    max_num_seqs: int | None = None
    """Most sequences that run at a time. None: 512 on a GPU, 32 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step. None: 16,384 on a GPU, 1,024 on a CPU."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, workspace and KV cache together. JAX takes it once a process: what
    XLA_CLIENT_MEM_FRACTION says, else what the first engine does."""
    num_scheduler_steps: int | None = None
    """Tokens that one program decodes for each of up to 128 sequences when nobody waits. None: 3 of a sequence that is
    alone, on a GPU where model and context are so small that it would wait for the host; else 1."""
    tensor_parallel_size: int = 1
    """Number of devices that the model is spread over."""
    data_parallel_size: int = 1
    """Number of such groups of devices, each with sequences and a cache of its own."""
    distributed: bool = False
    """This script runs in several processes, which share the model: JAX finds them, as under SLURM, or what follows."""
    coordinator_address: str | None = None
    """host:port of process 0, on a port that is free there."""
    num_processes: int | None = None
    """How many run this script."""
    process_id: int | None = None
    """Which of them this one is, counted from 0."""
    enforce_eager: bool = False
    """Run the step un-jitted: slow, but prints and a debugger work inside the model."""
    block_size: int = 256
    """Tokens in one block of the KV cache: a power of two from 16 to 256."""
    num_kvcache_blocks: int | None = None
    """Size of the block pool. None: what gpu_memory_utilization leaves; on a CPU at most 1 GiB."""
    enable_prefix_caching: bool = True
    """Reuse the keys and values of prompt prefixes that were computed before."""
    dtype: str = "auto"
    """auto (the checkpoint's own; on a CPU float32 in place of 16 bits), float32, bfloat16 or float16."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own, and random weights."""
    deterministic: bool = False
    """A request's logits are the same to the last bit whatever the batch and the chunks: slower, and on one device."""
    load_format: str = "auto"
    """auto: read the checkpoint; dummy: random weights, only config.json is needed."""
    compilation_cache_dir: str | Path | None = "~/.cache/nanovllm_jax"
    """Where compiled programs are kept between runs; None keeps none. JAX has one such place for all of a process: what
    JAX_COMPILATION_CACHE_DIR says, else what the first engine says that names one."""
    probe: Probe | None = None
    """What to take out of the compiled step, and what to change in it."""

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """Build from keyword options, refusing unknown names (TypeError) and values that cannot be (ValueError)."""
        if "kvcache_block_size" in options:  # nano-vllm's name
            if "block_size" in options:
                raise TypeError("block_size and kvcache_block_size are the same option; give one of them")
            options["block_size"] = options.pop("kvcache_block_size")
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, "kvcache_block_size"], n=1, cutoff=0.65)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
                raise TypeError(f"LLM() has no option {name!r}{hint}")
        return cls(**options)

    def __post_init__(self):
        """Raise ValueError or TypeError for a value out of range."""
        for name, (least, most, words) in INTEGERS.items():
            optional = getattr(EngineConfig, name) is None  # where that is its default
            self._set(name, integer(name, getattr(self, name), least, most, words, optional))
        self._set("gpu_memory_utilization", number("gpu_memory_utilization", self.gpu_memory_utilization, *SHARE))
        for name in ("enforce_eager", "enable_prefix_caching", "deterministic", "distributed"):
            check_switch(name, getattr(self, name))
        if self.block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size must be 16, 32, 64, 128 or 256, not {self.block_size}")
        if not isinstance(self.dtype, str) or self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {self.dtype!r}")
        if not isinstance(self.load_format, str) or self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format must be 'auto' or 'dummy', not {self.load_format!r}")
        if not (self.probe is None or isinstance(self.probe, Probe)):
            raise TypeError(f"probe must be a Probe or None, not {self.probe!r}")
        if not isinstance(self.compilation_cache_dir, (str, Path, type(None))):
            raise TypeError(f"compilation_cache_dir must be a directory or None, not {self.compilation_cache_dir!r}")
        self._check_devices()
        self._check_processes()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_devices(self) -> None:
        if self.deterministic and self.tensor_parallel_size * self.data_parallel_size > 1:
            raise ValueError(
                f"deterministic=True runs on one device, not on tensor_parallel_size={self.tensor_parallel_size} times "
                f"data_parallel_size={self.data_parallel_size}: sums over devices are added up in an order that "
                "depends on the batch"
            )
        if self.probe and (self.tensor_parallel_size, self.data_parallel_size) != (1, 1):
            raise ValueError(
                "a probe needs the whole model on one device: tensor_parallel_size=1, data_parallel_size=1"
            )

    def _check_processes(self) -> None:
        address, count, own = self.coordinator_address, self.num_processes, self.process_id
        if (address, count, own) == (None, None, None):
            return
        if None in (address, count, own):
            raise ValueError(
                "coordinator_address, num_processes and process_id go together; without them, distributed=True leaves "
                f"it to JAX to find the processes. Given were {address!r}, {count!r} and {own!r}"
            )
        if not isinstance(address, str) or not re.fullmatch(r"\S+:\d+", address):
            raise ValueError(f"coordinator_address must be of the form 'host:port', not {address!r}")
        if own >= count:
            raise ValueError(f"process_id={own} must be below num_processes={count}: they count from 0")
