"""What a user may get wrong is refused at the door: the exception names the value and the way out."""

import json
from collections import UserDict

import numpy as np
import pytest
from small_model import assert_idle, small_llm, write_checkpoint

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.chat import chat_prompt
from nanovllm_jax.engine.prompts import check_params
from nanovllm_jax.machine import host_memory

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bad_input") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    return small_llm(directory)


@pytest.fixture(scope="module")
def expected(llm):
    """What a good prompt gives."""
    return llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0]["token_ids"]


# --- prompts ---

BAD_PROMPTS = {
    "empty text": ("", ValueError, "the prompt '' has no tokens; give at least one"),
    "no tokens": ([], ValueError, r"the prompt \[\] has no tokens"),
    "no tokens in a dict": ({"prompt_token_ids": []}, ValueError, "has no tokens"),
    "longer than the engine takes": (
        [1] * 128,
        ValueError,
        "has 128 tokens.*max_model_len=128. Shorten it, or raise max",
    ),
    "much longer": ([1] * 5000, ValueError, "has 5000 tokens"),
    "text too long": ("7" * 128, ValueError, "has 128 tokens"),
    "negative token": ([5, -1], ValueError, "token id -1 is not in the vocabulary: 0 to 511"),
    "token beyond the vocabulary": ([5, 512, 600], ValueError, "token id 512 is not in the vocabulary: 0 to 511"),
    "huge token": ([2**70], ValueError, f"token id {2**70} is not in the vocabulary"),
    "fraction": ([1, 2.0], TypeError, "token ids must be integers, not 2.0"),
    "nan": ([1, float("nan")], TypeError, "token ids must be integers, not nan"),
    "text among tokens": ([1, "2"], TypeError, "token ids must be integers, not '2'"),
    "bool": ([1, True], TypeError, "token ids must be integers, not True"),
    "none among tokens": ([1, None], TypeError, "token ids must be integers, not None"),
    "nested": ([[1, 2], [3]], TypeError, r"token ids must be integers, not \[1, 2\]"),
    "array of fractions": (np.array([1.0, 2.0]), TypeError, "token ids must be integers, not 1.0"),
    "array of bools": (np.array([True]), TypeError, "token ids must be integers, not True"),
    "array of negatives": (np.array([3, -7]), ValueError, "token id -7"),
    "none": (None, TypeError, "a prompt is a string, a list of token ids or .* not None"),
    "number": (7.5, TypeError, "a prompt is a string, .*, not 7.5"),
    "bytes": (b"text", TypeError, "a prompt is a string, .*, not b'text'"),
    "set": ({1, 2}, TypeError, "a prompt is a string, .*not {1, 2}"),
    "half a surrogate pair": ("a\ud800", ValueError, r"'a\\ud800' is not valid Unicode text"),
    "unknown key": ({"text": "a"}, ValueError, r"has the key 'prompt_token_ids' or 'prompt', not \['text'\]"),
    "one more key": ({"prompt": "a", "cache_salt": "b"}, ValueError, r"'prompt', not \['cache_salt'\]"),
    "empty dict": ({}, ValueError, r"has the key 'prompt_token_ids' or 'prompt', not \[\]"),
    "keys of several kinds": ({1: 2, "a": 3}, ValueError, r"not \[1, 'a'\]"),
    "text as token ids": ({"prompt_token_ids": "a"}, TypeError, "not {'prompt_token_ids': 'a'}"),
    "token ids as text": ({"prompt": [1, 2]}, TypeError, r"not {'prompt': \[1, 2\]}"),
    "dict in a dict": ({"prompt": {"prompt": "a"}}, TypeError, "not {'prompt': {'prompt': 'a'}}"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompt(llm, expected, case):
    """Alone and among good ones."""
    prompt, error, message = BAD_PROMPTS[case]
    with pytest.raises(error, match=message):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    with pytest.raises(error, match=message) as caught:
        llm.generate([[1, 2, 3], "good", prompt, [4]], GREEDY, use_tqdm=False)
    assert caught.value.__notes__ == ["This is prompt 2 of 4, counted from 0; none was started."]
    assert_idle(llm)
    assert llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0]["token_ids"] == expected


class Panic(BaseException):
    """As pyo3's PanicException."""


@pytest.mark.parametrize("failure", [Panic("index out of bounds"), Exception("cannot encode"), MemoryError("too long")])
def test_a_tokenizer_that_fails(llm, expected, monkeypatch, failure):
    """Only on this prompt, and only for this request."""
    encode = llm.tokenizer.encode

    def fails(text, **options):
        if "evil" in text:
            raise failure
        return encode(text, **options)

    monkeypatch.setattr(llm.tokenizer, "encode", fails)
    llm.add_request([1, 2, 3], GREEDY)
    with pytest.raises(ValueError, match=f"the tokenizer fails on the prompt: {failure}"):
        llm.add_request("evil", GREEDY)
    with pytest.raises(ValueError, match="the tokenizer fails"):
        chat_prompt(llm.tokenizer, [{"role": "user", "content": "evil"}])
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert [output["token_ids"] for output in outputs] == [expected]
    with pytest.raises(ValueError, match="the tokenizer fails") as caught:
        llm.generate(["good", "evil"], GREEDY, use_tqdm=False)
    assert caught.value.__notes__ == ["This is prompt 1 of 2, counted from 0; none was started."]


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_a_tokenizer_that_is_interrupted(llm, monkeypatch, signal):
    def interrupted(*_, **__):
        raise signal

    monkeypatch.setattr(llm.tokenizer, "encode", interrupted)
    with pytest.raises(signal):
        llm.generate("text", GREEDY)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (None, TypeError, "prompts must be a string, a dict, token ids or a list of those, not None"),
        (5, TypeError, "prompts must be .* not 5"),
        ({"a", "b"}, TypeError, "prompts must be"),
        ([1, 2.5], TypeError, "token ids must be integers, not 2.5"),
        ([1, [2]], TypeError, r"token ids must be integers, not \[2\]"),
        ([True, False], TypeError, "token ids must be integers, not True"),
        (np.array(3), TypeError, "prompts must be"),
        (UserDict(input_ids=[1]), ValueError, r"a prompt dict has the key .* not \['input_ids'\]"),  # a tokenizer's
        (np.array([[1, 600]]), ValueError, "token id 600"),
    ],
)
def test_bad_prompts(llm, prompts, error, message):
    with pytest.raises(error, match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([GREEDY], ValueError, "2 prompts need one SamplingParams or 2, not 1"),
        ([GREEDY] * 3, ValueError, "2 prompts need one SamplingParams or 2, not 3"),
        ([], ValueError, "2 prompts need one SamplingParams or 2, not 0"),
        ({"temperature": 0}, TypeError, "sampling_params must be a SamplingParams, not {'temperature': 0}"),
        ([GREEDY, 0.5], TypeError, "sampling_params must be a SamplingParams, not 0.5"),
        (SamplingParams, TypeError, "sampling_params must be a SamplingParams, not <class"),
    ],
)
def test_bad_sampling_params(llm, params, error, message):
    with pytest.raises(error, match=message):
        llm.generate([[1], [2]], params, use_tqdm=False)
    assert_idle(llm)


def test_bad_request_ids(llm):
    llm.add_request([1], GREEDY, "mine")
    with pytest.raises(ValueError, match="request_id 'mine' is in use by a request that has not finished"):
        llm.add_request([1], GREEDY, "mine")
    with pytest.raises(TypeError, match="request_id must be a string or None, not 7"):
        llm.add_request([1], GREEDY, 7)
    llm.abort_request("mine")
    llm.abort_request("mine")
    llm.abort_request("unknown")
    assert_idle(llm)


def test_the_longest_prompt_that_fits(llm):
    output = llm.generate([1] * 127, GREEDY, use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_text_without_a_tokenizer(directory, tmp_path):
    write_checkpoint(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    llm = small_llm(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer: give the prompt as a list of token ids"):
        llm.generate("text")
    output = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0]
    assert (len(output["token_ids"]), output["text"], output.prompt) == (4, "", None)


# --- options ---

TOO_MANY_BLOCKS = host_memory() // (16 * 2 * 2 * 4 * 16 * 4) + 1  # block, k and v, layers, kv heads, head_dim, bytes

BAD_OPTIONS = {
    "unknown": (dict(max_model_length=64), TypeError, "no option 'max_model_length'; did you mean 'max_model_len'"),
    "longer than the model": (
        dict(max_model_len=513),
        ValueError,
        r"max_model_len=513 is more than the model's 512 \(max_position_embeddings\)",
    ),
    "longer than the pool": (
        dict(num_kvcache_blocks=7),
        ValueError,
        "max_model_len=128 does not fit in the KV cache of 112 tokens; lower it to 112 or less, or enlarge the cache",
    ),
    "pool beyond memory": (
        dict(num_kvcache_blocks=TOO_MANY_BLOCKS),
        ValueError,
        f"num_kvcache_blocks={TOO_MANY_BLOCKS} .*more than this machine's .* GiB of memory",
    ),
    "more sequences than memory": (
        dict(max_num_seqs=host_memory() // 1000),
        ValueError,
        "a step takes .* GiB, more than this machine's .* GiB of memory: lower max_num_seqs or max_num_batched_tokens",
    ),
    "more steps than can be": (
        dict(num_scheduler_steps=2**31),
        ValueError,
        "num_scheduler_steps must be from 1 to 16777216",
    ),
    "more devices than there are": (
        dict(tensor_parallel_size=2),
        ValueError,
        "tensor_parallel_size=2 needs as many devices, but JAX sees 1",
    ),
    "contradiction": (dict(kvcache_block_size=32), TypeError, "block_size and kvcache_block_size are the same option"),
    "two values for model": (dict(model="x"), TypeError, "model"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(directory, case):
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        small_llm(directory, **options)


def test_a_prompt_longer_than_the_whole_pool(directory):
    """Without a max_model_len the pool is the limit."""
    llm = LLM(directory, block_size=16, num_kvcache_blocks=3, max_num_seqs=4, max_num_batched_tokens=64)
    assert llm.max_model_len == 48
    with pytest.raises(ValueError, match=r"has 48 tokens.*max_model_len=48"):
        llm.generate([1] * 48)
    assert_idle(llm)
    assert len(llm.generate([1] * 40, SamplingParams(ignore_eos=True), use_tqdm=False)[0]["token_ids"]) == 8


# --- directories: what the checkpoint's own tests refuse comes through LLM ---


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_DIRECTORIES = {
    "no config.json": (lambda d: (d / "config.json").unlink(), "is no checkpoint: it has no config.json"),
    "config.json no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "another architecture": (
        lambda d: change_config(d, architectures=["LlamaForCausalLM"], model_type="llama"),
        "this engine runs Qwen3ForCausalLM .*, not LlamaForCausalLM",
    ),
    "config of another size": (
        lambda d: change_config(d, hidden_size=64),
        r"has shape \(512, 48\), config.json asks for",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "weights cut off": (lambda d: (d / "model.safetensors").write_bytes(b"cut"), "model.safetensors is .*truncated"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer's files cannot be read"),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_bad_directory(tmp_path, case):
    spoil, message = BAD_DIRECTORIES[case]
    spoil(write_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=message):
        small_llm(tmp_path)


def test_no_model_at_all():
    with pytest.raises(ValueError, match="'Qwen3' is neither a directory nor a Hub id"):
        LLM("Qwen3")


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_tokens(name):
    params = SamplingParams(**{name: 17})
    check_params(params, 17, None, frozenset())
    with pytest.raises(ValueError, match=f"{name}=17 is more than the vocabulary's 16 tokens"):
        check_params(params, 16, None, frozenset())


def test_the_largest_seed(tmp_path):
    """Weights too are drawn from it."""
    small_llm(write_checkpoint(tmp_path), load_format="dummy", seed=2**64 - 1)
