"""Run transformers' Qwen3 on the GPU, in a process of its own (torch and JAX do not share a GPU well).

    python transformers_reference.py write DIRECTORY CONFIG_JSON     save random weights as safetensors shards
    python transformers_reference.py score DIRECTORY TOKENS_NPZ OUT  logits of every position of each sequence
"""

import json
import sys

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def write(directory: str, config_json: str) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**json.loads(config_json))).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="5GB")


@torch.no_grad()
def score(directory: str, tokens_npz: str, out: str) -> None:
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).cuda().eval()
    logits = {}
    for name, tokens in np.load(tokens_npz).items():
        scores = model(torch.from_numpy(tokens)[None].cuda()).logits[0]
        logits[name] = scores.float().cpu().numpy().astype(np.float16)  # bfloat16's 8 bits fit
    np.savez(out, **logits)


if __name__ == "__main__":
    {"write": write, "score": score}[sys.argv[1]](*sys.argv[2:])
