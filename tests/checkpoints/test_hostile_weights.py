"""Weights that were written to do harm: refused by name, and no file outside the directory is opened."""

import json
import struct
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hostile import attempt, fuzz, numbers, open_checkpoint, rewritten, shapes_of, spoiled, values
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_model import SMALL, write_checkpoint

from nanovllm_jax.checkpoints import huggingface
from nanovllm_jax.checkpoints.huggingface import CheckpointFiles

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHAPES = shapes_of(SMALL)

# --- safetensors ---


def safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read_all(directory):
    """Every tensor that the model needs."""
    files = CheckpointFiles(directory)
    files.check(SMALL)
    for name, shape in SHAPES.items():
        assert files.read(name, (slice(None),) * len(shape)).shape == shape


def assert_read_or_refused(directory, content):
    with rewritten(directory / MODEL, content):
        _, refusal = attempt(read_all, directory)
    assert refusal is None or str(directory) in refusal


@pytest.fixture(scope="module")
def weights(directory):
    """Header and data of the good checkpoint."""
    content = (directory / MODEL).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


@fuzz
@given(data=st.data())
def test_weights_with_a_false_header(directory, weights, data):
    header, content = json.loads(weights[0]), weights[1]
    for name in data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=2, unique=True)):
        entry = header[name]
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "begin", "end", "axis", "all"]))
        if field == "all":
            header[name] = data.draw(values)
        elif field == "dtype":
            kinds = ["F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "U64"]
            entry[field] = data.draw(st.sampled_from(kinds) | values)
        elif field in ("begin", "end"):
            entry["data_offsets"][field == "end"] = data.draw(numbers | st.integers(0, len(content)))
        elif field == "axis":
            entry["shape"] = data.draw(st.lists(numbers, min_size=1, max_size=70))
        else:
            entry[field] = data.draw(values)
    assert_read_or_refused(directory, safetensors(header, content))


@fuzz
@given(data=st.data())
def test_weights_with_a_spoiled_header(directory, weights, data):
    length = data.draw(st.none() | st.sampled_from([0, 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1]) | st.integers(0, 9999))
    assert_read_or_refused(directory, safetensors(data.draw(spoiled(weights[0])), weights[1], length))


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FALSE_FILES = {
    "tensors that overlap": safetensors({"a": TENSOR, "b": TENSOR}, bytes(8)),
    "a tensor beyond the file": safetensors({"a": TENSOR | {"shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)),
    "a shape whose size overflows": safetensors({"a": TENSOR | {"shape": [2**62, 4]}}, bytes(8)),
    "a huge shape of no size": safetensors({"a": TENSOR | {"shape": [2**62, 0], "data_offsets": [0, 0]}}),
    "offsets below zero": safetensors({"a": TENSOR | {"data_offsets": [-8, 0]}}, bytes(8)),
    "offsets the wrong way round": safetensors({"a": TENSOR | {"data_offsets": [8, 0]}}, bytes(8)),
    "a gap before the first tensor": safetensors({"a": TENSOR | {"data_offsets": [8, 16]}}, bytes(16)),
    "a fraction in a shape": safetensors({"a": TENSOR | {"shape": [2.0]}}, bytes(8)),
    "a key twice": safetensors(json.dumps({"a": TENSOR, "b": TENSOR}).replace('"b"', '"a"').encode(), bytes(8)),
    "a name that is not UTF-8": safetensors(b'{"\xff": {}}'),
    "a name of half a surrogate pair": safetensors(b'{"\\ud800": {}}'),
    "a header that is nested deeply": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a header longer than the file": safetensors(b"{}", length=10**8),
    "a header longer than memory": safetensors(b"{}", length=2**63),
    "metadata that is no text": safetensors({"__metadata__": {"a": 1}}),
    "no tensors": safetensors({}),
}


@pytest.mark.parametrize("case", FALSE_FILES)
def test_weights_written_to_do_harm(directory, case):
    with rewritten(directory / MODEL, FALSE_FILES[case]), pytest.raises(ValueError, match=str(directory)):
        read_all(directory)


# --- the index of a sharded checkpoint ---

parts = st.sampled_from(["..", ".", "/", "\\", "~", "\0", "\ud800", "\n", "%2e", "outside", "a", "model", "é"])
names = st.one_of(
    st.lists(parts, max_size=5).map("".join).map("{}.safetensors".format),
    st.lists(parts, max_size=5).map("".join),
    st.just("a" * 5000 + ".safetensors"),
    st.just("part.safetensors"),
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint with an index, next to a file of good weights that is none of its business."""
    root = tmp_path_factory.mktemp("sharded")
    directory = write_checkpoint(root / "model")
    (directory / MODEL).rename(directory / "part.safetensors")
    save_file(load_file(directory / "part.safetensors"), root / "outside.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "part.safetensors")}))
    read_all(directory)
    return directory


@fuzz
@given(files=st.lists(names, min_size=1, max_size=3))
@example(["../outside.safetensors"])
@example(["model/../../outside.safetensors"])
@example(["a\0.safetensors"])
@example(["\ud800.safetensors"])
def test_an_index_that_points_elsewhere(sharded, files):
    opened = []

    def recorded(path, **options):
        opened.append(Path(path))
        return safe_open(path, **options)

    weight_map = {name: files[i % len(files)] for i, name in enumerate(SHAPES)}
    with patch.object(huggingface, "safe_open", recorded), rewritten(sharded / INDEX, {"weight_map": weight_map}):
        _, refusal = attempt(read_all, sharded)
    assert {path.parent for path in opened} <= {sharded}
    assert (refusal is None) == (set(files) == {"part.safetensors"})
    assert refusal is None or str(sharded) in refusal


@fuzz
@given(data=st.data())
def test_a_spoiled_index(sharded, data):
    path = sharded / INDEX
    with rewritten(path, data.draw(spoiled(path.read_bytes()) | values)):
        _, refusal = attempt(read_all, sharded)
    assert refusal is None or str(sharded) in refusal


def test_a_tensor_in_two_files(sharded):
    """Which of the two would be used is nothing that a reader of the index can tell."""
    name = "model.norm.weight"
    save_file({name: np.ones(SHAPES[name], np.float32)}, sharded / "more.safetensors")
    weight_map = dict.fromkeys(SHAPES, "part.safetensors") | {name: "more.safetensors"}
    with (
        rewritten(sharded / INDEX, {"weight_map": weight_map}),
        pytest.raises(ValueError, match=r"part\.safetensors: model\.norm\.weight is in another file .* too"),
    ):
        read_all(sharded)


def test_links_are_followed(directory, tmp_path):
    """The Hub's own cache is made of them."""
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    open_checkpoint(tmp_path)
