"""One model over several devices and processes: on a CPU, which JAX is told to take for several."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from parallel_job import CONFIGS
from small_model import small_llm, write_checkpoint

from nanovllm_jax import LLM
from nanovllm_jax.parallel import peers
from nanovllm_jax.parallel.sizes import split_config

HERE = Path(__file__).parent
JOB = str(HERE / "parallel_job.py")
LAUNCH = [sys.executable, str(HERE.parent / "scripts" / "launch.py")]


def run(*command):
    done = subprocess.run(list(map(str, command)), cwd=HERE, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]


def reports_of(directory, *meshes, processes=1, devices=8):
    """What the job writes, as each of its processes sees it."""
    result, arguments = directory / "report", (jax.config.jax_compilation_cache_dir, *meshes)
    if processes == 1:
        run(sys.executable, JOB, directory, result, *arguments)
        return json.loads(result.read_text())
    run(*LAUNCH, "--processes", processes, "--devices", devices, JOB, directory, result, *arguments)
    first, *others = (json.loads(Path(f"{result}{number}").read_text()) for number in range(processes))
    assert all(other == first for other in others), "generate() gives every process the same"
    return first


def assert_same(report, reference):
    """Tokens are equal, and log probabilities equal but for the order of sums."""
    assert report["tokens"] == reference["tokens"]
    for ours, theirs in zip(report["logprobs"], reference["logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = replace(CONFIGS["group4"], num_hidden_layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("parallel") / "model", config)


@pytest.fixture(scope="module")
def reports(directory):
    return reports_of(directory, "1x1", "1x4", "2x2")


@pytest.mark.parametrize("mesh", ["1x4", "2x2"])
def test_results_are_those_of_one_device(reports, mesh):
    """Two kv heads, also over four devices; chunks, prefix hits, preemption, and every kind of sampling."""
    assert_same(reports[mesh], reports["1x1"])
    for name in ("1x1", "1x4"):
        assert reports[name]["hits"] > 32, name
        assert reports[name]["preemptions"] > 0, name


def test_new_weights_of_one_device(reports):
    """Those of a training loop, which knows nothing of copied kv heads."""
    updated = reports["1x1"]["updated"]
    assert reports["1x4"]["updated"] == reports["2x2"]["updated"] == updated
    assert updated[0] != reports["1x1"]["tokens"][0]


def test_each_device_has_its_share(reports):
    """Of every matrix and of the cache; norms are whole on each. Two kv heads become four: their rows are not fewer."""
    assert reports["1x4"]["shares"] == {"matrices": [1 / 4], "norms": [1], "cache": [1 / 4]}
    assert reports["2x2"]["shares"] == {"matrices": [1 / 2], "norms": [1], "cache": [1 / 4]}


TWO_DEVICES = """
from dataclasses import replace
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as Spec
"""
# A layer that hands on parts of a sum: over two devices it has one part, their sum.
A_LAYER = """
from nanovllm_jax.kernels import whole
from nanovllm_jax.layers.linear import Linear
from nanovllm_jax.parallel.sharding import make_mesh, per_device

layer = Linear(1024, (512,), axes=("embed", "mlp"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (5, 1024), jnp.bfloat16)
assert layer.parts(x).here.shape == (4, 5, 512)
leaves, treedef = jax.tree.flatten(layer)

def parts(x, *leaves):
    layer = jax.tree.unflatten(treedef, leaves)
    assert layer.no_parts((5,)).shape == (1, 5, 512)
    return layer.parts(x).here

share = Spec(None, "model")
both = jax.jit(per_device(parts, make_mesh(2), (share, share), Spec()))(x, *leaves)
got, want = (np.asarray(whole(p, x.dtype), np.float32) for p in (both, layer.parts(x).here))
np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * np.abs(want).max())
"""
A_MODEL = """
from nanovllm_jax.layers.attention import causal_attention
from nanovllm_jax.models.parameters import abstract_model
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.peers import connect_peers, peers_layout, reach_one_another
from nanovllm_jax.parallel.sharding import make_mesh, per_device, specs_of
from small_model import SMALL

config = replace(SMALL, hidden_size=512, intermediate_size=1024, num_attention_heads=16, head_dim=32)
mesh, dtype = make_mesh(2), jnp.dtype("bfloat16")
assert reach_one_another(mesh) and not reach_one_another(make_mesh(1))
layout = peers_layout(mesh, 512, dtype)
peers = connect_peers(layout)
low, high = np.asarray(peers.table)[:, 1:].view(np.uint32).reshape(2, 2, 2).astype(int).transpose(1, 0, 2)
shards = [shard.data.unsafe_buffer_pointer() for shard in peers.memory.addressable_shards]
assert ((low + (high << 32)) == shards).all() and np.asarray(peers.table)[:, 0].tolist() == [0, 1]

leaves, treedef = jax.tree.flatten(Qwen3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
specs = [leaf.sharding.spec for leaf in jax.tree.leaves(abstract_model(config, dtype, mesh, False)[0])]

def hidden(use, tokens, peers, *leaves):
    model, peers = jax.tree.unflatten(treedef, leaves), peers if use else None
    return model(tokens, jnp.arange(len(tokens)), None, causal_attention, peers=peers)[0][None]

for rows in (1, 40, 100, 300):  # whose matmuls are in one part, in four, in two, and in one
    tokens = jnp.asarray(np.random.default_rng(rows).integers(0, 511, rows))
    one = np.asarray(jax.jit(hidden, static_argnums=0)(False, tokens, None, *leaves), np.float32)
    for use in (True, False):
        step = per_device(lambda *args: hidden(use, *args), mesh, (Spec(), specs_of(layout), *specs), Spec("model"))
        lowered = jax.jit(step).lower(tokens, peers, *leaves)
        assert ("all_reduce_norm" in lowered.as_text()) == use
        got = np.asarray(lowered.compile()(tokens, peers, *leaves), np.float32)
        np.testing.assert_array_equal(got[0], got[1])
        np.testing.assert_allclose(got[:1], one, atol=0.03 * np.abs(one).max(), err_msg=f"{rows} {use}")
"""


def test_sums_by_kernels_and_by_collectives():
    """Of a layer in parts, then of a model in 16 bits: both are what one device has, and the same on all."""
    run(sys.executable, "-c", TWO_DEVICES + A_LAYER + A_MODEL)  # one process: imports take seconds


@pytest.mark.parametrize(
    ("can", "allocator", "driver", "expected"),
    [
        ({(0, 1), (1, 0)}, "", True, True),
        ({(0, 1)}, "", True, False),
        ({(0, 1), (1, 0)}, "cuda_async", True, False),
        ({(0, 1), (1, 0)}, "default", False, False),
        ({}, "default", True, False),
    ],
)
def test_gpus_that_reach_one_another(can, allocator, driver, expected, monkeypatch):
    def access(found, *pair):
        found._obj.value = pair in can
        return 0 if can else 1  # a CUDA error

    def library(name):
        if not driver:
            raise OSError(name)
        return SimpleNamespace(cuDeviceCanAccessPeer=access)

    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", allocator)
    monkeypatch.setattr(peers.ctypes, "CDLL", library)
    gpus = [SimpleNamespace(platform="gpu", local_hardware_id=number) for number in range(2)]
    assert peers.reach_one_another(SimpleNamespace(shape={"model": 2}, devices=np.array([gpus]))) == expected


def check_collectives(report, data, model, layers, biased=False):
    """Of a decode step with 4 rows: two sums a layer and one for the embedding.

    And each row's logits, penalized and raw, come together on one device, and what is drawn goes to all. Nothing of it
    is in a branch, at which the host would wait.
    """
    rows, hidden, vocab, top = 4, 256, 512, 20
    always, branches = (report["collectives"][part] for part in ("always", "branches"))
    sums = [size for kind, size in always if kind == "all-reduce"]
    assert sums == [rows * hidden] * (2 * layers + 1)
    share = -(-rows // model)
    assert [size for kind, size in always if kind == "all-to-all"] == [2 * share * vocab]
    drawn = [share * model * (1 + 2 * (1 + top))]  # tokens and log probabilities
    groups = [] if data == 1 else [data * rows, data * rows * 2 * (1 + top)]  # which data groups tell each other
    assert sorted(size for kind, size in always if kind == "all-gather") == sorted(drawn + groups)
    assert len(always) == len(sums) + 1 + len(drawn) + len(groups)
    assert not branches
    assert report["exchanges"] == ([False] if biased else [False, True]), "both ways of adding up are tested"


@pytest.mark.parametrize("mesh", ["1x4", "2x2"])
def test_collectives_of_a_step(reports, mesh):
    check_collectives(reports[mesh], *map(int, mesh.split("x")), layers=1)


@pytest.mark.slow
def test_processes(directory, reports):
    """Two processes with a device each, over loopback: a data group in each."""
    assert_same(reports_of(directory, "2x1", processes=2, devices=1)["2x1"], reports["1x1"])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(directory, tmp_path, victim):
    """With an error that says so, and in bounded time."""
    arguments = directory, jax.config.jax_compilation_cache_dir, tmp_path / "pid"
    command = [*LAUNCH, "--processes", 2, "--devices", 1, HERE / "killed_job.py", *arguments]
    launcher = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    files, deadline = [Path(f"{tmp_path}/pid{number}") for number in range(2)], time.monotonic() + 400
    while not all(file.exists() and file.read_text() for file in files):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pids = [int(file.read_text()) for file in files]
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    while Path(f"/proc/{pids[1 - victim]}").exists():
        assert time.monotonic() < killed + 80, "it hangs"
        time.sleep(0.1)
    _, errors = launcher.communicate(timeout=120)
    assert f"process {victim} of 2 ended with -9" in errors
    assert launcher.returncode
    if victim == 1:  # of the other's output the launcher shows nothing
        assert "another one may have ended" in errors or "another task died" in errors


# ------------------------------------------------------------ sizes that cannot be


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [(8, 4, [1, 2, 4, 8]), (8, 2, [1, 2, 4, 8]), (40, 8, [1, 2, 4, 8]), (6, 3, [1, 3, 6])],
)
def test_sizes_that_a_model_can_be_split_into(heads, kv_heads, sizes):
    config = replace(CONFIGS["group4"], num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=480)
    assert [size for size in sizes if split_config(config, size).kv_heads % size == 0] == sizes
    with pytest.raises(ValueError, match=rf"tensor_parallel_size=7 .*use one of \[{str(sizes)[1:-1]}"):
        split_config(config, 7)


def test_a_size_that_does_not_fit(directory):
    message = (
        "tensor_parallel_size=3 must divide num_attention_heads=8, intermediate_size=96 and vocab_size=512, and divide "
        "num_key_value_heads=2 or be a multiple of it: use one of [1, 2, 4, 8]"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        small_llm(directory, tensor_parallel_size=3)


@pytest.mark.parametrize("sizes", [dict(tensor_parallel_size=2), dict(data_parallel_size=2)])
def test_more_devices_than_there_are(directory, sizes):
    with pytest.raises(ValueError, match=r"needs as many devices.*, but JAX sees 1: "):
        LLM(directory, **sizes)


# ------------------------------------------------------------ everything, with -m slow

MESHES = ["1x1", "1x2", "1x4", "1x8", "2x2", "2x4"]


@pytest.fixture(scope="module", params=CONFIGS)
def every_mesh(request, tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp(request.param) / "model", CONFIGS[request.param])
    return directory, reports_of(directory, *MESHES)


@pytest.mark.slow
def test_every_mesh(every_mesh, request):
    _, reports = every_mesh
    biased = CONFIGS[request.node.callspec.params["every_mesh"]].attention_bias
    for mesh in MESHES[1:]:
        assert_same(reports[mesh], reports["1x1"])
        assert reports[mesh]["hits"] > 32, mesh
        check_collectives(reports[mesh], *map(int, mesh.split("x")), layers=2, biased=biased)
    assert all(reports[mesh]["preemptions"] for mesh in MESHES[:4])


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "meshes"), [(2, ["1x4", "2x2"]), (4, ["1x8", "2x4"])])
def test_two_processes(every_mesh, devices, meshes):
    directory, alone = every_mesh
    reports = reports_of(directory, *meshes, processes=2, devices=devices)
    for mesh in meshes:
        assert_same(reports[mesh], alone["1x1"])
