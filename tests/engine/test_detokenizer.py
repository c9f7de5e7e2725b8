"""Text as it comes: whole characters, the same text as decoded at once, cut where a plain definition cuts it."""

import json
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nanovllm_jax import SamplingParams
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer
from nanovllm_jax.engine.detokenizer import REPLACEMENT, Detokenizer

TOKENIZER = load_tokenizer(TINY_MODEL)
EMOJI = "héllo 😀👍🏽👨‍👩‍👧 e\u0301 日本語 ¡é🇩🇪 <think>"

texts = st.one_of(st.text(max_size=30), st.text(alphabet=EMOJI, max_size=30))
encoded = texts.map(TOKENIZER.encode)
# Also what no tokenizer would write: special tokens, broken characters, ids that the tokenizer does not have.
anything = st.lists(st.one_of(st.integers(0, 255), st.integers(0, 520)), max_size=40)
tokens_of_all_kinds = st.one_of(
    encoded, anything, st.tuples(encoded, anything, encoded).map(lambda parts: [*parts[0], *parts[1], *parts[2]])
)
switches = st.booleans()


def increments(tokens, params, tokenizer=TOKENIZER):
    """What `take` gives after each token, and how many tokens were read until the text ended."""
    detokenizer, taken = Detokenizer(tokenizer, params), []
    for token in tokens:
        detokenizer.append([token])
        taken.append(detokenizer.take(finished=detokenizer.stop is not None))
        if detokenizer.stop is not None:
            break
    detokenizer.finish()
    read = len(taken)
    return [*taken, detokenizer.take(finished=True)], read, detokenizer


def decode(tokens, skip=True):
    return TOKENIZER.decode(tokens, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(tokens_of_all_kinds, switches)
@example(TOKENIZER.encode(EMOJI)[:-1], True)
@example([508] * 20 + TOKENIZER.encode("é"), True)
def test_increments_join_to_the_whole_text(tokens, skip):
    params = SamplingParams(skip_special_tokens=skip)
    pieces, _, detokenizer = increments(tokens, params)
    assert "".join(pieces) == detokenizer.text == decode(tokens, skip)
    at_once = Detokenizer(TOKENIZER, params)
    at_once.append(tokens)
    at_once.finish()
    assert at_once.text == at_once.take(finished=True) == decode(tokens, skip)


@settings(max_examples=200, deadline=None)
@given(texts)
@example(EMOJI)
def test_no_character_is_split(text):
    """Every byte a token of its own: no increment has half a character, and no whole one is kept back."""
    tokens = [token for byte in text.encode() for token in byte_tokens(bytes([byte]))]
    detokenizer, read = Detokenizer(TOKENIZER, SamplingParams()), b""
    for token, byte in zip(tokens, text.encode()):
        detokenizer.append([token])
        read += bytes([byte])
        assert detokenizer.text.rstrip(REPLACEMENT) == read.decode(errors="ignore").rstrip(REPLACEMENT)
    detokenizer.finish()
    assert detokenizer.text == text


def byte_tokens(data: bytes) -> list[int]:
    """The tokens that stand for single bytes, by the alphabet of byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return TOKENIZER.convert_tokens_to_ids([letters[byte] for byte in data])


@pytest.mark.parametrize(
    "data",
    [
        b"\x80" * 50,  # no byte of which starts a character
        b"\xf0\x9f\x98" * 9,  # starts that nothing completes
        "😀".encode() * 20 + b"\xf0\x9f",
        b"\xe2\x82" + b"a" * 30,
        b"\xf0" + b"\xf0\x9f\x98\x80" * 12 + b"\xff",
    ],
)
def test_broken_characters(data):
    tokens = byte_tokens(data)
    pieces, _, _ = increments(tokens, SamplingParams())
    assert "".join(pieces) == decode(tokens) == data.decode(errors="replace")


def test_a_token_costs_a_few_tokens_however_long_the_text():
    """Broken characters and special tokens included, which give the window no good place to start."""
    special = TOKENIZER.eos_token_id
    cases = [TOKENIZER.encode(EMOJI * 40), byte_tokens(b"\x80" * 600), byte_tokens("é".encode()) * 300]
    cases += [byte_tokens(text.encode()) for text in ("a" + "é" * 300, "a" + "😀" * 150)]  # no eighth token ends one
    for tokens in (*cases, [special] * 600, [*TOKENIZER.encode("a word"), *[special] * 600, *TOKENIZER.encode("more")]):
        counting = CountingTokenizer()
        assert "".join(increments(tokens, SamplingParams(), counting)[0]) == decode(tokens)
        assert counting.num_decoded < 40 * len(tokens)


class CountingTokenizer:
    num_decoded = 0

    @property
    def backend_tokenizer(self):
        return self

    def decode(self, tokens, **options):
        self.num_decoded += len(tokens)
        return TOKENIZER.backend_tokenizer.decode(tokens, **options)


def metaspace_tokenizer():
    """In Llama's manner: spaces belong to words, the text's first one is dropped, rare characters come as bytes."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁he",
        "llo",
        "▁world",
        "é",
        "日",
        ",",
        "▁a",
        "b",
    ]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend), pieces


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["▁he", "llo", "▁world", "é", "日", ",", "▁", "▁a", "b", "😀", "ß", "€"]), max_size=60))
def test_another_kind_of_tokenizer(words):
    tokenizer, pieces = metaspace_tokenizer()
    tokens = []
    for word in words:
        tokens += [pieces.index(word)] if word in pieces else [1 + byte for byte in word.encode()]
    pieces, _, _ = increments(tokens, SamplingParams(), tokenizer)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_spaces_are_never_cleaned_up(tmp_path):
    """As old tokenizers ask for: a text would get shorter with its next token, after it was given out."""
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    asked = "clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(asked, True)))
    tokenizer, text = load_tokenizer(tmp_path / "model"), "I am here . You , too ! Do n't ?"
    tokens = [token for character in text for token in tokenizer.encode(character)]
    assert len(tokenizer.decode(tokens)) < len(text), "this tokenizer does not clean up"
    assert "".join(increments(tokens, SamplingParams(), tokenizer)[0]) == text


# --- stop strings ---

BYTES = byte_tokens("ab😀".encode())


def plain_stop(tokens, params):
    """The text, the stop string and the number of tokens read.

    Characters come one by one. The first to complete a stop string ends the text; of several that it completes, the
    longest counts. The characters that the first min_tokens tokens settle complete none.
    """
    texts = [decode(tokens[: i + 1]).rstrip(REPLACEMENT) for i in range(len(tokens))]
    exempt = len(texts[params.min_tokens - 1]) if params.min_tokens else 0
    for end in range(exempt + 1, len(texts[-1]) + 1):
        for stop in sorted(params.stop, key=len, reverse=True):
            if texts[-1][:end].endswith(stop):
                text = texts[-1][: end if params.include_stop_str_in_output else end - len(stop)]
                return text, stop, 1 + next(i for i, known in enumerate(texts) if len(known) >= end)
    return decode(tokens), None, len(tokens)


@settings(max_examples=400, deadline=None)
@given(
    tokens=st.one_of(encoded, st.text("ab😀", max_size=25).map(TOKENIZER.encode), st.lists(st.sampled_from(BYTES))),
    stop=st.lists(st.one_of(st.text("ab😀", min_size=1, max_size=4), st.sampled_from(["hé", "😀👍"])), max_size=3),
    include=switches,
    min_tokens=st.integers(0, 5),
)
@example(TOKENIZER.encode("aaab"), ["aab"], False, 0)  # the first start comes to nothing
@example(TOKENIZER.encode("abab"), ["ab"], False, 2)
@example(TOKENIZER.encode("xabcd"), ["abcd", "bc"], False, 0)  # complete first, though it starts later
@example(TOKENIZER.encode("xab"), ["b", "ab"], False, 0)
def test_stop_strings_by_a_plain_definition(tokens, stop, include, min_tokens):
    tokens = tokens or BYTES
    min_tokens = min(min_tokens, len(tokens))
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None)
    pieces, read, detokenizer = increments(tokens, params)
    assert ("".join(pieces), detokenizer.stop, read) == plain_stop(tokens, params)
    assert detokenizer.text == "".join(pieces)


def test_only_what_may_become_a_stop_string_is_held_back():
    pieces, _, detokenizer = increments(byte_tokens(b"a<en<end!<e"), SamplingParams(stop=["<end>", "zz"]))
    assert pieces == ["a", "", "", "", "<en", "", "", "", "<end!", "", "", "<e"]
    assert detokenizer.stop is None
    pieces, _, detokenizer = increments(byte_tokens(b"a<en<end>b"), SamplingParams(stop="<end>"))
    assert pieces == ["a", "", "", "", "<en", "", "", "", "", ""]
    assert detokenizer.stop == "<end>"
    pieces, *_ = increments(byte_tokens(b"a<end>b"), SamplingParams(stop="<end>", include_stop_str_in_output=True))
    assert pieces == ["a", "<", "e", "n", "d", ">", ""]
