"""soak.py: it passes on an engine that is right, and fails on one that is not."""

import random
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import soak
from small_model import small_llm, write_checkpoint
from soaking.compare import Result, largest_difference, other_differences, token_differences
from soaking.referee import Referee
from soaking.watch import Memory, allocated

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.requests import Request
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.outputs import CompletionOutput, Logprob, RequestOutput


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("soak") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    return small_llm(directory, num_kvcache_blocks=12)


def soaked(llm, requests=40, seed=0):
    found = soak.Soak(llm, seed)
    found.warm_up()
    found.run(requests, deadline=float("inf"))
    return found


def test_a_short_run(llm, capsys):
    found = soaked(llm, 80, seed=4)
    assert found.problems() == []
    assert found.counts["compared"] > 60
    assert found.counts["tokens compared"] == found.counts["tokens"] > 500
    assert all(found.counts[name] for name in ("preemptions", "refused", "streams left")), found.counts
    assert found.report().endswith("passed")


@pytest.mark.slow
def test_2000_requests(directory, capsys):
    arguments = ["--model", str(directory), "--requests", "2000"]
    status = soak.main(arguments)
    print(capsys.readouterr().out)
    assert status == 0


def test_the_command_line(directory, monkeypatch, capsys, llm):
    """No request is begun after the last second; the exit status tells of problems."""
    monkeypatch.setattr(soak, "start_engine", lambda args, scratch: llm)
    assert soak.main(["--requests", "9", "--seconds", "1e-9"]) == 1
    assert "PROBLEM nothing was compared" in capsys.readouterr().out
    monkeypatch.setattr(soak, "ROUND", 8)
    assert soak.main(["--requests", "8", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "requests                           16\n" in out  # with those of the streams that are left
    assert out.endswith("passed\n")


def test_ctrl_c_ends_it_with_its_report(monkeypatch, capsys, llm):
    run_round, rounds = soak.Soak._run_round, iter([True, False])

    def interrupted(self, *args):
        if not next(rounds):
            raise KeyboardInterrupt
        run_round(self, *args)

    monkeypatch.setattr(soak, "start_engine", lambda args, scratch: llm)
    monkeypatch.setattr(soak, "ROUND", 8)
    monkeypatch.setattr(soak.Soak, "_run_round", interrupted)
    assert soak.main(["--requests", "100", "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("passed\n")
    assert len(shown.err.splitlines()) == 1, "one round"


def test_a_directory_without_a_tokenizer_borrows_one(tmp_path, directory, monkeypatch):
    config = tmp_path / "config" / "config.json"
    config.parent.mkdir()
    config.write_bytes((directory / "config.json").read_bytes())
    seen = {}
    monkeypatch.setattr(soak, "LLM", lambda model, **options: seen.update(options, files=sorted(model.iterdir())))
    args = soak.parse_args(["--model", str(config.parent), "--load-format", "dummy", "--blocks", "9"])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    soak.start_engine(args, scratch)
    assert {path.name for path in seen["files"]} >= {"config.json", "tokenizer.json"}
    assert (seen["num_kvcache_blocks"], seen["load_format"]) == (9, "dummy")


# --- engines that are wrong ---


def other_draws_when_crowded(llm, patch):
    new_sequence = Request.new_sequence

    def wrong(self, seq_id, seed, *args):
        crowded = len(llm.scheduler.running) > 2
        return new_sequence(self, seq_id, seed ^ 1 if crowded else seed, *args)

    patch.setattr(Request, "new_sequence", wrong)


def blocks_of_another(llm, patch):
    """What a hash of the last block alone would find."""
    manager = llm.scheduler.block_manager
    digests = manager._hash_blocks
    patch.setattr(manager, "_hash_blocks", lambda seq, count: [b"same"] * len(digests(seq, count)))


def logprobs_a_little_off(llm, patch):
    collect = llm.runner.collect_logprobs

    def wrong(output, rows):
        found = collect(output, rows)
        found[:, :, 1, 0].view(np.float32)[:] -= 1e-4 * (len(rows) > 1)
        return found

    patch.setattr(llm.runner, "collect_logprobs", wrong)


@pytest.mark.parametrize("fault", [other_draws_when_crowded, blocks_of_another, logprobs_a_little_off])
def test_a_planted_fault_is_found(llm, monkeypatch, fault, capsys):
    try:
        with monkeypatch.context() as patch:
            fault(llm, patch)
            found = soaked(llm, 80)
    finally:
        for request_id in list(llm._requests):
            llm.abort_request(request_id)
        llm.reset_prefix_cache()
    assert found.mismatches
    assert "mismatches                         0" not in found.report()


def test_other_problems(llm, capsys):
    found = soak.Soak(llm, 0)
    found.counts.update({"compared": 1, "compiles": 2, "leaked blocks": 3})
    found.memory.samples = [(i * 100, 2**30 + i * 200 * 1024) for i in range(20)]
    assert found.problems() == ["3 leaked blocks", "2 compiles", "memory grows by 2000 KiB for 1000 requests"]
    assert found.report().endswith("3 problems")


def test_the_slope_of_memory():
    memory = Memory()
    memory.sample(0)
    assert 2**20 < memory.samples[0][1] < 2**40
    assert memory.slope() is None
    memory.samples = [(i, 2**30 - 7 * i) for i in range(4)] + [(i, 2**30 + 2048 * i) for i in range(4, 8)]
    assert memory.slope() == pytest.approx(2000)
    memory.samples = [(i, 2**30 + 1024 * i + 2**25 * (i > 15)) for i in range(20)]
    assert memory.slope() == pytest.approx(1000), "one large piece more is no leak"


def test_memory_that_is_kept_is_seen():
    before, kept = allocated(), [bytes(1000) for _ in range(20_000)]
    assert allocated() - before > 0.9 * sum(map(len, kept))


# --- comparing ---


def result(tokens, logprobs=None, text="text", reason="length"):
    made = Result()
    part = CompletionOutput(0, text, tokens, logprobs=logprobs, finish_reason=reason)
    made.add(RequestOutput("0", None, [1], outputs=[part]))
    return made


def entry(token, *values):
    """A token's own logprob, then those of tokens 100, 101, ..."""
    own, *best = (Logprob(value) for value in values)
    return {token: own} | dict(zip(range(100, 200), best))


def test_differences():
    same = result([1, 2, 3])
    assert token_differences(same, result([1, 2, 3])) == []
    [difference] = token_differences(same, result([1, 5, 3]))
    assert (difference.at, difference.tokens) == (1, (2, 5))
    [difference] = token_differences(same, result([1, 2]))
    assert (difference.at, difference.tokens) == (2, (3, None))
    assert other_differences(same, result([1, 2, 3]), 0) == []
    assert len(other_differences(same, result([1, 2, 3], text="other"), 0)) == 1
    assert len(other_differences(same, result([1, 2, 3], reason="stop"), 0)) == 1


def test_differences_of_logprobs():
    def difference(ours, theirs):
        return largest_difference(result([1], ours), result([1], theirs))

    assert difference([entry(1, -2.0, -0.5)], [entry(1, -2.0, -0.5)]) == 0
    assert difference([entry(1, -2.0, -0.5)], [entry(1, -2.5, -0.5)]) == 0.25, "of its size"
    assert difference([entry(1, -2.0, -0.5, -0.6)], [entry(1, -2.0, -0.6, -0.5)]) == 0, "two change places"
    assert difference([entry(1, -2.0, -0.5)], [entry(1, -2.0, -0.25)]) == 0.25
    assert difference([entry(1, -2.0)] * 2, [entry(1, -2.0), entry(2, -9.0)]) == 0, "another token was drawn"
    assert other_differences(result([1], [entry(1, -2)]), result([1], [entry(1, -2.1)]), 0.01)


# --- ties ---


@pytest.fixture(scope="module")
def referee(llm):
    """As if the engine had run in bfloat16."""
    found = Referee(llm)
    found.applies = True
    type(found)._dtypes, kept = (
        property(lambda self: (jnp.dtype("float32"), jnp.dtype("bfloat16"))),
        type(found)._dtypes,
    )
    yield found
    type(found)._dtypes = kept


PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(temperature=1.2, seed=5),
    "cut": SamplingParams(temperature=1.2, seed=6, top_k=40, top_p=0.95, min_p=0.001),
    "adjusted": SamplingParams(seed=7, presence_penalty=1, repetition_penalty=1.3, logit_bias={3: 5}, min_tokens=9),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_ties(llm, referee, params):
    """The token that float32 draws may be drawn; another only if it is as good within the noise of 16 bits."""
    rng = random.Random(0)
    ties = 0
    for _ in range(6):
        prompt = [rng.randrange(500) for _ in range(rng.randint(1, 60))]
        tokens = llm.generate([prompt], replace(params, max_tokens=9), use_tqdm=False)[0]["token_ids"]
        before, drawn = tokens[:-1], tokens[-1]
        assert referee.is_tie(prompt, params, 0, before, (drawn, drawn))
        ties += sum(referee.is_tie(prompt, params, 0, before, (drawn, token)) for token in (5, 120, 444))
    assert ties < 4, "nearly any token counts as a tie"


def test_a_tie(llm, referee):
    """The two best of many prompts: those that are close are ties, the others are not."""
    rng, params, gaps = random.Random(1), SamplingParams(temperature=0), {True: [], False: []}
    for _ in range(25):
        prompt = [rng.randrange(500) for _ in range(20)]
        logits, _ = referee._logits(prompt)
        second, best = np.argsort(logits)[-2:].tolist()
        gaps[referee.is_tie(prompt, params, 0, [], (best, second))].append(logits[best] - logits[second])
    assert min(map(len, gaps.values())) > 2
    assert max(gaps[True]) < np.median(gaps[False])
    assert not referee.is_tie([1], params, 0, [], (1, None)), "an end is no tie"


def test_the_edge_of_min_p_goes_by_the_likeliest(llm, referee):
    """With the likeliest a little lower, min_p lets so many in that top_p takes the third as well."""
    logits = np.full(512, -10, np.float32)
    logits[:3], logits[3:18], logits[18:48] = (2.60, 2.58, 2.48), 2.3, 2.17
    lower = logits - 0.03 * np.eye(1, 512, dtype=np.float32)[0]
    params, seen = SamplingParams(temperature=0.6, top_p=0.15, min_p=0.5), 0
    for seed in range(40):
        seq = Sequence(0, "", [100], params, seed=seed, stop_token_ids=frozenset(), min_len=1, max_len=100)
        assert referee._draw(seq, logits) in (0, 1)
        if referee._draw(seq, lower) == 2:
            seen += 1
            assert referee._may_draw(seq, logits, 2, 0.03)
        assert not referee._may_draw(seq, logits, 40, 0.03)
    assert seen > 3


def test_float32_has_no_ties(llm):
    assert not Referee(llm).is_tie([1, 2], SamplingParams(temperature=0), 0, [], (1, 1))
