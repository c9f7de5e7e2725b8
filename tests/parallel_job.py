"""What the tests of parallelism run in processes of their own, for the number of devices is fixed when JAX starts.

python parallel_job.py CHECKPOINT RESULT CACHE 1x1 2x4 ...      engines of (data x model) devices, over 8 on a CPU

Under scripts/launch.py, over the devices of all processes; each writes RESULT followed by its number.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from nanovllm_jax.kernels import exchange
from small_model import SMALL, small_llm

from nanovllm_jax import SamplingParams
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine import model_runner
from nanovllm_jax.models.parameters import parameters_of, set_parameters
from nanovllm_jax.parallel.sharding import make_mesh

# A row has 1 KiB. Of eight devices each adds up the sums of four rows by itself, of two devices of 28; more are added
# up by a collective.
MOST_BYTES = 7 * 4 * 1024
# Group sizes 2, 4, 5 and 8; tied and untied; kv heads that divide 8 devices, and fewer than devices.
CONFIGS = {
    "group2": replace(SMALL, hidden_size=256, num_attention_heads=16, num_key_value_heads=8),
    "group4": replace(SMALL, hidden_size=256, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True),
    "group5": replace(SMALL, hidden_size=256, num_attention_heads=40, num_key_value_heads=8, attention_bias=True),
    "group8": replace(SMALL, hidden_size=256, num_attention_heads=16, num_key_value_heads=2, head_dim=32),
}
# One prompt is longer than a step's budget, two share a prefix, and the pool is too small for all.
PROMPTS = [[5, 6, 7], list(range(40)), [9] * 20, [*range(40), 3], list(range(100, 200))]
POOL = 8
EVERY = dict(max_tokens=20, ignore_eos=True)
PARAMS = [
    SamplingParams(temperature=0, **EVERY),
    SamplingParams(temperature=1, seed=3, top_k=20, n=2, **EVERY),
    SamplingParams(temperature=0.7, seed=4, top_p=0.8, logprobs=5, prompt_logprobs=3, **EVERY),
    SamplingParams(temperature=0.9, min_p=0.1, frequency_penalty=0.5, logit_bias={3: 2.0}, min_tokens=3, **EVERY),
    SamplingParams(temperature=0, logprobs=0, repetition_penalty=1.2, **EVERY),
]


def numbers(entries):
    """Logprobs by token, in order of the tokens."""
    return [[entry.logprob for _, entry in sorted(by_token.items())] for by_token in entries or [] if by_token]


def run(directory, cache, data, model):
    """What an engine gives: two rounds, so that the second finds prefixes of the first."""
    sizes = dict(data_parallel_size=data, tensor_parallel_size=model, num_kvcache_blocks=POOL)
    model_runner.SPARED_FROM = 16 if data > 1 else 1024  # so that some have `spared` shapes, and others none
    llm = small_llm(directory, compilation_cache_dir=cache, **sizes)
    llm.runner._call_programs()  # as a start on GPUs does
    report = dict(tokens=[], logprobs=[])
    for _ in range(2):
        for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False):
            report["tokens"] += [text.token_ids for text in output.outputs]
            report["logprobs"] += numbers(output.prompt_logprobs) + numbers(output.outputs[0].logprobs)
    llm.scheduler.check()
    before = llm.runner.peers
    llm.runner.reset()
    llm.runner.restore()
    assert (llm.runner.peers is None) == (before is None)
    assert before is None or llm.runner.peers is not before, "flags may have been left behind"
    llm.reset_prefix_cache()
    if jax.process_count() == 1:
        report["updated"] = tokens_of_other_weights(llm, Path(directory))
    report["hits"] = llm.scheduler.num_prefix_hit_tokens
    report["preemptions"] = llm.scheduler.num_preemptions
    report["shares"] = {"matrices": set(), "norms": set(), "cache": {share_of(llm.runner.cache)}}
    for leaf in llm.runner.weights.leaves:
        report["shares"]["matrices" if leaf.ndim > 1 else "norms"].add(share_of(leaf))
    report["shares"] = {kind: list(shares) for kind, shares in report["shares"].items()}
    decoding = max((s for s in llm.runner.programs if not s.prefill_rows), key=lambda shape: shape.decode_rows)
    report["collectives"] = collectives(llm.runner.programs[decoding].as_text())
    report["exchanges"] = sorted({llm.runner.steps.exchanges(shape) for shape in llm.runner.programs})
    return report


def tokens_of_other_weights(llm, directory):
    """What it generates with those of a model on one device, where kv heads have no copies."""
    config = ModelConfig.from_pretrained(directory)
    model = load_model(directory, config, dtype=np.dtype("float32"), mesh=make_mesh(1))
    arrays = {path: param[...] for path, param in parameters_of(model).items()}
    set_parameters(model, {path: 0.8 * array if array.ndim > 1 else array for path, array in arrays.items()})
    llm.update_weights(model)
    outputs = llm.generate(PROMPTS, PARAMS[0], use_tqdm=False)
    return [output["token_ids"] for output in outputs]


def share_of(array):
    """How much of an array a device has."""
    return array.addressable_shards[0].data.size / array.size


def collectives(hlo):
    """[kind, elements of its result on a device] of each collective that every step runs, and of those in branches."""
    pattern = r"= (\S+|\(.*?\)) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    found = [
        [[kind, sum(map(size_of, re.findall(r"\[([\d,]*)\]", shape)))] for shape, kind in re.findall(pattern, part)]
        for part in hlo.split("\nENTRY ")
    ]
    return {"always": found[1], "branches": found[0]}


def size_of(dimensions):
    size = 1
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


def main():
    directory, result, cache, *meshes = sys.argv[1:]
    exchange.MOST_BYTES = MOST_BYTES
    if not jax.distributed.is_initialized():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    reports = {mesh: run(directory, cache, *map(int, mesh.split("x"))) for mesh in meshes}
    number = jax.process_index() if jax.process_count() > 1 else ""
    Path(f"{result}{number}").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
