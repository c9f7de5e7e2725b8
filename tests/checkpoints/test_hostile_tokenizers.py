"""Tokenizer files that were written to do harm: no code runs, no file outside the directory is read, no text grows."""

import json

import pytest
from hostile import attempt, changed, fuzz, rewritten, values
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax.checkpoints.tokenizer import load_tokenizer

CONFIG, TOKENIZER, SETTINGS, MAP = "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast", "Evil", "evil.Evil"])
@pytest.mark.parametrize("model_type", ["qwen3", "evil"])
def test_no_code_of_the_checkpoint_runs(directory, tmp_path, model_type, kind):
    """Wherever a config can name code that lies beside it."""
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    code = {"AutoTokenizer": ["evil.Evil"] * 2, "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    with (
        changed(directory / CONFIG, auto_map=code, model_type=model_type, tokenizer_class=kind),
        changed(directory / SETTINGS, auto_map=code, tokenizer_class=kind, trust_remote_code=True),
    ):
        _, refusal = attempt(load_tokenizer, directory)
    assert refusal is None or f"{SETTINGS}: tokenizer_class=" in refusal
    assert not (tmp_path / "ran").exists()


OUTSIDE = "/etc/hostname"
BAD_SETTINGS = {
    "another class": ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class='T5Tokenizer' is not supported"),
    "a class of another kind": ({"tokenizer_class": 5}, "tokenizer_class=5 is not supported"),
    "a path": ({"tokenizer_file": OUTSIDE}, f"tokenizer_file='{OUTSIDE}' is not supported"),
    "a path to the vocabulary": ({"vocab_file": OUTSIDE}, f"vocab_file='{OUTSIDE}' is not supported"),
    "a path up": ({"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}, "fast_tokenizer_files=.* is not supported"),
    "arguments": ({"init_inputs": [OUTSIDE]}, "init_inputs=.* is not supported"),
    "an object": ({"tokenizer_object": "a"}, "tokenizer_object='a' is not supported"),
    "no length": ({"model_max_length": "a"}, "the tokenizer's files cannot be read"),
    "no end": ({"eos_token": 5}, "the tokenizer's files cannot be read: .*eos_token"),
}


@pytest.mark.parametrize("file", [SETTINGS, MAP])
@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(directory, file, case):
    """transformers takes the settings of either file."""
    bad, message = BAD_SETTINGS[case]
    known = json.loads((directory / SETTINGS).read_text()) if file == SETTINGS else {}
    with rewritten(directory / file, known | bad), pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)


def test_a_vocabulary_alone(directory, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; save the tokenizer anew"):
        load_tokenizer(tmp_path)


def template(token):
    return {"type": "TemplateProcessing", "single": [token], "pair": [token], "special_tokens": {}}


BAD_PARTS = {
    "text that grows": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}},
        "tokenizer.json: normalizer: the type 'Replace' is not supported",
    ),
    "hidden in a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": ""}]}},
        "tokenizer.json: normalizer: the type 'Prepend' is not supported",
    ),
    "bytes that panic when read": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "the tokenizer's files cannot be read: Precompiled",
    ),
    "bytes that panic when used": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"}},
        "tokenizer.json: normalizer: the type 'Precompiled' is not supported",
    ),
    "another model": ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}, "model.type='WordLevel'"),
    "a token that there is not": (
        {"post_processor": template({"SpecialToken": {"id": "<none>", "type_id": 0}})},
        "the tokenizer's files cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(directory, case):
    parts, message = BAD_PARTS[case]
    with changed(directory / TOKENIZER, **parts), pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)


KINDS = {
    "normalizer": ["NFC", "Replace", "Prepend", "Precompiled", "Strip", "Lowercase", "Sequence", "ByteLevel"],
    "pre_tokenizer": ["ByteLevel", "Split", "Sequence", "Metaspace", "Digits", "Punctuation"],
    "post_processor": ["ByteLevel", "TemplateProcessing", "Sequence", "BertProcessing"],
    "decoder": ["ByteLevel", "Strip", "Sequence", "Replace", "Fuse", "CTC"],
    "model": ["BPE", "Unigram", "WordPiece", "WordLevel"],
}
FIELDS = [
    *("pattern", "content", "behavior", "invert", "prepend", "normalizers", "pretokenizers", "processors", "decoders"),
    *("start", "stop", "single", "pair", "special_tokens", "vocab", "merges", "unk_id", "dropout", "trim_offsets"),
]


@settings(fuzz, max_examples=100)
@given(data=st.data())
def test_any_parts(directory, data):
    """What is accepted encodes; what is not is refused, whatever the library does with it."""
    path = directory / TOKENIZER
    content = json.loads(path.read_text())
    part = data.draw(st.sampled_from([*KINDS, "added_tokens", "truncation", "padding", "version"]))
    if part in KINDS:
        kind = {"type": data.draw(st.sampled_from(KINDS[part]))}
        kept = (content[part] or {}) if data.draw(st.booleans()) else {}
        new = kept | kind | data.draw(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3))
    else:
        new = data.draw(values)
    with rewritten(path, content | {part: new}):
        tokenizer, refusal = attempt(load_tokenizer, directory)
    if refusal:
        assert str(directory) in refusal
    else:
        assert all(type(token) is int for token in tokenizer.encode("Some text, 12."))
