"""What tests of loading run in processes of their own: random weights over meshes, and the memory that loading takes.

python weights_job.py random           over 8 devices of a CPU
python weights_job.py memory DIRECTORY RESULT      under scripts/launch.py; each process writes RESULT and its number
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from parallel_job import CONFIGS

from nanovllm_jax.checkpoints import random
from nanovllm_jax.checkpoints.load import ModelLoader
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.parameters import parameters_of
from nanovllm_jax.parallel.sharding import make_mesh
from nanovllm_jax.parallel.sizes import split_config


def load(directory, config, shards, load_format="dummy"):
    config = split_config(config, shards)
    return ModelLoader(directory, config, dtype=np.dtype("float32"), mesh=make_mesh(shards), load_format=load_format)


def random_weights():
    """Assert that random weights are the same over 1 and 8 devices, and that a device makes no more than its shard."""
    config = CONFIGS["group8"]
    (whole, split), model = (parameters_of(load(None, config, n).load()) for n in (1, 8)), load(None, config, 8)
    copies = model.config.kv_copies
    assert copies == 4
    for path, param in whole.items():
        ours, theirs = np.asarray(split[path][...]), np.asarray(param[...])
        if "qkv_proj" in path:  # [K, G + 2, ...] of other K and G: by heads
            ours, theirs = by_heads(ours, copies), by_heads(theirs, 1)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))
    for path, target in model.targets.items():
        if "norm" not in str(path):
            options = copies if "qkv_proj" in path else None
            program = random.normal.lower(jax.random.key(0), target, options).compile()
            shard = np.prod(target.sharding.shard_shape(target.shape)) * 4
            memory = program.memory_analysis()
            assert memory.output_size_in_bytes <= shard + 64, path
            assert memory.temp_size_in_bytes <= 4 * shard + 4096, path
            assert not re.search("all-gather|all-reduce|all-to-all|collective", program.as_text()), path


def by_heads(qkv, copies):
    """Queries of all heads, and the keys and values that differ."""
    q, kv = qkv[:, :-2], qkv[::copies, -2:]
    return np.concatenate((q.reshape(-1, *q.shape[2:]), kv.reshape(-1, *kv.shape[2:])))


def anonymous_bytes():
    """This process's memory without mapped files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(work):
    """How far the memory grows while `work` runs, looked at every few milliseconds; and what it returns."""
    before, seen, done = anonymous_bytes(), [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return max(seen) - before, result


def measure(directory, result):
    """Memory that a checkpoint's loading takes in this process, and that its shards take in the end."""
    loader = load(Path(directory), ModelConfig.from_pretrained(Path(directory)), jax.device_count(), "auto")
    largest = max(np.prod(t.sharding.shard_shape(t.shape)) * 4 for t in loader.targets.values())
    peak, _ = peak_of(loader.load)
    own = loader.device_bytes * jax.local_device_count()
    report = dict(
        peak=peak, own=own, largest=int(largest), files=sum(f.stat().st_size for f in Path(directory).iterdir())
    )
    Path(f"{result}{jax.process_index()}").write_text(json.dumps(report))


def main():
    if sys.argv[1] == "memory":
        measure(*sys.argv[2:])
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    random_weights()


if __name__ == "__main__":
    main()
