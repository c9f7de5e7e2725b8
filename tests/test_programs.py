"""Compiled programs kept on disk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from nanovllm_jax.models.programs import ProgramStore


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def store(directory, settings="settings"):
    return ProgramStore(directory, jax.devices()[:1], settings)


@pytest.fixture(scope="module")
def program(no_compilation_cache):
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    lowered = jax.jit(lambda xs, pair: (Pair(xs[0] + pair.second, pair.first), xs)).lower([x, x], Pair(x, x))
    return lowered.compile()


def test_what_is_saved_is_loaded(tmp_path, program):
    store(tmp_path / "new").save("name", program)
    loaded = store(tmp_path / "new").load("name")
    x = jnp.ones((4, 4))
    pair, xs = loaded([x, x], Pair(x, 2 * x))
    assert isinstance(pair, Pair)
    assert (pair.first == 3).all()
    assert len(xs) == 2


def test_another_name_or_setting_is_another_program(tmp_path, program):
    store(tmp_path).save("name", program)
    assert store(tmp_path).load("other") is None
    assert store(tmp_path, "other settings").load("name") is None


@pytest.mark.parametrize("length", [0, 100])
def test_a_damaged_file_is_replaced(tmp_path, program, caplog, length):
    store(tmp_path).save("name", program)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:length])
    assert store(tmp_path).load("name") is None
    assert str(path) in caplog.text
    store(tmp_path).save("name", program)
    assert store(tmp_path).load("name") is not None


def test_a_directory_that_cannot_be_written(tmp_path, program, caplog):
    (tmp_path / "file").write_text("")
    store(tmp_path / "file").save("name", program)
    assert "cannot be kept" in caplog.text


def test_no_directory_keeps_nothing(program):
    store(None).save("name", program)
    assert store(None).load("name") is None


def test_a_directory_that_may_not_be_entered(tmp_path, program, caplog, monkeypatch):
    """Then one is compiled anew, and the log says why."""
    store(tmp_path).save("name", program)

    def exists(path):
        raise PermissionError(f"Permission denied: {path}")

    monkeypatch.setattr("pathlib.Path.exists", exists)
    assert store(tmp_path).load("name") is None
    assert "cannot be used (PermissionError: Permission denied" in caplog.text


def test_only_settings_of_jax_that_make_other_programs_are_in_a_name(tmp_path, program):
    store(tmp_path).save("name", program)
    with jax.log_compiles():
        assert store(tmp_path).load("name") is not None
    with jax.default_matmul_precision("bfloat16"):
        assert store(tmp_path).load("name") is None
