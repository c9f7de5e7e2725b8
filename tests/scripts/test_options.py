"""What a user of the scripts gets wrong is said in one line, and costs nothing that was measured."""

import sys
from pathlib import Path

import bench
import bench_host
import chat
import device_checks
import measure_gap
import options
import profile_step
import pytest
import rl_tiny
import soak
import train_tiny
from options import new_directory, refusals, writing

RECORDED = Path(__file__).parent / "recorded_run.json"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (bench_host, "--only dispatch --block-size 7", "error: block_size must be 16, 32, 64, 128 or 256, not 7"),
        (measure_gap, '--options {"block_size":3}', "error: block_size must be 16, 32, 64, 128 or 256, not 3"),
        (measure_gap, '--options {"load_format":"x"}', "error: load_format must be "),
        (measure_gap, '--options {"foo":1}', "error: LLM() has no option 'foo'"),
        (soak, "--dtype float8", "error: dtype must be auto, float32"),
        (soak, "--gpu-memory-utilization 7", "error: gpu_memory_utilization must be above 0 and at most 1, not 7"),
        (soak, "--requests -3", "'-3' is no integer from 1 on"),
        (soak, "--max-model-len 2", "--max-model-len 2 leaves no room for requests: give 64 or more"),
        (train_tiny, "--out x --seed 99999999999999999999", "'99999999999999999999' is no integer of 64 bits"),
        (rl_tiny, "--seed 1e3", "'1e3' is no integer of 64 bits"),
        (soak, "--seconds nan", "'nan' is no number above 0"),
        (device_checks, "", "the following arguments are required: folder, devices, names"),
        (device_checks, "/tmp two alone", "'two' is no integer from 1 on"),
        (device_checks, "/tmp 2 nothing", "invalid choice: 'nothing'"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, script, arguments, message):
    """By argparse, which says so and ends with 2, or by the engine: then Python shows what the script ends with."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments.split()])
    with pytest.raises(SystemExit) as refusal:
        script.main()
    status = refusal.value.code
    assert message in (capsys.readouterr().err if status == 2 else status)


def test_nobody_to_chat_with(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat.py"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="2"):
        chat.main()
    assert "standard input is closed" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(capsys):
    with writing(Path("/dev/full")):
        Path("/dev/full").write_text("what was measured")
    assert "/dev/full cannot be written: [Errno 28] No space left on device" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written(capsys):
    """The table is there, and the exit status is that of the run."""
    assert bench.main(["--report", str(RECORDED)]) == bench.main(["--report", str(RECORDED), "--plot", "/proc/x.png"])
    assert "/proc/x.png cannot be written" in capsys.readouterr().out


def test_a_picture_that_nothing_can_draw(monkeypatch, capsys):
    """Said before anything is trained or measured."""
    monkeypatch.setattr(options, "find_spec", lambda _: None)
    assert rl_tiny.parse_options(["--steps", "3"]).plot is None
    for parse, arguments in (
        (rl_tiny.parse_options, "--steps 3 --plot x.png"),
        (bench.parse_args, f"--report {RECORDED} --plot x.png"),
        (profile_step.parse_args, "--picture x.png"),
    ):
        with pytest.raises(SystemExit):
            parse(arguments.split())
        assert "a picture needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_only_what_a_user_gets_wrong_is_said_in_one_line():
    with pytest.raises(KeyError), refusals():
        raise KeyError


def test_an_empty_name_is_no_directory():
    assert new_directory(".") == Path()
    with pytest.raises(Exception, match="the name is empty"):
        new_directory("")
