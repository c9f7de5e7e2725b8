"""Run transformers' Qwen3 on the GPU, in a process of its own (torch and JAX do not share a GPU well).

python transformers_reference.py write DIRECTORY CONFIG_JSON     saves random weights as safetensors shards
python transformers_reference.py score DIRECTORY TOKENS_NPZ OUT  writes the logits of every position
"""

import json
import sys

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write(directory: str, config_json: str) -> None:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(Qwen3Config(**json.loads(config_json))).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="5GB")


@torch.no_grad()
def score(directory: str, tokens_npz: str, out: str) -> None:
    """For each sequence its float32 logits [tokens, V], and as noise_* the standard deviation of bfloat16's error.

    The last sequence's bfloat16 logits are written too, as rounded.
    """
    sequences = {name: torch.from_numpy(tokens)[None].to(DEVICE) for name, tokens in np.load(tokens_npz).items()}
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(DEVICE).eval()
    rounded = {name: model(tokens).logits[0].float() for name, tokens in sequences.items()}
    model.float()  # exact: the weights are bfloat16 numbers
    results = {}
    for name, tokens in sequences.items():
        results[name] = model(tokens).logits[0]
        results[f"noise_{name}"] = (results[name] - rounded[name]).std()
    results["rounded"] = rounded[name]
    np.savez(out, **{name: value.cpu().numpy() for name, value in results.items()})


if __name__ == "__main__":
    {"write": write, "score": score}[sys.argv[1]](*sys.argv[2:])
