"""check_devices.py: every check is run and told of, whatever becomes of the one before."""

import check_devices
import device_checks
import pytest

# What stands in for device_checks.py: the checks' names say what they do.
CHILD = """
import os, sys, time
for name in sys.argv[3:]:
    if name == "crashes":
        os._exit(3)
    if name == "hangs":
        time.sleep(1000)
    print("a word from a library", flush=True)
    print(f"{name:10} {'FAILED' if name == 'fails' else 'ok'} 0.0 s  a note", flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(device_checks, "__file__", str(tmp_path / "child.py"))
    return lambda *names: check_devices.run(list(names), str(tmp_path), 2)


def test_all_is_well(run, capfd):
    assert run("one", "two") == []
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()[1::2]] == [["one", "ok"], ["two", "ok"]]


def test_the_others_run_when_one_fails_or_crashes(run, capfd):
    assert run("one", "fails", "crashes", "two", "crashes") == ["fails", "crashes", "crashes"]
    out = capfd.readouterr().out
    assert [out.count(f"{name} ") for name in ("one", "fails", "crashes", "two")] == [1, 1, 2, 1]
    assert out.count("its process ended with 3") == 2


def test_one_that_hangs_is_ended(run, monkeypatch, capfd):
    end = check_devices.end

    def ends(child):
        monkeypatch.setattr(check_devices, "PATIENCE", 240)  # the next one may take its time to start
        end(child)

    monkeypatch.setattr(check_devices, "PATIENCE", 2)
    monkeypatch.setattr(check_devices, "end", ends)
    assert run("hangs", "two") == ["hangs"]
    assert "its process ended with -9" in capfd.readouterr().out


def test_a_number_of_devices_that_cannot_be(monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_devices.py", "--devices", "3"])
    with pytest.raises(SystemExit):
        check_devices.main()


@pytest.mark.slow
def test_two_devices_of_a_cpu(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["check_devices.py", "--devices", "2"])
    assert check_devices.main() == 0, capfd.readouterr()
