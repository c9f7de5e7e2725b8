"""Shared by all tests: a compilation cache, and small random checkpoints."""

import gc
import os
import signal

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from random_checkpoint import SHAPES, write_random_checkpoint

from nanovllm_jax.models import score_programs, step_programs
from nanovllm_jax.models.programs import ProgramStore

QUICK_TO_COMPILE = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
QUICK_TO_RUN = dict(xla_backend_optimization_level=1)  # and beside it the flags above
AS_USUAL = dict(xla_backend_optimization_level=3, xla_llvm_disable_expensive_passes=False)
if jax.version.__version_info__ < (0, 11):  # later ones do not know all of these flags, and end the process
    QUICK_TO_COMPILE |= dict(xla_cpu_use_fusion_emitters=False, xla_cpu_parallel_codegen_split_count=1)
    QUICK_TO_RUN |= dict(xla_cpu_prefer_vector_width=128)  # which is less to compile
    AS_USUAL |= dict(xla_cpu_use_fusion_emitters=True, xla_cpu_parallel_codegen_split_count=32)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory, worker_id):
    """Engines of one shape compile once a test run, whichever of its workers needs them first.

    What compiles in moments is not kept: that would take longer.
    """
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> (directory, transformers model) of one of SHAPES."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = directory, write_random_checkpoint(directory, "old" in name, **SHAPES[name])
        return made[name]

    return make


def pytest_configure(config):
    """On a CPU, compile quickly: it is what the tests take longest for, and most of their programs run for moments.

    On a GPU, leave half of it to the transformers processes that the tests compare with.
    """
    jax.config.update("jax_numpy_rank_promotion", "raise")  # a strict user's setting, so that nothing relies on it
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads, which wait by spinning: models here are small
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
        os.environ.setdefault("NPROC", "2")  # XLA's threads: in jax's simulation of a GPU one of them waits for another
    if config.getoption("-m") == "gpu":
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")
    else:
        flags = " ".join(f"--{name}={value}" for name, value in QUICK_TO_COMPILE.items())
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"


@pytest.fixture(scope="module", autouse=True)
def older_objects_are_no_garbage():
    """Each engine's start looks for garbage: not through all that earlier modules have left, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def kept_programs():
    return {}


@pytest.fixture(scope="module")
def programs_kept(kept_programs):
    """Engines take programs from earlier ones, by the names that a GPU's engine has for them on disk.

    For modules without a probe, in which it does not matter how a program is made, and nothing changes what is traced.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramStore, "load", lambda store, name: kept_programs.get((*store.about, name)))
        patch.setattr(
            ProgramStore, "save", lambda store, name, program: kept_programs.update({(*store.about, name): program})
        )
        yield


def _engines_with(options, rows_from=1):
    with pytest.MonkeyPatch.context() as patch:
        for module in (score_programs, step_programs):
            patch.setattr(module, "compiler_options", lambda _, rows: options if rows >= rows_from else {})
        yield


@pytest.fixture(scope="module")
def quick_to_run():
    """Engines whose programs run for more than moments, but for those of one row."""
    yield from _engines_with(QUICK_TO_RUN, rows_from=2)


@pytest.fixture(scope="module")
def prefills_quick_to_run():
    """Engines of 64 rows that prefill in nearly all of their steps: the others compile longer than they would save."""
    yield from _engines_with(QUICK_TO_RUN, rows_from=65)


@pytest.fixture(scope="module")
def compiled_as_usual():
    """Engines whose programs XLA optimizes as it does for users."""
    yield from _engines_with(AS_USUAL)


@pytest.fixture
def compiled_quickly():
    """One test's engines, in a module whose others are not."""
    yield from _engines_with({})


@pytest.fixture
def ctrl_c():
    """Heard as in a terminal: what a shell runs in the background is started deaf to it, and so is what that starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def no_compilation_cache():
    """A CPU's program from there cannot be kept once more."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # else the setting has no effect, where another test has compiled before
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()
