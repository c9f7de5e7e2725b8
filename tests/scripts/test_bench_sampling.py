"""The benchmark of the sampling kernels runs, and measures what it says."""

import bench_sampling
import jax.numpy as jnp
import numpy as np
import pytest

from nanovllm_jax.models.draw import draw


def test_it_prints_a_line(monkeypatch, capsys):
    argv = ["bench_sampling.py", "--rows", "2", "--vocab", "300", "--only", "everything"]
    monkeypatch.setattr("sys.argv", argv)
    bench_sampling.main()
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "2 rows, vocabulary 300" in title
    assert head.split()[-5:] == ["adjust", "threshold", "sample", "logprobs", "draw"]
    assert [line.split()[0] for line in lines] == ["everything"]


@pytest.mark.parametrize("name", bench_sampling.SETTINGS)
def test_what_a_setting_asks_for(name):
    """The limit counts a pass for each kernel that has work, and the rows draw what the setting allows."""
    rows, vocab = 3, 500
    bench = bench_sampling.Bench(name, rows, vocab)
    passes = {part: round(size / (4 * rows * vocab)) for part, size in bench.bytes.items()}
    adjusts, logprobs = name in ("penalties", "everything"), name in ("logprobs", "everything")
    threshold = name not in ("greedy", "temperature", "penalties", "logprobs")
    parts = dict(adjust=5 * adjusts, threshold=int(threshold), sample=1, logprobs=int(logprobs))
    assert passes == parts | {"draw": sum(parts.values())}
    tokens, _, state = draw(bench.logits[0], bench.sampling, bench.slots, bench.context_lens, bench.state)
    assert (np.asarray(tokens) >= 0).all()
    if name == "greedy":
        assert tokens.tolist() == jnp.argmax(bench.logits[0], axis=1).tolist()
    if name == "everything":
        assert (np.asarray(tokens) > 1).all(), "the ends are masked, for the texts are too short"
    assert state.last_tokens[:rows].tolist() == tokens.tolist()
    differences = "adjusted 0e+00, kept differently 0, drawn differently 0"  # an oracle's from itself
    assert bench.errors() == differences + ", ranks and ids 0, logprobs 0e+00" * logprobs
