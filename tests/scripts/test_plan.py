"""plan.py: what one GPU takes is what was measured, and what more of them take adds up."""

import plan
import pytest

from nanovllm_jax.parallel.sizes import split_config

SMALLEST = plan.published("0.6B")


@pytest.mark.parametrize(
    ("sequences", "context", "measured"),
    [(1, 1_128, 0.84e-3), (64, 843, 2.86e-3), (256, 843, 7.23e-3)],  # docs/performance.md: 0.6B on one H200
)
def test_one_gpu_takes_what_was_measured(sequences, context, measured):
    assert plan.decode_step(SMALLEST, 1, sequences, context).seconds == pytest.approx(measured, rel=0.1)


def test_a_prefill_takes_what_was_measured():
    assert plan.prefill_step(SMALLEST, 1, 16_384, 1_024).seconds == pytest.approx(16_384 / 413_500, rel=0.1)


@pytest.mark.parametrize("size", plan.SIZES)
def test_devices_share_the_work(size):
    config, alone = plan.published(size), plan.decode_step(plan.published(size), 1, 64, 1000)
    assert (alone.link_bytes, alone.collectives, alone.exchanged_bytes, alone.exchanges) == (0, 0, 0, 0)
    sums = 2 * config.num_hidden_layers + 1  # test_parallel.py counts them in the programs
    for devices in (2, 4, 8):
        few, many = (plan.decode_step(config, devices, sequences, 1000) for sequences in (32, 4096))
        assert few.bytes * devices == pytest.approx(plan.decode_step(config, 1, 32, 1000).bytes)
        assert few.flops * devices * 2 == pytest.approx(alone.flops)
        drawn = (devices - 1) / devices * (2 * config.vocab_size * 4 / devices + 172)
        assert (few.collectives, few.link_bytes) == (2, pytest.approx(32 * drawn))
        assert (few.exchanges, few.exchanged_bytes) == (sums, sums * (devices - 1) * 32 * config.hidden_size * 4)
        ring = 2 * (devices - 1) / devices * 4096 * config.hidden_size * 2
        assert (many.collectives, many.link_bytes) == (sums + 2, pytest.approx(sums * ring + 4096 * drawn))
        assert (many.exchanges, many.exchanged_bytes) == (0, 0)


def test_copies_of_kv_heads_are_read_too():
    """16 devices and 8 kv heads: each device reads a whole head, where 16 would have shared it."""
    config = plan.published("32B")
    assert split_config(config, 16).kv_copies == 2
    few, many = (plan.decode_step(config, n, 512, 8000) for n in (8, 16))
    assert many.bytes > 0.9 * few.bytes


@pytest.mark.parametrize("size", ["0.6B", "32B"])
def test_copies_of_kv_projections_are_weights_too(size):
    """Each of 16 devices has a kv head's keys and values, where 8 devices share 8 heads: twice the projections."""
    config = plan.published(size)
    heads = 16 * config.num_hidden_layers * config.hidden_size * config.head_dim  # of 8 kv heads, keys and values
    weights = plan.decode_step(config, 16, 1, 1).bytes * 16 - plan.decode_step(config, 8, 1, 1).bytes * 8
    keys_and_values = config.kv_bytes_per_token(2)
    assert weights == pytest.approx(2 * heads + keys_and_values)


def test_what_fits():
    assert plan.most_sequences(plan.published("32B"), 1, 1000) > 0
    assert plan.most_sequences(plan.published("32B"), 8, 1000) > 8 * plan.most_sequences(plan.published("32B"), 1, 1000)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", "--model", "8B", "--devices", "1", "8"])
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in lines[2:]] == [["| 8B", "1"], ["| 8B", "8"]]


@pytest.mark.parametrize("arguments", [["--model", "8B", "--devices", "3"], ["--context", "0"], ["--context", "40961"]])
def test_what_cannot_be(arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
    with pytest.raises(SystemExit):
        plan.main()
