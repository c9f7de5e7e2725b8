"""launch.py: what its children say is heard, and none is left behind. tests/test_parallel.py runs engines under it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import launch
import pytest

LAUNCH = str(Path(launch.__file__))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(source, ...): the launcher's exit code, each of whose children runs one of these in place of a script."""
    (tmp_path / "script.py").write_text("")

    def start(args, address, number, log):
        with log.open("wb") as file:
            return subprocess.Popen([sys.executable, "-c", sources[number]], stdout=file, stderr=subprocess.STDOUT)

    def run(*given):
        sources[:] = given
        monkeypatch.setattr("sys.argv", ["launch.py", "--processes", str(len(given)), str(tmp_path / "script.py")])
        return launch.main()

    sources = []
    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return run


def test_all_is_well(run, capfd):
    assert run("", "print('unheard')") == 0
    assert capfd.readouterr().err == ""


def test_each_that_fails_is_heard(run, tmp_path, capfd):
    """Also where process 0 was the first to end: it had only been told of the fault."""
    first = f"from pathlib import Path; import time; over = Path({str(tmp_path / 'over')!r})\n"
    second = "while not over.exists(): time.sleep(0.01)\ntime.sleep(1); raise ValueError('the fault')"
    assert run(first + "over.touch(); raise SystemExit(6)", first + second) == 6
    error = capfd.readouterr().err
    assert error.index("process 0 of 2 ended with 6") < error.index("process 1 of 2 ended with 1")
    assert "ValueError: the fault" in error


def test_one_that_goes_on_is_ended(run, monkeypatch, capfd):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    assert run("import time; time.sleep(1000)", "raise ValueError('the fault')") == 1
    error = capfd.readouterr().err
    assert "ValueError: the fault" in error
    assert "process 0" not in error, "it did not fail"


DEAF = """
import os, signal, sys, time

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
open(f'{sys.argv[1]}/{os.getpid()}.pid', 'w').close()
time.sleep(1000)
"""


def has_children_left(tmp_path):
    """Whether a process has the test's folder on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if str(tmp_path).encode() in path.read_bytes():
                return True
    return False


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", [0.3, 0.4, 0.5, 3])
def test_none_is_left_by_signals_at_any_time(tmp_path, number, wait):
    """While they are started, and again while they are ended."""
    script = tmp_path / "script.py"
    script.write_text(DEAF)
    launcher = subprocess.Popen([sys.executable, LAUNCH, "--processes", "4", str(script), str(tmp_path)])
    time.sleep(wait)
    for _ in range(50):
        launcher.send_signal(number)
        time.sleep(0.002)
    assert launcher.wait(20) != 0
    assert not has_children_left(tmp_path)


def test_the_children_end_with_the_launcher(tmp_path):
    """Though JAX makes them deaf to SIGTERM."""
    script = tmp_path / "script.py"
    script.write_text(DEAF)
    launcher = subprocess.Popen([sys.executable, LAUNCH, str(script), str(tmp_path)])
    while len(pids := [int(file.stem) for file in tmp_path.glob("*.pid")]) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.terminate()
    assert launcher.wait() == 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
