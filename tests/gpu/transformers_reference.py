"""Run transformers' Qwen3 on the GPU, in a process of its own (torch and JAX do not share a GPU well).

python transformers_reference.py write DIRECTORY CONFIG_JSON     saves random weights as safetensors shards
python transformers_reference.py score DIRECTORY TOKENS_NPZ OUT  writes the logits of every position
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
    """bfloat16 logits [tokens, V] of each sequence, and how far they are from float32's: its standard deviation."""
    sequences = {name: torch.from_numpy(tokens)[None].cuda() for name, tokens in np.load(tokens_npz).items()}
    results, exact = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Qwen3ForCausalLM.from_pretrained(directory, dtype=dtype).cuda().eval()
        for name, tokens in sequences.items():
            logits = model(tokens).logits[0].float()
            if dtype == torch.float32:
                exact[name] = logits.cpu()
            else:
                results[name] = logits.cpu().numpy()
                results[f"noise_{name}"] = (logits.cpu() - exact[name]).std().numpy()
        del model
        torch.cuda.empty_cache()
    np.savez(out, **results)


if __name__ == "__main__":
    {"write": write, "score": score}[sys.argv[1]](*sys.argv[2:])
