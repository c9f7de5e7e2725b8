"""rl_tiny.py: what its arrays hold, that the engine gets the new weights, and (slow) that it learns."""

from random import Random

import numpy as np
import pytest
import rl_tiny
from small_model import write_checkpoint

from nanovllm_jax import CompletionOutput, RequestOutput
from nanovllm_jax.outputs import Logprob


def output(prompt, *texts):
    """A RequestOutput with these texts' tokens, each of log probability -token."""
    completions = [
        CompletionOutput(i, "", tokens, logprobs=[{token: Logprob(-token)} for token in tokens])
        for i, tokens in enumerate(texts)
    ]
    return RequestOutput("0", None, prompt, outputs=completions)


def test_rollouts_line_up_and_leave_out_what_teaches_nothing():
    outputs = [output([1, 2], [3], [4, 5]), output([1], [6], [6]), output([7], [8, 9, 9], [8])]
    rewards = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    rollouts = rl_tiny.to_rollouts(outputs, rewards, Random(0))
    assert rollouts.tokens.shape == (rl_tiny.MINIBATCHES, 8, 32)
    rows = {tuple(tokens[tokens > 0].tolist()): row for row, tokens in enumerate(rollouts.tokens.reshape(16, 32))}
    sampled, logprobs = rollouts.sampled.reshape(16, 32), rollouts.logprobs.reshape(16, 32)
    advantages = dict.fromkeys([(1, 2, 3), (7, 8)], 1.0) | dict.fromkeys([(1, 2, 4, 5), (7, 8, 9, 9)], -1.0)
    assert set(rows) == {*advantages, ()}
    for tokens, advantage in advantages.items():
        row, prompt = rows[tokens], 2 if tokens[0] == 1 else 1
        assert rollouts.advantages.ravel()[row] == advantage
        assert np.flatnonzero(sampled[row]).tolist() == list(range(prompt, len(tokens)))
        assert logprobs[row, sampled[row]].tolist() == [-token for token in tokens[prompt:]]
    assert sampled.sum() == 7
    assert np.count_nonzero(rollouts.advantages) == 4


def test_where_all_groups_did_equally_well_nothing_is_learned():
    rollouts = rl_tiny.to_rollouts([output([1], [2], [3])], np.ones((1, 2), np.float32), Random(0))
    assert not rollouts.sampled.any()
    assert not rollouts.advantages.any()


def run(monkeypatch, *arguments):
    """The table's lines, and the weights that the engine was given."""
    given = []
    monkeypatch.setattr(rl_tiny.LLM, "update_weights", spy(rl_tiny.LLM.update_weights, given))
    return rl_tiny.train(rl_tiny.parse_options(list(arguments))), given


def spy(update_weights, given):
    def spied(llm, model, **options):
        update_weights(llm, model, **options)
        given.append(np.asarray(model.embed_tokens.weight[...]))
        assert np.array_equal(given[-1], llm.runner.weights.leaves[0])

    return spied


@pytest.mark.slow
def test_a_few_steps(monkeypatch, capsys, tmp_path):
    """Of a small random model, whose answers count as right when their length is even."""
    monkeypatch.setattr(rl_tiny, "HELD_OUT", 4)
    monkeypatch.setattr(rl_tiny, "TINY_MODEL", write_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(rl_tiny.Problem, "is_right", lambda problem, text: len(text) % 2 == 0)
    steps, given = run(monkeypatch, "--task", "add_more", "--steps", "2", "--prompts", "4", "--samples", "4")
    rl_tiny.plot(steps, tmp_path / "rl.png", "two steps")
    assert (tmp_path / "rl.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if line.startswith("    ")] == ["1", "2"]
    assert len(given) == 2
    assert not np.array_equal(*given)
    for step in steps:
        assert 0 < step.reward < 1
        # In the second step too: the engine samples with the weights that are trained.
        assert step.gap_mean < 1e-5
        assert step.gap_max < 1e-4


@pytest.mark.slow
def test_the_reward_rises(monkeypatch):
    """Two minutes on two cores: held-out accuracy goes from 9 to about 80."""
    steps, _ = run(monkeypatch, "--steps", "12", "--prompts", "24")
    assert np.mean([step.reward for step in steps[:2]]) < 0.2
    assert np.mean([step.reward for step in steps[-3:]]) > 0.45
    assert steps[0].held_out < 30
    assert steps[-1].held_out > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--minutes or --steps"),
        (["--steps", "3", "--samples", "1"], "--samples must be 2 or more"),
        (["--steps", "0"], "--steps: '0' is no number above 0"),
        (["--steps", "1", "--learning-rate", "-1"], "--learning-rate: '-1' is no number above 0"),
        (["--steps", "1", "--kl", "nan"], "--kl: 'nan' is no number from 0 on"),
        (["--minutes", "-1"], "--minutes: '-1' is no number above 0"),
        (["--steps", "nan", "--minutes", "1"], "--steps: 'nan' is no number above 0"),
        (["--steps", "3", "--prompts", "0"], "--prompts: '0' is no integer from 1 on"),
        (["--steps", "3", "--plot", "nowhere/rl.png"], "--plot: 'nowhere/rl.png' is no file in a directory"),
        (["--steps", "3", "--plot", "rl.xyz"], "--plot: 'rl.xyz' does not end in .png"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        rl_tiny.parse_options(arguments)
    assert message in capsys.readouterr().err
