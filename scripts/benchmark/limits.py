"""What a card allows: the bytes to move and FLOPs to do, over the rates that it reaches. Pure arithmetic.

Counted are weights, keys and values, matmuls and attention. Activations, sampling and launches count as free, so no
engine reaches the limit. N query heads, K kv heads, H head_dim, D hidden, F mlp, V vocab.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from nanovllm_jax.config import ModelConfig


class Card(NamedTuple):
    """Measured rates of a GPU, per second."""

    bytes: float
    flops: float


H200 = Card(bytes=4.4e12, flops=790e12)  # about what card.py measures


class Cost(NamedTuple):
    """What some work must move and compute."""

    bytes: float
    flops: float

    @classmethod
    def total(cls, costs: Iterable["Cost"]) -> "Cost":
        """Of all of them."""
        return cls(*map(sum, zip(*costs)))

    def seconds(self, card: Card) -> float:
        """The slower of the two: they overlap at best."""
        return max(self.bytes / card.bytes, self.flops / card.flops)


def phase_costs(
    config: ModelConfig, itemsize: int, *, tokens: int, sampled: int, context: int, attended: int
) -> dict[str, Cost]:
    """One step's cost by the named scopes of the model.

    tokens: computed ones; sampled: rows that get logits; context: tokens whose keys and values are read or written;
    attended: keys summed over the query tokens.
    """
    c = config
    attention = c.num_hidden_layers * c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    mlp = c.num_hidden_layers * 3 * c.hidden_size * c.intermediate_size
    head = c.vocab_size * c.hidden_size
    pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim  # FLOPs of one query and one key
    return {
        "attention": Cost(attention * itemsize, 2.0 * tokens * attention),
        "attend": Cost(context * c.kv_bytes_per_token(itemsize), float(pair) * attended),
        "mlp": Cost(mlp * itemsize, 2.0 * tokens * mlp),
        "head": Cost(head * itemsize, 2.0 * sampled * head),
    }


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """What a decode step reads of the weights: all, but of an embedding table that is not also the head only rows."""
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (config.num_parameters - table) * itemsize


def decode_phases(config: ModelConfig, itemsize: int, contexts: list[int]) -> dict[str, Cost]:
    """A step that computes one token of each sequence, each with so many tokens in the cache."""
    total = sum(contexts)
    return phase_costs(config, itemsize, tokens=len(contexts), sampled=len(contexts), context=total, attended=total)


def prefill_phases(config: ModelConfig, itemsize: int, prompts: list[int], cached: list[int]) -> dict[str, Cost]:
    """Prompts of which `cached` tokens each are in the cache already."""
    new = [prompt - known for prompt, known in zip(prompts, cached, strict=True)]
    attended = sum(n * known + n * (n + 1) // 2 for n, known in zip(new, cached, strict=True))
    return phase_costs(config, itemsize, tokens=sum(new), sampled=len(new), context=sum(prompts), attended=attended)


def prefill_seconds(config: ModelConfig, itemsize: int, card: Card, prompts: list[int], cached: list[int]) -> float:
    """The limit of computing prompts, all in one step."""
    return Cost.total(prefill_phases(config, itemsize, prompts, cached).values()).seconds(card)


def decode_step_seconds(config: ModelConfig, itemsize: int, card: Card, contexts: list[float]) -> float:
    """The limit of a decode step with these contexts: its matmuls, and then its keys and values."""
    rows, read = len(contexts), sum(contexts) * config.kv_bytes_per_token(itemsize)
    return matmul_seconds(config, itemsize, card, rows) + read / card.bytes


def matmul_seconds(config: ModelConfig, itemsize: int, card: Card, rows: int) -> float:
    """A step's matmuls with so many rows, each sampled: the larger of all weights' bytes and the FLOPs."""
    all_phases = Cost.total(phase_costs(config, itemsize, tokens=rows, sampled=rows, context=0, attended=0).values())
    return Cost(weight_bytes(config, itemsize), all_phases.flops).seconds(card)


def generate_seconds(
    config: ModelConfig, itemsize: int, card: Card, prompts: list[int], outputs: list[int], cached: list[int]
) -> float:
    """The limit of a whole workload: prompts at once, then every sequence decoding from the start.

    A decode step takes its matmuls, and then its keys and values. cached: tokens of each prompt that are an earlier
    prompt's too. A step need not read them again: the sequences that share them may be computed together.
    """
    # Output token i (from 1) of a prompt of p tokens is computed from p + i - 1; the first comes from prefill.
    own = [prompt - known for prompt, known in zip(prompts, cached, strict=True)]
    context = sum(prompt * (n - 1) + n * (n - 1) // 2 for prompt, n in zip(own, outputs, strict=True))
    read = context * config.kv_bytes_per_token(itemsize) / card.bytes
    ends = Counter(outputs)
    running, matmuls = len(outputs), 0.0
    for step in range(1, max(outputs)):
        running -= ends[step]
        matmuls += matmul_seconds(config, itemsize, card, running)
    return prefill_seconds(config, itemsize, card, prompts, cached) + matmuls + read
