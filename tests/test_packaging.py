"""The package from outside: what imports pull in, and what a program that uses it shows on its terminal."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from small_model import OPTIONS, SMALL, write_checkpoint

import nanovllm_jax
from nanovllm_jax.logs import NOISE, set_up_logging

RUN = """
from nanovllm_jax import *
llm = LLM({directory!r}, compilation_cache_dir={cache!r}, **{options})
print(llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0]["token_ids"])
"""


def run(code, cwd):
    """stdout and stderr of a fresh interpreter in another folder."""
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # to compile once
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def imported(statement, cwd):
    """Which of the heavy packages an import pulls in."""
    heavy = ("jax", "flax", "transformers", "torch", "tqdm", "huggingface_hub")
    return run(f"{statement}\nimport sys\nprint(*[m for m in {heavy} if m in sys.modules])", cwd)[0].split()


@pytest.mark.parametrize("module", ["schedule", "scheduler", "block_manager", "sequence", "batch"])
def test_scheduling_needs_no_jax(tmp_path, module):
    assert imported(f"import nanovllm_jax.engine.{module}", tmp_path) == []


def test_kernels_need_jax_alone(tmp_path):
    code = "import sys, nanovllm_jax; old = {*sys.modules}; from nanovllm_jax.kernels import paged_decode_attention"
    code += "\nprint(*[name for name in {*sys.modules} - old if name.startswith('nanovllm_jax')])"
    *ours, heavy = imported(code, tmp_path)
    assert ours
    assert all(name.startswith("nanovllm_jax.kernels") for name in ours)
    assert heavy == "jax"


def test_an_import_needs_nothing(tmp_path):
    """Each name is imported when it is asked for: without torch, as in test_a_program_that_wants_silence."""
    assert imported("import nanovllm_jax", tmp_path) == []


def test_public_names():
    outputs = ["CompletionOutput", "EngineStats", "Probe", "RequestMetrics", "RequestOutput"]
    assert nanovllm_jax.__all__ == ["LLM", "AsyncLLM", *outputs, "SamplingParams"]
    assert all(hasattr(nanovllm_jax, name) for name in nanovllm_jax.__all__)
    with pytest.raises(AttributeError, match="'nanovllm_jax' has no attribute 'LLMM'"):
        nanovllm_jax.LLMM  # noqa: B018


# --- the terminal ---


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A whole program, as source; with a cache of its own, as JAX warns of an entry that another is just writing."""
    folder = tmp_path_factory.mktemp("packaging")
    directory = write_checkpoint(folder / "model", replace(SMALL, num_hidden_layers=1))
    options = OPTIONS | dict(max_num_seqs=1, max_num_batched_tokens=16)  # two programs
    return RUN.format(directory=str(directory), cache=str(folder / "compiled"), options=options)


def test_what_a_program_shows(program, tmp_path):
    """The start-up log, the bar, and not a line more."""
    out, err = run(program, tmp_path)
    assert len(out.split(",")) == 3
    lines = [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith("Generating:")]
    assert [line.split()[0] for line in lines] == ["INFO"] * 3, err
    # The weights are read while programs compile, so either may be done first.
    words = sorted(re.findall(r" nanovllm_jax\.engine\.(\w+): (\w+)", err))
    assert words == [("model_runner", "compiled"), ("model_runner", "memory"), ("weights", "loaded")]


def test_a_program_with_logging_of_its_own(program, tmp_path):
    """Each line comes once, its own way; JAX does not tell a machine without a TPU that it has none."""
    setup = "import logging; logging.basicConfig(level=logging.INFO, format='mine: %(name)s %(message)s')\n"
    _, err = run(setup + program, tmp_path)
    assert err.count("compiled 2 batch shapes") == err.count("mine: nanovllm_jax.engine.model_runner compiled") == 1
    assert "tpu" not in err.lower()


def test_a_program_that_wants_silence(program, tmp_path):
    """And imports no torch. It may be there, for others: transformers would take seconds, if it were asked for more."""
    setup = "import logging; logging.getLogger('nanovllm_jax').setLevel('ERROR')\n"
    _, err = run(f"{setup}{program}\nimport sys\nassert 'torch' not in sys.modules", tmp_path)
    assert "INFO" not in err


def test_noise_is_dropped_and_all_else_is_not(caplog):
    with caplog.at_level(logging.INFO):
        for name, text in NOISE.items():
            logging.getLogger(name).warning(f"PyTorch was not found. {text}: and so on")
            logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"] * len(NOISE)


def test_one_handler_however_often_it_is_set_up():
    logger = logging.getLogger("nanovllm_jax")
    handlers, root = list(logger.handlers), list(logging.getLogger().handlers)
    set_up_logging()
    assert logger.handlers == handlers
    assert len(handlers) == 1
    assert logging.getLogger().handlers == root
