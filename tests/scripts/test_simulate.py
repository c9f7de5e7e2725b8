"""simulate.py: requests wait as long as they did on an H200, and what a step costs is what its device counts."""

import re

import pytest
import simulate


def figures(capsys, command):
    """TTFT, TPOT and ITL in milliseconds, each p50, p90 and p99, and the share of padding, of the only rate."""
    simulate.main(command.split())
    numbers = [float(number) for number in re.findall(r"[\d.]+", capsys.readouterr().out.splitlines()[-1])]
    return numbers[1:4], numbers[4:7], numbers[7:10], numbers[-1]


# docs/performance.md, entry 121: 8B
@pytest.mark.parametrize(
    ("options", "ttft", "tpot"),
    [
        ("--rates 4", [20.4, 26.7, 84], [4.8, 5.5, 5.9]),
        ("--rates 24", [34.7, 116, 168], [9.5, 12.4, 14.6]),
        ("--rates 4 --at-once", [22.7, 28.5, 85], [4.8, 5.4, 5.9]),
        ("--rates 24 --at-once", [42.5, 122, 168], [9.4, 12.3, 14.2]),
    ],
)
def test_requests_wait_as_long_as_was_measured(capsys, options, ttft, tpot):
    found = figures(capsys, options)
    assert found[0] == pytest.approx(ttft, rel=0.15)
    assert found[1] == pytest.approx(tpot, rel=0.15)


def test_what_a_request_alone_takes(capsys):
    """Microseconds for each token and each step, and the host's; the first token waits for one step, others for one."""
    ttft, tpot, _, padding = figures(capsys, "--rates 0.001 --seconds 1 --exact --at-once --costs 0 100 7000 0 0 0")
    prompts = [100, 1000, 3500]  # the shortest, the longest but one, the longest possible
    assert 0.1 * prompts[0] < ttft[0] < 0.1 * prompts[1] < ttft[2] < 0.1 * prompts[2] + 0.5
    assert tpot == pytest.approx([7.1] * 3, abs=0.1)
    assert padding == 0


def test_a_step_that_stops_short_or_is_chosen_late_is_sooner(capsys):
    whole, short, late = (
        figures(capsys, f"--rates 24 --seconds 3 {options}") for options in ("--at-once --whole-steps", "--at-once", "")
    )
    assert short[3] < whole[3]
    assert all(few < many for few, many in zip(short[0] + short[1], whole[0] + whole[1]))
    assert late[0][0] < 0.9 * short[0][0]
    assert late[1] == pytest.approx(short[1], rel=0.03)
