"""profile_step.py: which phase a kernel belongs to, and what its table says."""

import os

import profile_step
import pytest
from benchmark.limits import Card, Cost
from profile_step import Kernel
from small_model import write_checkpoint

from nanovllm_jax.config import ModelConfig

pytestmark = pytest.mark.usefixtures("programs_kept")
HLO = """HloModule jit__step
%fused (p: f32[4]) -> f32[4] {
  ROOT %inner.1 = f32[4]{0} add(%p, %p), metadata={op_name="jit(_step)/mlp/add" source_line=3}
}
ENTRY %main {
  %fusion.3 = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(_step)/attention/attend/dot"}
  %plain.2 = f32[4]{0} copy(%fusion.3)
  ROOT custom-call.7 = f32[4]{0} custom-call(%plain.2), metadata={op_name="jit(_step)/attention/qkv"}
}
"""


def test_phases_come_from_the_program_then_from_the_event():
    scopes = profile_step.op_names(HLO)
    assert profile_step.phase_of({"hlo_op": "fusion.3"}, scopes) == "attend"
    assert profile_step.phase_of({"hlo_op": "custom-call.7"}, scopes) == "attention"
    assert profile_step.phase_of({"hlo_op": "inner.1"}, scopes) == "mlp"
    assert profile_step.phase_of({"hlo_op": "plain.2"}, scopes) == "other"
    assert profile_step.phase_of({"hlo_op": "unknown", "tf_op": "jit(_step)/head/dot_general"}, scopes) == "head"
    assert profile_step.phase_of({}, scopes) == "other"


def test_tables_are_for_one_step():
    kernels = [
        Kernel("gemm_1", "mlp", 0, 30),
        Kernel("gemm_2", "mlp", 40, 10),
        Kernel("attend", "attend", 50, 60),
        Kernel("copy", "other", 120, 100),
    ]
    card = Card(bytes=1e12, flops=1e12)
    costs = {"mlp": Cost(5e6, 10e6), "attend": Cost(15e6, 0)}
    lines = profile_step.phase_table(kernels, 2, costs, card).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["mlp"] == ["20.0", "20.0%", "1.0", "0.0050", "0.0000", "10.0", "50.0%"]
    assert cells["attend"][-2:] == ["15.0", "50.0%"]
    assert cells["other"] == ["50.0", "50.0%", "0.5"]
    assert cells["all"][:3] == ["100.0", "100.0%", "2.0"]
    names = [line.split()[-1] for line in profile_step.kernel_table(kernels, 2, top=2).splitlines()]
    assert names == ["copy", "attend"]


LAYERS = 2  # of write_checkpoint's model


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """XLA's, to which main() adds: afterwards as before, or no later engine of this process would find its programs."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("profile") / "model")


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_profile_of_a_small_model(directory, phase, capsys):
    command = f"--model {directory} --phase {phase} --batch 3 --context 40 --steps 2 --max-num-seqs 4"
    profile_step.main(command.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{phase}, 3 x 40, on ")
    spent = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in lines[2:9]}
    assert all(spent[phase] > 0 for phase in profile_step.PHASES)
    assert spent.pop("all") == pytest.approx(sum(spent.values()), rel=0.01)
    launches = {line.split()[0]: float(line.split()[3].replace(",", "")) for line in lines[2:9]}
    assert all(launches[phase] >= 2 * LAYERS for phase in ("attention", "attend", "mlp")), launches


def test_timeline_shows_the_first_step(tmp_path):
    pytest.importorskip("matplotlib")
    kernels = [Kernel("k", phase, start, 5) for start in (0, 500) for phase in ("mlp", "attend", "other")]
    for steps in (1, 2):
        profile_step.draw_timeline(kernels, steps, tmp_path / f"{steps}.svg")
    one, two = ((tmp_path / f"{steps}.svg").read_text() for steps in (1, 2))
    assert one.count("<path") - two.count("<path") == 3, "the second step's kernels are not drawn"


def test_a_prefill_needs_no_room_for_more_than_its_tokens(directory):
    most = ModelConfig.from_pretrained(directory).max_context
    arguments = f"--model {directory} --context {most - 1} --phase".split()
    assert profile_step.parse_args([*arguments, "prefill"]).context == most - 1
    with pytest.raises(SystemExit, match="2"):
        profile_step.parse_args([*arguments, "decode"])


def test_a_batch_that_does_not_run_at_a_time_is_refused(directory):
    with pytest.raises(SystemExit, match="5 sequences do not run at a time"):
        profile_step.main(f"--model {directory} --batch 5 --context 40 --steps 2 --max-num-seqs 4".split())
