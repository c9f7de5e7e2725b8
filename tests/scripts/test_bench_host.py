"""bench_host.py measures every phase of a step."""

import bench_host
from small_model import write_checkpoint


def test_every_phase_is_measured(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model")
    command = f"--model {model} --sequences 1 3 --context 20 --block-size 16 --steps 20 --repeats 1"
    bench_host.main(command.split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[n, phase] for n in ("1", "3") for phase in (*bench_host.PHASES, "total")]
    for first in (0, 5):
        micros = [float(row[2]) for row in rows[first : first + 5]]
        assert min(micros) > 0
        assert abs(sum(micros[:4]) - micros[4]) < 0.3
