"""bench.py: what it runs, what it calls the limit, how it times, and what it reports."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bench
import jax.numpy as jnp
import pytest
from benchmark import limits, online, report, worker, workloads
from benchmark.checkpoint import write_random_checkpoint
from small_model import write_checkpoint

from nanovllm_jax.checkpoints.huggingface import CheckpointFiles
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer
from nanovllm_jax.config import ModelConfig

RECORDED = Path(__file__).parent / "recorded_run.json"
# Options of an engine that is ready at once.
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 32, "num_kvcache_blocks": 20}
H200 = limits.Card(4.4e12, 790e12)
FULL = workloads.Sizes(vocab_size=151_936, max_model_len=40_960, cache_tokens=1_156_096, max_num_seqs=512)
# hidden, mlp, layers, query heads, tied; and the limits that were published for an H200: seconds of nano-vllm's
# bench.py, ms/token and first token in ms of 1,000 tokens alone, prefill of 64 x 1,024 in tokens/s
SHAPES = {
    "0.6B": ((1024, 3072, 28, 16, True), (3.62, 0.30, 1.3, 791_000)),
    "1.7B": ((2048, 6144, 28, 16, True), (4.54, 0.81, 3.7, 269_000)),
    "4B": ((2560, 9728, 36, 32, True), (7.43, 1.87, 9.6, 104_000)),
    "8B": ((4096, 12288, 36, 32, False), (10.41, 3.48, 18.0, 55_700)),
    "14B": ((5120, 17408, 40, 40, False), (16.38, 6.40, 34.0, 29_400)),
}


def qwen3(name):
    hidden, mlp, layers, heads, tied = SHAPES[name][0]
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    )


def only_call(workload, sizes=FULL):
    ((_, call),) = workloads.WORKLOADS[workload](sizes)
    return call


# ------------------------------------------------------------ limits


@pytest.mark.parametrize("name", SHAPES)
def test_limits_are_the_published_ones(name):
    config, (bench_s, alone_ms, first_ms, prefill_rate) = qwen3(name), SHAPES[name][1]
    nano = only_call("nano").describe()
    lengths = nano["prompt_tokens"], nano["output_tokens"], nano["reusable_tokens"]
    assert limits.generate_seconds(config, 2, H200, *lengths) == pytest.approx(bench_s, abs=0.006)
    assert 1e3 * limits.decode_step_seconds(config, 2, H200, [1128]) == pytest.approx(alone_ms, abs=0.006)
    assert 1e3 * limits.prefill_seconds(config, 2, H200, [1000], [0]) == pytest.approx(first_ms, abs=0.06)
    seconds = limits.prefill_seconds(config, 2, H200, [1024] * 64, [0] * 64)
    assert 64 * 1024 / seconds == pytest.approx(prefill_rate, rel=0.005)


def test_what_prompts_share_is_read_once_a_step():
    config = qwen3("0.6B")
    alone = limits.generate_seconds(config, 2, H200, [2100] * 9, [128] * 9, [0] * 9)
    shared = limits.generate_seconds(config, 2, H200, [2100] * 9, [128] * 9, [0] + [2000] * 8)
    prefill = [limits.prefill_seconds(config, 2, H200, [2100] * 9, cached) for cached in ([0] * 9, [0] + [2000] * 8)]
    read = 127 * 8 * 2000 * config.kv_bytes_per_token(2) / H200.bytes
    assert (alone - prefill[0]) - (shared - prefill[1]) == pytest.approx(read)


@pytest.mark.parametrize(("batch", "context", "ms"), [(8, 1000, 0.49), (64, 128, 0.54), (128, 4000, 13.7)])
def test_decode_step_limits_are_the_published_ones(batch, context, ms):
    contexts = [context + 32] * batch
    assert 1e3 * limits.decode_step_seconds(qwen3("0.6B"), 2, H200, contexts) == pytest.approx(ms, rel=0.02)


def test_phases_of_a_decode_step_add_up_to_its_limit():
    config = qwen3("8B")
    phases = limits.decode_phases(config, 2, [1000, 3000])
    seconds = sum(cost.bytes for cost in phases.values()) / H200.bytes
    # The norms, which no phase counts, are one part in 10,000.
    assert seconds == pytest.approx(limits.decode_step_seconds(config, 2, H200, [1000, 3000]), rel=1e-4)


def test_cached_prompt_tokens_cost_nothing_but_being_attended_to():
    config = qwen3("0.6B")
    whole = limits.prefill_phases(config, 2, [3000], [0])["attend"].flops
    first, rest = (
        limits.prefill_phases(config, 2, [n], [known])["attend"].flops for n, known in [(1000, 0), (3000, 1000)]
    )
    assert first + rest == whole
    assert (
        limits.prefill_phases(config, 2, [3000], [2999])["mlp"].flops
        == limits.decode_phases(config, 2, [3000])["mlp"].flops
    )


# ------------------------------------------------------------ workloads


def test_nano_is_the_workload_of_nano_vllm():
    call = only_call("nano")
    random.seed(0)
    length = random.randint(100, 1024)
    assert call.prompts[0] == [random.randint(0, 10_000) for _ in range(length)]
    assert len(call.prompts) == 256
    assert (sum(map(len, call.prompts)), sum(call.max_tokens)) == (142_827, 133_966)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workloads_fit_in_small_models(name):
    sizes = workloads.Sizes(512, 256, requests=20, contexts=[32, 512], cache_tokens=10**6, max_num_seqs=64)
    calls = dict(workloads.WORKLOADS[name](sizes))
    assert calls
    for call in calls.values():
        assert len(call.prompts) == len(call.max_tokens)
        for prompt, max_tokens in zip(call.prompts, call.max_tokens):
            assert max_tokens > 0 < len(prompt) <= 256 - max_tokens
            assert 0 <= min(prompt) <= max(prompt) < 512


def test_sweep_leaves_out_what_the_engine_cannot_hold():
    sizes = workloads.Sizes(512, 2000, contexts=[128, 1024, 8192], cache_tokens=40_000, max_num_seqs=128)
    names = [name for name, _ in workloads.sweep(sizes)]
    assert names == [f"{b} x 128" for b in (1, 8, 32, 64, 128)] + ["1 x 1024", "8 x 1024"]


def test_shared_prompts_share_what_they_are_said_to():
    call, seen = only_call("shared"), []
    for prompt, reusable in zip(call.prompts, call.reusable, strict=True):
        assert any(prompt[:2048] == other[:2048] for other in seen) == (reusable == 2048)
        seen.append(prompt)
    assert call.reusable.count(0) == 8


def test_online_requests_arrive_at_their_rate_and_long_ones_among_them():
    (_, slow), (_, fast) = workloads.online(workloads.Sizes(512, 4096, rates=[10, 100]))
    assert slow.arrivals == sorted(slow.arrivals)
    assert len(slow.prompts) / slow.arrivals[-1] == pytest.approx(10, rel=0.3)
    assert len(fast.prompts) / fast.arrivals[-1] == pytest.approx(100, rel=0.1)
    assert [len(prompt) for prompt in fast.prompts].count(3500) == len(fast.prompts) // 16


# ------------------------------------------------------------ timing


class FakeEngine:
    """Two tokens a step for every request; keeps a log."""

    def __init__(self, tokens_short=0):
        self.log, self.requests, self.tokens_short = [], {}, tokens_short

    def reset_prefix_cache(self):
        self.log.append("reset")

    def generate(self, prompts, max_tokens):
        self.log.append(max_tokens)
        return [(n - self.tokens_short, 5) for n in max_tokens]

    def add(self, request_id, prompt, max_tokens):
        self.requests[request_id] = [0, max_tokens]

    def step(self):
        for request in self.requests.values():
            request[0] = min(request[0] + 2, request[1])
        return {request_id: count for request_id, (count, _) in self.requests.items()}


def test_every_timed_call_begins_with_an_empty_prefix_cache_after_a_warm_up():
    engine = FakeEngine()
    runs = worker.run_call(engine, workloads.Call([[1, 2]], [7], first_alone=True), repeats=2)
    assert engine.log == ["reset", [1], "reset", [7]] * 3
    assert [run["cached_tokens"] for run in runs] == [5, 5]
    assert all(run["first_seconds"] > 0 and run["seconds"] > 0 for run in runs)


def test_a_call_on_cached_prompts_fills_the_cache_once():
    engine = FakeEngine()
    worker.run_call(engine, workloads.Call([[1, 2]], [7], fill=True), repeats=2)
    assert engine.log == ["reset", [1], [7], [7], [7]]


def test_an_engine_that_stops_early_is_no_result():
    with pytest.raises(RuntimeError, match="FakeEngine did not generate as many"):
        worker.run_call(FakeEngine(tokens_short=1), workloads.Call([[1, 2]], [7]), repeats=1)


def test_serving_stamps_every_token_after_its_arrival():
    call = workloads.Call([[1]] * 3, [3, 4, 1], arrivals=[0.0, 0.01, 0.03])
    stamps = online.serve(FakeEngine(), call)
    assert [len(times) for times in stamps] == call.max_tokens
    assert all(times[0] >= arrival and times == sorted(times) for arrival, times in zip(call.arrivals, stamps))


def test_latencies():
    found = online.latencies([1.0, 2.0], [[1.5, 1.6, 1.9], [2.1, 2.2, 2.2]])
    assert found["TTFT"]["p50"] == pytest.approx(300)  # between 500 and 100
    assert found["TPOT"]["p90"] == pytest.approx(200 - 0.1 * 150)  # 50 and 200
    # Of 100, 300 and 100: two tokens that come at once are one piece of a text.
    assert found["ITL"] == pytest.approx({"p50": 100, "p90": 300 - 0.2 * 200, "p99": 300 - 0.02 * 200})
    assert online.latencies([0.0], [[0.1, 0.1]])["ITL"] == {"p50": None, "p90": None, "p99": None}


# ------------------------------------------------------------ reports


@pytest.fixture
def record():
    """A recorded run of the tiny model, and a made-up peer that takes twice as long for everything."""
    record = json.loads(RECORDED.read_text())
    peer = json.loads(RECORDED.read_text())["engines"]["ours"]
    for result in peer:
        for calls in result["workloads"].values():
            for call in calls.values():
                for run in call["runs"]:
                    for name in {"seconds", "first_seconds"} & set(run):
                        run[name] *= 2
    record["engines"]["vllm"] = peer
    return record


def test_every_workload_has_its_rows(record):
    rows = report.rows(record)
    assert {row.workload for row in rows} == {*workloads.WORKLOADS, "start"}
    for row in rows:
        if row.workload not in ("online", "start") and row.unit != "%":
            assert row.speedup("ours", "vllm") == pytest.approx(2), row
            assert row.share("ours") == pytest.approx(2 * row.share("vllm"))
            assert len(row.values["ours"]) == 4, "two rounds of two repeats"
    starts = {row.name: row.values["ours"] for row in rows if row.workload == "start"}
    first, later = record["engines"]["ours"]
    assert starts["until ready, the first"] == [first["start_seconds"]]
    assert starts["until ready, later ones"] == [later["start_seconds"]]


def test_an_engine_without_a_second_round_is_in_no_row_of_later_starts(record):
    """As in the middle of a run, after whose every turn rows are summed up."""
    del record["engines"]["vllm"][1:]
    rows = {row.name: row for row in report.rows(record) if row.workload == "start"}
    assert set(rows["until ready, the first"].values) == {"ours", "vllm"}
    assert set(rows["until ready, later ones"].values) == {"ours"}
    assert all(row.summary() for row in report.rows(record))
    assert "later ones" in report.table(record)


def test_throughput_row_by_hand(record):
    runs = [run for result in record["engines"]["ours"] for run in result["workloads"]["nano"]["all"]["runs"]]
    tokens = sum(record["engines"]["ours"][0]["workloads"]["nano"]["all"]["output_tokens"])
    row = next(row for row in report.rows(record) if (row.workload, row.unit) == ("nano", "tok/s"))
    assert row.values["ours"] == [tokens / run["seconds"] for run in runs]
    rates = sorted(row.values["ours"])
    assert row.median("ours") == pytest.approx((rates[1] + rates[2]) / 2)
    assert row.spread("ours") == pytest.approx((rates[-1] - rates[0]) / (rates[1] + rates[2]))
    assert row.summary()["ours_to"] == {"vllm": pytest.approx(2)}


def test_table_and_notes(record):
    del record["engines"]["vllm"][0]["workloads"]["single"], record["engines"]["vllm"][1]["workloads"]["single"]
    lines = report.table(record).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "work",
        "unit",
        "ours",
        "vllm",
        "ours : vllm",
        "limit",
    ]
    (first,) = [line for line in lines if "first token" in line]
    assert [cell.strip() for cell in first.split("|")[4:6]] == ["-", "-"]
    (nano,) = [line for line in lines if "nano: output" in line]
    assert " 2 x " in nano
    notes = report.notes(record)
    assert "KV cache of 384 tokens" in notes
    assert "memory at 0.00694 TB/s" in notes
    assert "of numbers of 2 bytes" in notes
    assert "failed" not in notes


def test_the_limit_is_of_numbers_as_large_as_ours(record):
    (before,) = (row for row in report.rows(record) if row.name == "after it")
    for result in record["engines"]["ours"]:
        result["flags"]["dtype"] = "float32"
    (after,) = (row for row in report.rows(record) if row.name == "after it")
    assert after.limit == pytest.approx(2 * before.limit, rel=0.01)
    assert "of numbers of 4 bytes" in report.notes(record)


def test_notes_say_what_is_not_in_the_table(record):
    record["failed"]["vllm"] = "Traceback ...\nCUDA out of memory\n"
    record["sizes"]["batches"].append(64)
    notes = report.notes(record)
    assert "vllm failed: CUDA out of memory" in notes
    (line,) = [line for line in notes.splitlines() if line.startswith("not in the sweep")]
    assert "64 x 16" in line
    assert "1 x 16" not in line


def test_engines_that_drew_other_requests_are_not_compared(record):
    report.check_same_requests(record)
    record["engines"]["vllm"][0]["workloads"]["nano"]["all"]["checksum"] += 1
    with pytest.raises(RuntimeError, match="nano all: two environments"):
        report.check_same_requests(record)


def test_plot(record, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmark.plot import plot

    plot(record, tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()
    online = 4 * len(record["sizes"]["rates"])
    assert drawn.count('id="axes_') == -(-(4 + online + 2) // 4) * 4, "four bar charts, online's, and two contexts"


# ------------------------------------------------------------ the command


def test_whole_run_on_a_cpu(tmp_path, monkeypatch, capsys):
    (tmp_path / "nanovllm.py").write_text("raise ImportError('no flash-attn here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = write_checkpoint(tmp_path / "model")
    command = f"--model {model} --workload nano single prefill sweep shared online --requests 2 --repeats 1"
    command += " --max-model-len 128 --batches 1 2 --contexts 16 --rates 50 --bandwidth 0.01 --flops 0.1 --rounds 1"
    command += f" --python vllm=/usr/bin/false --json {tmp_path}/run.json --options"
    assert bench.main([*command.split(), f"ours={json.dumps(SMALL)}"]) == 1
    shown = capsys.readouterr().out
    assert "vllm: not installed in /usr/bin/false. pip install vllm; or name another environment with --python" in shown
    assert "nanovllm failed" in shown
    assert "no flash-attn here" in shown
    record = json.loads((tmp_path / "run.json").read_text())
    (ours,) = record["engines"]["ours"]
    assert list(ours["workloads"]) == list(workloads.WORKLOADS)
    assert list(ours["workloads"]["sweep"]) == ["1 x 16", "2 x 16"]
    assert ours["kv_capacity_tokens"] == 20 * 32
    assert (ours["flags"]["block_size"], ours["flags"]["num_scheduler_steps"]) == ("32", "1")
    assert {"workload", "limit", "engines"} <= set(record["summary"][0])
    assert bench.main(["--report", f"{tmp_path}/run.json"]) == 1
    again = capsys.readouterr().out
    assert again.splitlines()[0] in shown
    assert again.count("\n") > 20


def test_nano_vllm_is_not_given_weights_that_do_not_exist():
    args = bench.parse_args(["--load-format", "dummy", "--engines", "nanovllm"])
    pythons = {"nanovllm": "/usr/bin/true"}  # an interpreter that finds every module
    assert "--random-weights" in bench.find_missing(args, pythons)["nanovllm"]


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], 4096), (["--workload", "nano", "sweep"], 32_834), (["--max-model-len", "99"], 99)]
)
def test_max_model_len(arguments, expected):
    assert bench.resolve_max_model_len(bench.parse_args(arguments), qwen3("0.6B")) == expected


def test_random_weights_are_a_checkpoint(tmp_path):
    config = json.loads((TINY_MODEL / "config.json").read_text()) | {"vocab_size": 700, "num_hidden_layers": 1}
    (tmp_path / "small.json").write_text(json.dumps(config))
    directory = tmp_path / "models" / "small"
    write_random_checkpoint(tmp_path / "small.json", directory)
    assert ModelConfig.from_pretrained(directory).vocab_size == 700
    embedding = CheckpointFiles(directory).read("model.embed_tokens.weight", (slice(None), slice(None)))
    assert (embedding.shape, embedding.dtype) == ((700, 384), jnp.bfloat16)
    assert float(embedding.astype("float32").std()) == pytest.approx(0.02, rel=0.02)
    assert load_tokenizer(directory).decode([650, 699]) == ""
    before = (directory / "model.safetensors").stat().st_mtime_ns
    args = bench.parse_args(["--random-weights", str(tmp_path / "small.json"), "--model", str(directory)])
    assert args.model == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before, "written once"


BAD_OPTIONS = [
    ("--batches 0", "'0' is no integer from 1 on"),
    ("--repeats -1", "'-1' is no integer from 1 on"),
    ("--rates nan", "'nan' is no number above 0"),
    ("--bandwidth 0", "'0' is no number above 0"),
    ("--json /nowhere/run.json", "'/nowhere/run.json' is no file in a directory that is there"),
    ("--plot run.xyz", "'run.xyz' does not end in .png, .svg, .pdf"),
    ("--model /nowhere", "'/nowhere' is neither a directory nor a Hub id"),
    ("--random-weights /nowhere.json", "No such file or directory: '/nowhere.json'"),
    (f"--random-weights {__file__}", f"{__file__} is not valid JSON"),
    ("--options ours={bad", "'{bad' is no JSON"),
    ("--options ours=[1]", "'[1]' is no JSON object"),
    ("--options theirs={}", "is not ENGINE=VALUE with one of ours, nanovllm, vllm"),
    ("--report /nowhere.json", "'/nowhere.json' is no record of this script"),
    (f"--report {RECORDED} --json /tmp/run.json", "--report runs nothing that --json could write"),
    (f"--random-weights {TINY_MODEL} --model {RECORDED}", "recorded_run.json"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_runs(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(options.split())
    assert message in capsys.readouterr().err


WITHOUT_A_CARD = json.dumps(json.loads(RECORDED.read_text()) | {"card": {"bytes_per_second": 0}})


@pytest.mark.parametrize("broken", ["{", "{}", "[1]", WITHOUT_A_CARD])
def test_what_is_no_record_is_refused(tmp_path, capsys, broken):
    (tmp_path / "run.json").write_text(broken)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--report", str(tmp_path / "run.json")])
    assert "is no record of this script" in capsys.readouterr().err


def test_random_weights_never_replace_another_model(tmp_path, capsys):
    """Sharded, as published ones are: config.json tells."""
    config = json.loads((TINY_MODEL / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text(json.dumps(config))
    (tmp_path / "real" / "model-00001-of-00001.safetensors").write_bytes(b"trained")
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--random-weights", str(tmp_path / "small.json"), "--model", str(tmp_path / "real")])
    assert "holds another model than" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "real").iterdir()} == {"config.json", "model-00001-of-00001.safetensors"}


def test_random_weights_leave_orbax_weights_alone(tmp_path):
    shutil.copy(TINY_MODEL / "config.json", tmp_path)
    (tmp_path / "orbax").mkdir()
    args = bench.parse_args(["--random-weights", str(TINY_MODEL), "--model", str(tmp_path)])
    assert args.model == tmp_path.resolve()
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "orbax"}


def test_an_engine_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    """No interpreter, and a folder that happens to have its name; with no engine left nothing was measured."""
    (tmp_path / "vllm").mkdir()
    monkeypatch.chdir(tmp_path)
    command = "--engines nanovllm vllm --bandwidth 1 --flops 1 --python nanovllm=/nowhere/python --json run.json"
    assert bench.main(command.split()) == 1
    assert set(json.loads(Path("run.json").read_text())["missing"]) == {"nanovllm", "vllm"}
    shown = capsys.readouterr().out
    assert "nanovllm: not installed in /nowhere/python" in shown
    assert "vllm: not installed" in shown


def test_another_kind_of_model_is_refused(tmp_path, capsys):
    config = json.loads((TINY_MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--model", str(tmp_path)])
    assert "LlamaForCausalLM" in capsys.readouterr().err


def test_a_card_that_cannot_be_measured(monkeypatch):
    """By our engine's own interpreter, here one that finds every module and has none."""
    monkeypatch.setattr(bench, "has_module", lambda python, name: True)
    with pytest.raises(SystemExit, match="give --bandwidth and --flops"):
        bench.main(["--engines", "ours", "--python", "ours=/usr/bin/false"])


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path):
    """On SIGTERM or Ctrl-C in the second workload the first is in the record, and shown; nothing runs on."""
    model, path = write_checkpoint(tmp_path / "model"), tmp_path / "run.json"
    command = [sys.executable, bench.__file__, "--model", model, "--engines", "ours", "--workload", "prefill", "nano"]
    command += ["--requests", "2", "--repeats", "50", "--max-model-len", "128", "--bandwidth", "1", "--flops", "1"]
    command += ["--json", path, "--options", f"ours={json.dumps(SMALL)}"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        deadline = time.monotonic() + 600
        while run.poll() is None and time.monotonic() < deadline:
            results = [file.read_text() for file in tmp_path.glob("*/result.json")]
            if any('"prefill"' in result for result in results):
                break
            time.sleep(0.1)
        run.terminate()
        shown, errors = run.communicate(timeout=300)
    assert run.returncode == 1, errors
    assert "prefill: prompts" in shown
    assert "ours failed: interrupted" in shown
    record = json.loads(path.read_text())
    assert list(record["engines"]["ours"][0]["workloads"]) == ["prefill"]
    assert not list(tmp_path.glob("*/job.json")), "nothing is left behind"


def test_an_engine_that_ends_without_a_result_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "has_module", lambda python, name: True)
    assert bench.main(["--engines", "vllm", "--bandwidth", "1", "--flops", "1", "--python", "vllm=/usr/bin/true"]) == 1
    assert "vllm failed: it ended without a result" in capsys.readouterr().out
