"""One model over several devices: on a CPU, which JAX is told to take for eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from small_model import small_llm, write_checkpoint

from nanovllm_jax import LLM, SamplingParams

PROMPTS = [[5, 6, 7], list(range(40)), [9] * 20, [*range(40), 3], [1]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

SCRIPT = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tensor_parallel import on_devices
print(json.dumps(on_devices(sys.argv[1], sys.argv[2])))
"""


def generate(llm):
    """Tokens of mixed lengths with chunked prefill, then with prefix hits."""
    return [[out["token_ids"] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] for _ in range(2)]


def share_of(array):
    """How much of an array the first device has."""
    return array.addressable_shards[0].data.size / array.size


def on_devices(directory, cache):
    """What engines over 2 and 4 devices give, how large a device's share of weights and cache is, and one refusal."""
    report = {}
    for size in (2, 4):
        llm = small_llm(directory, tensor_parallel_size=size, compilation_cache_dir=cache)
        tokens, pages = generate(llm), llm.runner.caches[0].k
        shares = {"matrices": set(), "norms": set(), "cache": {share_of(pages)}}
        for leaf in llm.runner.leaves:
            shares["matrices" if leaf.ndim > 1 else "norms"].add(share_of(leaf))
        report[size] = dict(tokens=tokens, shares={kind: list(found) for kind, found in shares.items()})
        report["hits"] = llm.scheduler.num_prefix_hit_tokens
    try:
        small_llm(directory, tensor_parallel_size=3)
    except ValueError as error:
        report["refused"] = str(error)
    return report


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("parallel") / "model")


@pytest.fixture(scope="module")
def report(directory):
    """`on_devices` in a process of its own: the number of devices is fixed when JAX starts."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SCRIPT, str(directory), jax.config.jax_compilation_cache_dir]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", ["2", "4"])
def test_greedy_tokens_are_those_of_one_device(directory, report, size):
    assert report[size]["tokens"] == generate(small_llm(directory))
    assert report["hits"] > 32


@pytest.mark.parametrize("size", ["2", "4"])
def test_each_device_has_its_share(report, size):
    """Of every matrix and of the cache; norms are whole on each."""
    share = 1 / int(size)
    assert report[size]["shares"] == {"matrices": [share], "norms": [1], "cache": [share]}


def test_sizes_that_do_not_divide_the_heads(report):
    assert report["refused"] == (
        "tensor_parallel_size=3 must divide num_key_value_heads=4, intermediate_size=96 and vocab_size=512: "
        "use one of [1, 2, 4]"
    )


def test_more_devices_than_there_are(directory):
    with pytest.raises(ValueError, match="tensor_parallel_size=2 needs as many devices, but JAX sees 1: "):
        LLM(directory, tensor_parallel_size=2)
