"""The sampling that a model's makers recommend."""

from pathlib import Path

from nanovllm_jax.config import read_json
from nanovllm_jax.sampling_params import SamplingParams

FIELDS = {  # in generation_config.json: in SamplingParams
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(directory: Path) -> SamplingParams:
    """What applies to requests without settings: generation_config.json's, where it has any, as in vLLM.

    Raises ValueError for a value that cannot be.
    """
    path = directory / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    given = {name: settings[name] for name in FIELDS if settings.get(name) is not None}
    for name, value in given.items():
        try:
            SamplingParams(**{FIELDS[name]: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name}={value!r} is no good: {error}") from error
    return SamplingParams(**{FIELDS[name]: value for name, value in given.items()})
