"""How a model would run on several GPUs, by arithmetic: bytes, FLOPs and time of a step, for planning a deployment.

python scripts/plan.py                           # the published sizes over 1 to 8 GPUs: the table of docs/scaling.md
python scripts/plan.py --model DIRECTORY --devices 4 --sequences 256 --context 4000

A prediction: rates and costs are measured ones of docs/performance.md, on one H200 and on two.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark import limits
from nanovllm_jax.kernels.exchange import capacity
from options import count

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.parallel.sizes import split_config

MEMORY = 0.9 * 141e9  # gpu_memory_utilization of an H200
ITEMSIZE = 2  # of bfloat16
# Measured on two H200s: of the 450 GB/s of NVLink 4 in each direction a large all-reduce reaches 235.
LINK_BYTES = 235e9
LINK_SECONDS = 25e-6  # of a collective that carries next to nothing
# A sum that a kernel of ours exchanges takes so much longer than the norm that it is a part of, beside its bytes.
EXCHANGE_SECONDS, EXCHANGE_BYTES = 2e-6, 350e9
# Measured on one H200 with 0.6B, beyond the limit of bytes and FLOPs: what a layer's kernels take to start and end, for
# one row and for 64 or more. And how much of the card's FLOPs a prefill of 16,384 tokens reaches.
LAYER_SECONDS, LAYER_SECONDS_FULL, FULL_ROWS = 20e-6, 45e-6, 64
PREFILL_SHARE = 0.52
# hidden, mlp, layers, query heads, tied
SIZES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}


def published(size: str) -> ModelConfig:
    """The config of a published Qwen3, without its files."""
    hidden, mlp, layers, heads, tied = SIZES[size]
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def over(config: ModelConfig, devices: int) -> ModelConfig:
    """What so many devices have of a model together: copied kv heads are heads of their own.

    Raises ValueError for a number that cannot share it.
    """
    split = split_config(config, devices)
    return replace(split, num_key_value_heads=split.kv_heads, kv_copies=1)


@dataclass(frozen=True)
class Step:
    """One step of one model over some devices, on each of them."""

    bytes: float
    """Weights, keys and values that are read."""
    flops: float
    link_bytes: float
    """What a device sends in all collectives together."""
    collectives: int
    exchanged_bytes: float
    """What it sends in kernels, with flags."""
    exchanges: int
    overhead: float
    """Seconds beyond the limit that the kernels take on one device."""

    @property
    def compute_seconds(self) -> float:
        """Without what devices exchange."""
        return limits.Cost(self.bytes, self.flops).seconds(limits.H200) + self.overhead

    @property
    def link_seconds(self) -> float:
        """Of what devices exchange: it does not overlap with the rest."""
        collectives = self.collectives * LINK_SECONDS + self.link_bytes / LINK_BYTES
        return collectives + self.exchanges * EXCHANGE_SECONDS + self.exchanged_bytes / EXCHANGE_BYTES

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute_seconds + self.link_seconds


def decode_step(config: ModelConfig, devices: int, sequences: int, context: int) -> Step:
    """One token of each sequence, with so many tokens in the cache. Raises ValueError for impossible sizes."""
    config = over(config, devices)
    phases = limits.decode_phases(config, ITEMSIZE, [context] * sequences)
    read = limits.weight_bytes(config, ITEMSIZE) + phases["attend"].bytes
    flops = limits.Cost.total(phases.values()).flops
    full = min(sequences, FULL_ROWS) / FULL_ROWS
    overhead = config.num_hidden_layers * (LAYER_SECONDS + full * (LAYER_SECONDS_FULL - LAYER_SECONDS))
    return Step(read / devices, flops / devices, *exchange(config, devices, sequences, sequences), overhead)


def prefill_step(config: ModelConfig, devices: int, tokens: int, prompt: int) -> Step:
    """So many tokens of new prompts, each `prompt` long."""
    config, count = over(config, devices), max(1, tokens // prompt)
    phases = limits.prefill_phases(config, ITEMSIZE, [prompt] * count, [0] * count).values()
    read, flops = (number / devices for number in limits.Cost.total(phases))
    overhead = flops / limits.H200.flops * (1 / PREFILL_SHARE - 1)
    return Step(read, flops, *exchange(config, devices, prompt * count, count), overhead)


def exchange(config: ModelConfig, devices: int, tokens: int, rows: int) -> tuple[float, int, float, int]:
    """What a device sends in a step, by collectives and in kernels, and in how many, as the tests count them.

    A sum for the embedding and two a layer, of a token's hidden state: of few tokens each device sends all others its
    part, with as many bytes of flags, of many it is a ring. The logits of each row, twice, to the device that draws it;
    and one gather of what is drawn, 172 bytes a row.
    """
    if devices == 1:
        return 0.0, 0, 0.0, 0
    sums, share = 2 * config.num_hidden_layers + 1, (devices - 1) / devices
    drawn = 2 * share * rows * config.vocab_size * 4 / devices + share * rows * 172
    part = tokens * config.hidden_size * ITEMSIZE
    if not config.attention_bias and tokens <= capacity(devices, config.hidden_size, ITEMSIZE):
        return drawn, 2, sums * 2 * (devices - 1) * part, sums
    return drawn + sums * 2 * share * part, sums + 2, 0.0, 0


def most_sequences(config: ModelConfig, devices: int, context: int) -> int:
    """Sequences of this length whose keys and values fit beside the weights."""
    config = over(config, devices)
    free = MEMORY - config.num_parameters * ITEMSIZE / devices
    return max(0, int(free / (context * config.kv_bytes_per_token(ITEMSIZE) / devices)))


def line(name: str, config: ModelConfig, devices: int, sequences: int, context: int) -> str:
    step, prefill = decode_step(config, devices, sequences, context), prefill_step(config, devices, 16_384, 1_024)
    cells = [
        *(name, str(devices)),
        f"{step.bytes / 1e9:.2f}",
        f"{step.flops / 1e12:.3f}",
        f"{(step.link_bytes + step.exchanged_bytes) / 1e6:.1f}",
        f"{step.compute_seconds * 1e3:.2f}",
        f"{step.link_seconds * 1e3:.2f}",
        f"{step.seconds * 1e3:.2f}",
        f"{decode_step(config, devices, 1, context).seconds * 1e3:.2f}",
        f"{prefill.seconds * 1e3:.0f}",
        f"{most_sequences(config, devices, context):,}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a directory with a config.json, or one of {', '.join(SIZES)}; default: all")
    parser.add_argument("--devices", type=count, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sequences", type=count, default=64, help="that decode at a time")
    parser.add_argument("--context", type=count, default=1000, help="tokens of each in the cache")
    args = parser.parse_args()
    models = {name: published(name) for name in SIZES}
    if args.model:
        known = args.model in SIZES
        try:
            models = {args.model: models[args.model] if known else ModelConfig.from_pretrained(Path(args.model))}
        except ValueError as error:
            parser.error(str(error))
    if (most := min(config.max_context for config in models.values())) < args.context:
        parser.error(f"--context {args.context} is more than the {most} tokens of the model")
    columns = "model", "GPUs", "GB read", "TFLOP", "MB sent", "compute ms", "link ms", "step ms"
    print(f"| {' | '.join((*columns, '1 sequence ms', 'prefill ms', 'fit'))} |")
    print("|---" * 11 + "|")
    for name, config in models.items():
        for devices in args.devices:
            try:
                print(line(name, config, devices, args.sequences, args.context))
            except ValueError as error:
                parser.error(str(error))


if __name__ == "__main__":
    main()
