"""What can go wrong while requests run: what the caller sees, what becomes of the others, what the engine is good for
afterwards. NaN has a file of its own, and so have AsyncLLM's callers."""

import io
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import assert_idle, small_llm, whole, write_checkpoint
from tqdm import tqdm

from nanovllm_jax import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("programs_kept")

PROMPTS = [[5, 6, 7], [1] * 60, [2] * 40, [3], [4, 4], [9] * 20]
PARAMS = SamplingParams(temperature=0.8, seed=1, max_tokens=12, ignore_eos=True, stop=["never"], presence_penalty=0.5)
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    return small_llm(directory, num_kvcache_blocks=12)  # too small for all of them


@pytest.fixture(scope="module")
def expected(llm):
    return run(llm)


def run(llm):
    outputs = whole(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    assert_usable(llm)
    return outputs


def assert_usable(llm):
    assert_idle(llm)
    assert not llm.has_unfinished_requests()
    assert llm.scheduler.block_manager.num_used_blocks == 0


def drain(llm):
    """What is left to come."""
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    return outputs


def nth(number, function, error):
    """The function, but its call of this number raises."""
    calls = []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return function(*args, **options)

    return failing


# --- the device ---


def refuse_to_run(llm, patch, call):
    """From a program's call: a kernel that raises, memory that is short."""
    shapes = llm.runner.programs
    run = nth(call, lambda shape, *args: shapes[shape](*args), OUT_OF_MEMORY)
    patch.setattr(
        llm.runner, "programs", {shape: lambda *args, shape=shape: run(shape, *args) for shape in llm.runner.programs}
    )


def fail_on_the_way(llm, patch, call):
    """From the reading: what the device ran has failed meanwhile."""
    patch.setattr(llm.runner, "collect", nth(call, llm.runner.collect, OUT_OF_MEMORY))


def fail_to_write_tables(llm, patch, call):
    patch.setattr(llm.runner, "write_tables", nth(call, llm.runner.write_tables, OUT_OF_MEMORY))


DEVICE_FAULTS = [refuse_to_run, fail_on_the_way, fail_to_write_tables]


@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_out_of_memory_in_generate(llm, expected, monkeypatch, fault):
    for call in (1, 3, 6):
        with monkeypatch.context() as patch:
            fault(llm, patch, call)
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert_usable(llm)
        assert run(llm) == expected


@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_out_of_memory_in_a_stream(llm, expected, monkeypatch, fault):
    """What was told is true, and the iterator is at its end."""
    with monkeypatch.context() as patch:
        fault(llm, patch, 6)
        stream, told = llm.stream(PROMPTS, PARAMS), []
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            told.extend(output for output in stream)
        assert next(stream, None) is None
    assert_usable(llm)
    first = int(told[0].request_id)
    for number, [(_, expected_tokens, _)] in enumerate(expected, start=first):
        tokens = [token for output in told if output.request_id == str(number) for token in output["token_ids"]]
        assert tokens == expected_tokens[: len(tokens)]
    assert run(llm) == expected


def test_out_of_memory_in_ones_own_loop(llm, expected, monkeypatch):
    """Outputs that came before are the caller's; every other request is gone, and its id can be used again."""
    llm.add_request([8, 9], SamplingParams(temperature=0, max_tokens=1), "early")
    done = []
    while not done:
        done = llm.step()
    for i, prompt in enumerate(PROMPTS):
        llm.add_request(prompt, PARAMS, f"mine {i}")
    with monkeypatch.context() as patch:
        fail_on_the_way(llm, patch, 2)
        with pytest.raises(jax.errors.JaxRuntimeError):
            drain(llm)
    assert_usable(llm)
    assert llm.step() == []
    llm.add_request(PROMPTS[0], PARAMS, "mine 0")
    done += drain(llm)
    assert [output.request_id for output in done] == ["early", "mine 0"]
    assert whole(done[1:]) == expected[:1]


@pytest.mark.parametrize(
    ("place", "name"), [(jnp, "zeros"), (jax, "block_until_ready")], ids=["at_once", "when_waited"]
)
def test_memory_that_cannot_be_had_back(llm, expected, monkeypatch, place, name):
    """The engine says so at each call, and works again as soon as there is memory."""
    with monkeypatch.context() as patch:
        patch.setattr(place, name, always(OUT_OF_MEMORY))
        with monkeypatch.context() as inner:
            refuse_to_run(llm, inner, 2)
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        for call in (llm.generate, lambda prompts: list(llm.stream(prompts)), lambda prompts: llm.add_request([1])):
            with pytest.raises(RuntimeError, match="its memory cannot be had back yet: RESOURCE_EXHAUSTED"):
                call(PROMPTS)
    assert_usable(llm)
    assert run(llm) == expected


def always(error):
    def failing(*args, **options):
        raise error

    return failing


def test_a_kernel_that_raises(llm, expected):
    """Really raised by the compiled program, on the device's side."""
    shape = next(iter(llm.runner.programs))
    kept = llm.runner.programs

    def kernel(array):
        raise ArithmeticError("a kernel went wrong")

    def broken(*args):
        output, cache, state = kept[shape_of[id(broken)]](*args)
        tokens = jax.jit(lambda x: jax.pure_callback(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), x))(output.tokens)
        return output._replace(tokens=tokens), cache, state

    shape_of = {id(broken): max(kept, key=lambda s: s.prefill_rows)}
    assert shape in kept
    try:
        llm.runner.programs = dict.fromkeys(kept, broken)
        with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel went wrong"):
            llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
    finally:
        llm.runner.programs = kept
    assert_usable(llm)
    assert run(llm) == expected


def test_the_other_engine_of_the_process_goes_on(llm, directory, expected, monkeypatch):
    other = small_llm(directory, num_kvcache_blocks=12)
    ids = [other.add_request(prompt, PARAMS) for prompt in PROMPTS]
    done = {output.request_id: output for _ in range(2) for output in other.step()}
    with monkeypatch.context() as patch:
        refuse_to_run(llm, patch, 2)
        with pytest.raises(jax.errors.JaxRuntimeError):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    done |= {output.request_id: output for output in drain(other)}
    assert whole(done[request_id] for request_id in ids) == expected
    assert run(llm) == expected


# --- a tokenizer that throws ---


class Panic(BaseException):
    """What the tokenizers library raises where Rust panics: no Exception."""


class Tokenizer:
    """A good one, but for one call of `decode`."""

    def __init__(self, tokenizer, call, error):
        self.backend_tokenizer = SimpleNamespace(decode=nth(call, tokenizer.backend_tokenizer.decode, error))
        self.encode, self.eos_token_id = tokenizer.encode, tokenizer.eos_token_id


@pytest.mark.parametrize("error", [Panic("rust"), ValueError("no such token")])
@pytest.mark.parametrize("call", [1, 20])
def test_a_tokenizer_that_throws_in_decode(llm, expected, monkeypatch, error, call):
    for use in (lambda: llm.generate(PROMPTS, PARAMS, use_tqdm=False), lambda: list(llm.stream(PROMPTS, PARAMS))):
        with monkeypatch.context() as patch:
            patch.setattr(llm, "door", replace(llm.door, tokenizer=Tokenizer(llm.tokenizer, call, error)))
            with pytest.raises(type(error)) as caught:
                use()
        assert caught.value is error
        assert_usable(llm)
    assert run(llm) == expected


@pytest.mark.parametrize("error", [Panic("rust"), ValueError("no such character")])
def test_a_tokenizer_that_throws_in_encode(llm, expected, monkeypatch, error):
    """At the door: requests under way do not notice."""
    ids = [llm.add_request(prompt, PARAMS) for prompt in PROMPTS]
    done = {output.request_id: output for _ in range(2) for output in llm.step()}
    with monkeypatch.context() as patch:
        patch.setattr(type(llm.tokenizer), "encode", always(error))
        with pytest.raises(ValueError, match=r"rust|no such character"):
            llm.add_request("a text", PARAMS)
    done |= {output.request_id: output for output in drain(llm)}
    assert whole(done[request_id] for request_id in ids) == expected


# --- Ctrl-C ---

OWN = os.path.dirname(sys.modules[LLM.__module__].__file__)


class Interrupt:
    """Raises KeyboardInterrupt at one of the lines that the package runs meanwhile."""

    left_out = "_give_up", "abort_all", "reset"

    def __init__(self, at):
        self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(OWN) or frame.f_code.co_name in self.left_out:
            return None
        if frame.f_code.co_filename.endswith("one_thread.py"):  # between whose lines Python takes no signal
            return None
        self.count += 1
        if self.count == self.at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.trace


def num_lines(llm):
    llm.scheduler.block_manager.reset_prefix_cache()
    with Interrupt(-1) as lines:
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return lines.count


def interrupt_everywhere(llm, expected, number):
    """At so many of the lines of generate, evenly."""
    interrupted = 0
    for at in np.linspace(1, num_lines(llm), number, dtype=int).tolist():
        llm.scheduler.block_manager.reset_prefix_cache()
        try:
            with Interrupt(at):
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        except KeyboardInterrupt:
            interrupted += 1
        assert drain(llm) == []  # a step may be in flight
        assert_usable(llm)
        if interrupted % 10 == 0:
            assert run(llm) == expected, at
    return interrupted


def test_ctrl_c_anywhere(llm, expected):
    assert interrupt_everywhere(llm, expected, 60) > 50


@pytest.mark.slow
def test_ctrl_c_nearly_everywhere(llm, expected):
    interrupt_everywhere(llm, expected, 2000)


def test_ctrl_c_in_add_and_abort(llm, expected):
    """Whatever line it comes at, no sequence is left that no request knows."""
    for use in (llm.add_request, lambda *_: llm.abort_request("mine")):
        for at in range(1, 2000, 4):
            llm.add_request(PROMPTS[1], PARAMS, "mine")
            llm.step()
            try:
                with Interrupt(at):
                    use(PROMPTS[0], PARAMS, "another")
                break  # all lines are done
            except KeyboardInterrupt:
                for request_id in list(llm._requests):
                    llm.abort_request(request_id)
                llm.step()
                assert_usable(llm)
        else:
            raise AssertionError("the end was never reached")
        for request_id in list(llm._requests):
            llm.abort_request(request_id)
    llm.step()
    assert run(llm) == expected


def test_ctrl_c_in_update_weights(llm, expected):
    """Requests go on with the new weights or are aborted, and the engine is for other threads too."""
    for at in range(1, 5000, 9):
        for prompt in PROMPTS:
            llm.add_request(prompt, PARAMS)
        done = {output.request_id for _ in range(3) for output in llm.step()}
        try:
            with Interrupt(at):
                llm.update_weights(llm.model, "recompute")
            break  # all lines are done
        except KeyboardInterrupt:
            for _ in range(400):
                done |= {output.request_id for output in llm.step()}
                if not llm.has_unfinished_requests():
                    break
            assert_usable(llm)
        if not llm.runner.weights.is_whole:
            llm.update_weights(llm.model)
    else:
        raise AssertionError("the end was never reached")
    drain(llm)
    assert run(llm) == expected
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, llm).result() == expected


def test_ctrl_c_in_stream(llm, expected):
    for at in range(1, 3000, 29):
        stream = llm.stream(PROMPTS, PARAMS)
        try:
            with Interrupt(at):
                next(stream)
            break
        except KeyboardInterrupt:
            stream.close()
            drain(llm)
            assert_usable(llm)
    stream.close()
    drain(llm)
    assert run(llm) == expected


def test_a_progress_bar_that_cannot_write(llm, expected, monkeypatch):
    """As where its pipe's other end has been closed."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with pytest.raises(BrokenPipeError):
        llm.generate(PROMPTS, PARAMS)
    drain(llm)
    assert run(llm) == expected


class SecondInterrupt(Interrupt):
    """Called, raises KeyboardInterrupt, and once more at one of the lines that the package runs after it."""

    left_out = ()

    def __call__(self, *args, **options):
        frame = sys._getframe(1)
        while frame:  # those that are at work are not traced unless told
            if frame.f_code.co_filename.startswith(OWN):
                frame.f_trace = self.trace
            frame = frame.f_back
        sys.settrace(self.trace)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["dispatch", "bar"])
def test_a_second_ctrl_c_anywhere(llm, expected, monkeypatch, name):
    """At any line after the first, while requests are ended: what is left of that is done by the next call."""
    params = [replace(PARAMS, max_tokens=number) for number in (2, 4, 5)]
    for at in range(1, 1000):
        second = SecondInterrupt(at)

        class Bar(tqdm):
            update = second

        with monkeypatch.context() as patch:
            if name == "dispatch":  # the program has run, and its cache was donated to it
                programs = {shape: of_two(program, second) for shape, program in llm.runner.programs.items()}
                patch.setattr(llm.runner, "programs", programs)
            try:
                llm.generate(PROMPTS[:3], params, use_tqdm=Bar if name == "bar" else False)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
        assert len(llm.generate(PROMPTS[1], params[0], use_tqdm=False)) == 1
        assert_usable(llm)
        if second.count < at:  # it ended before
            assert run(llm) == expected
            return
    raise AssertionError("the end was never reached")


def of_two(first, then):
    def call(*args):
        first(*args)
        then()

    return call


@pytest.mark.parametrize("name", ["abort_all", "reset"])
def test_a_second_ctrl_c(llm, expected, monkeypatch, name):
    """While the first is still being cleared away: that is done by the next call."""
    owner = llm.scheduler if name == "abort_all" else llm.runner
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, nth(1, getattr(owner, name), KeyboardInterrupt()))
        patch.setattr(llm.runner, "collect", nth(2, llm.runner.collect, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert run(llm) == expected


# --- processes ---


def test_a_fork(llm, directory, expected):
    """The child is told, and does not wait forever; the parent does not notice."""
    ids = [llm.add_request(prompt, PARAMS) for prompt in PROMPTS]
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and Python, which warn of just this
        child = os.fork()
    if child == 0:
        try:
            said = []
            uses = llm.step, lambda: llm.add_request([1]), lambda: llm.stream([1, 2]), lambda: llm.generate([1])
            for use in (*uses, lambda: small_llm(directory)):
                try:
                    use()
                except RuntimeError as error:
                    said.append(str(error))
            os.write(write, "\n".join(said).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read().split("\n")
    os.waitpid(child, 0)
    assert sum(f"this process {child} was forked from it, which JAX does not survive. " in line for line in said) == 4
    assert f"this process {child} was forked from it, which JAX does not survive: it would wait forever" in said[-1]
    done = {output.request_id: output for output in drain(llm)}
    assert whole(done[request_id] for request_id in ids) == expected


CACHE = """
import sys, warnings
from nanovllm_jax import LLM, SamplingParams
options = dict(max_num_seqs=1, max_num_batched_tokens=16, block_size=16, max_model_len=32)
llm = LLM(sys.argv[1], compilation_cache_dir=sys.argv[2], **options)
print(llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)[0]["token_ids"])
"""


def start_with_cache(directory, cache, before=""):
    """A process of its own: (tokens, what it said)."""
    done = subprocess.run(
        [sys.executable, "-c", before + CACHE, str(directory), str(cache)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_compile_cache_that_cannot_be_written(directory, tmp_path):
    """No directory, a disk that is full, and what a full disk left: a warning, and the engine runs."""
    (tmp_path / "file").touch()
    tokens, said = start_with_cache(directory, tmp_path / "file" / "cache")
    assert "NotADirectoryError" in said
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
    tokens_with_full_disk, said = start_with_cache(directory, tmp_path / "cache", full)
    assert "Error writing persistent compilation cache entry" in said
    tokens_with_rest, _ = start_with_cache(directory, tmp_path / "cache")
    assert tokens == tokens_with_full_disk == tokens_with_rest


# --- a consumer that stops reading ---


def test_a_consumer_that_stops_reading_a_stream(llm, expected):
    """Nothing runs and nothing piles up meanwhile; the others are told who is in the way; dropping it frees all."""
    stream = llm.stream(PROMPTS, PARAMS)
    next(stream)
    blocks = llm.scheduler.block_manager.num_used_blocks
    assert blocks > 0
    with pytest.raises(RuntimeError, match=r"generate\(\) was called while a stream\(\) is open"):
        llm.generate(PROMPTS, PARAMS)
    assert llm.scheduler.block_manager.num_used_blocks == blocks
    del stream
    assert_idle(llm)
    assert drain(llm) == []
    assert run(llm) == expected
