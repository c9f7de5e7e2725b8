"""Scores and new weights over all devices: `python processes_job.py CHECKPOINT RESULT CACHE`.

Alone over two devices of a CPU, under scripts/launch.py over those of all processes. Each writes RESULT and its number.
"""

import json
import logging
import shutil
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from safetensors.numpy import load_file
from small_model import assert_idle, small_llm

from nanovllm_jax import SamplingParams
from nanovllm_jax.checkpoints.huggingface import save_pretrained
from nanovllm_jax.parallel import processes

PROMPTS = [[5, 6, 7], list(range(40)), [9] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
COMPLETIONS = [[1, 2, 3], list(range(70, 100)), [4]]


def answers(llm):
    """What an engine says, as it depends on its weights."""
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output["token_ids"] for output in outputs], llm.score(PROMPTS, COMPLETIONS, use_tqdm=False)


def whole_weights(llm):
    """All numbers of the weights, by path."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(llm.runner.mesh, Spec()))
    arrays = [np.asarray(whole(leaf).addressable_data(0)) for leaf in llm.runner.weights.leaves]
    return dict(zip(llm.runner.weights.targets, arrays))


def scaled(weights, factor):
    return {path: array if array.ndim == 1 else factor * array for path, array in weights.items()}


def without_one(weights):
    return dict(list(weights.items())[1:])


def spread(weights):
    """As a training loop has them: over all devices along the last dimension, in another mesh and dtype."""
    mesh = Mesh(np.array(jax.devices()), "trainer")

    def put(array):
        sharding = NamedSharding(mesh, Spec(*[None] * (array.ndim - 1), "trainer"))
        return jax.make_array_from_callback(array.shape, sharding, array.astype(jnp.bfloat16).__getitem__)

    return {path: put(array) for path, array in weights.items()}


def every_form(llm, weights):
    """The engine's answers with weights given in each form, which differ."""
    own = {path: jnp.asarray(array) for path, array in scaled(weights, 0.8).items()}
    given = {"numpy": scaled(weights, 0.9), "own": own, "spread": spread(scaled(weights, 0.7))}
    found = {}
    for name, arrays in given.items():
        llm.update_weights(arrays, donate=name == "own")
        found[name] = answers(llm)
    for way in ("finish", "recompute"):
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
        outputs = llm.step() + llm.step() + llm.step()
        llm.update_weights(scaled(weights, {"finish": 1.1, "recompute": 1}[way]), in_flight=way)
        while llm.has_unfinished_requests():
            outputs += llm.step()
        by_id = {output.request_id: output["token_ids"] for output in outputs}
        found[way] = [by_id[request_id] for request_id in ids]
    return found


def refused(llm, weights, directory):
    """What is said where processes ask for different things: they can go on from there."""
    mine, said = jax.process_index(), []
    wrong = [
        lambda: llm.update_weights(scaled(weights, 1 + mine)),
        lambda: llm.update_weights(spread(weights) if mine else weights),
        lambda: llm.update_weights(without_one(weights) if mine else weights),
        lambda: llm.generate([[1, mine]], GREEDY, use_tqdm=False),
        lambda: llm.score([[1]], [[2, mine]], use_tqdm=False),
        lambda: llm.update_weights(weights, in_flight="finish" if mine else "recompute"),
    ]
    for call in wrong:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
        assert_idle(llm)
    sizes = dict(tensor_parallel_size=jax.device_count(), num_kvcache_blocks=9)
    other = sizes | dict(num_kvcache_blocks=10)
    split = dict(data_parallel_size=jax.device_count(), num_kvcache_blocks=9)
    ends = Path(f"{directory}-ends{mine}")  # the same model, whose texts end with another token in each process
    shutil.copytree(directory, ends)
    (ends / "generation_config.json").write_text(json.dumps({"eos_token_id": 7 + mine}))
    cases = [(directory, dict(dtype="float32" if mine else "bfloat16", **sizes))]
    cases += [(directory, other if mine else sizes), (directory, split if mine else sizes), (ends, sizes)]
    for model, options in cases:
        try:
            small_llm(model, **options)
        except RuntimeError as error:
            said.append(str(error))
    return said


def saved(llm, result):
    """A checksum of the checkpoint that all processes save together: after the call it is there for each of them."""
    save_pretrained(llm.model, f"{result}-saved")
    tensors = load_file(f"{result}-saved/model.safetensors")
    return {name: zlib.crc32(tensors[name].tobytes()) for name in sorted(tensors)}


def warned(llm):
    """What is logged in this process while another one is late."""
    handler, said = logging.Handler(), []
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("nanovllm_jax").addHandler(handler)
    processes.PATIENCE_SECONDS = 0.5
    if jax.process_index():
        time.sleep(3)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return said


def main():
    directory, result, cache = sys.argv[1:]
    if not jax.distributed.is_initialized():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
    sizes = dict(tensor_parallel_size=jax.device_count(), num_kvcache_blocks=9)
    llm = small_llm(directory, compilation_cache_dir=cache, **sizes)
    weights = whole_weights(llm)
    report = dict(first=answers(llm), **every_form(llm, weights), last=answers(llm), saved=saved(llm, result))
    if jax.process_count() > 1:
        report |= dict(refused=refused(llm, weights, directory), then=answers(llm), warned=warned(llm))
    Path(f"{result}{jax.process_index()}").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
