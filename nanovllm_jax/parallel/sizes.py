"""Which sizes a model can be split into."""

from dataclasses import replace

from nanovllm_jax.config import ModelConfig


def split_config(config: ModelConfig, shards: int) -> ModelConfig:
    """The config of a model that is split over so many devices: with copies of kv heads, where these are fewer.

    Raises ValueError, with the sizes that can be, where the model cannot be split so.
    """
    if not _fits(config, shards):
        sizes = [size for size in range(1, config.num_attention_heads + 1) if _fits(config, size)]
        raise ValueError(
            f"tensor_parallel_size={shards} must divide num_attention_heads={config.num_attention_heads}, "
            f"intermediate_size={config.intermediate_size} and vocab_size={config.vocab_size}, and divide "
            f"num_key_value_heads={config.num_key_value_heads} or be a multiple of it: use one of {sizes}"
        )
    return replace(config, kv_copies=max(1, shards // config.num_key_value_heads))


def _fits(config: ModelConfig, shards: int) -> bool:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    split = (heads, config.intermediate_size, config.vocab_size)
    return not any(size % shards for size in split) and (kv_heads % shards == 0 or shards % kv_heads == 0)
