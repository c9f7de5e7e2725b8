"""Which tokens end a text, and tokenizers that are missing or broken."""

import json

import pytest
from small_model import write_checkpoint

from nanovllm_jax import LLM
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer, stop_token_ids


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path)


def write_eos(directory, file, value):
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))


@pytest.mark.parametrize(("listed", "ids"), [([507, 511], {507, 511}), (507, {507}), (None, set()), ([], set())])
def test_every_listed_token_ends_a_text(directory, listed, ids):
    write_eos(directory, "config.json", 3)  # generation_config.json goes before it
    write_eos(directory, "generation_config.json", listed)
    assert stop_token_ids(directory) == ids


def test_without_a_generation_config(directory):
    (directory / "generation_config.json").unlink()
    assert stop_token_ids(directory) == set()
    write_eos(directory, "config.json", [5, 6])
    assert stop_token_ids(directory) == {5, 6}


@pytest.mark.parametrize("value", ["<|im_end|>", [1, "2"], [None], 1.0, True, {}, -1, [5, -600]])
def test_bad_eos_tokens(directory, value):
    write_eos(directory, "generation_config.json", value)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be an integer or a list of them"):
        stop_token_ids(directory)


def test_bad_generation_config(directory):
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        stop_token_ids(directory)


def test_what_can_be_told_is_told_before_anything_is_loaded(directory, monkeypatch):
    (directory / "tokenizer.json").unlink()
    monkeypatch.setattr("nanovllm_jax.engine.llm_engine.ModelRunner", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        LLM(directory)


def test_weights_alone(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert load_tokenizer(directory) is None


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "model": {"type": "NoSuch"}}'])
def test_broken_tokenizer(directory, content):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="the tokenizer's files cannot be read") as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)
