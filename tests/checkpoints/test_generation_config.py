"""The sampling that generation_config.json recommends."""

import json

import pytest

from nanovllm_jax import SamplingParams
from nanovllm_jax.checkpoints.generation_config import default_sampling_params
from nanovllm_jax.checkpoints.load import TINY_MODEL


def write(directory, settings):
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


def test_the_embedded_models():
    assert default_sampling_params(TINY_MODEL) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)


def test_without_the_file(tmp_path):
    assert default_sampling_params(tmp_path) == SamplingParams()


@pytest.mark.parametrize(
    ("settings", "params"),
    [
        ({}, {}),
        (  # Qwen3's
            {"do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            dict(temperature=0.6, top_k=20, top_p=0.95),
        ),
        (
            {"min_p": 0.1, "repetition_penalty": 1.05, "max_new_tokens": 2048},
            dict(min_p=0.1, repetition_penalty=1.05, max_tokens=2048),
        ),
        ({"temperature": None, "top_k": None, "num_beams": 4, "max_length": 20, "seed": 5, "stop": "x"}, {}),
    ],
)
def test_what_is_taken(tmp_path, settings, params):
    assert default_sampling_params(write(tmp_path, settings)) == SamplingParams(**params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1 is no good: temperature must be 0"),
        ({"temperature": "hot"}, "temperature='hot' is no good: temperature must be a number"),
        ({"top_k": 2.5}, "top_k=2.5 is no good: top_k must be an integer"),
        ({"top_p": 0}, "top_p=0 is no good: top_p must be above 0"),
        ({"top_p": float("nan")}, "top_p=nan is no good"),
        ({"min_p": [0.1]}, r"min_p=\[0.1\] is no good: min_p must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is no good: repetition_penalty must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is no good: max_tokens must be at least 1"),
    ],
)
def test_bad_values(tmp_path, settings, message):
    with pytest.raises(ValueError, match=r"generation_config\.json: " + message):
        default_sampling_params(write(tmp_path, settings))
