"""SamplingParams: vLLM's defaults, what is refused and with which words, and what only the model can judge."""

import math
import pickle
from dataclasses import asdict, replace

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import assert_idle, small_llm, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.sampling_params import MAX_LOGPROBS

pytestmark = pytest.mark.usefixtures("programs_kept")


def test_vllms_defaults():
    assert asdict(SamplingParams()) == dict(
        temperature=1.0,
        max_tokens=16,
        ignore_eos=False,
        seed=None,
        n=1,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias=None,
        min_tokens=0,
        stop=(),
        stop_token_ids=(),
        include_stop_str_in_output=False,
        logprobs=None,
        prompt_logprobs=None,
        detokenize=True,
        skip_special_tokens=True,
    ) | dict(capture=False, steering=None)  # for a probe: this engine's own


TEMPERATURE = r"temperature must be 0 \(greedy\) or a positive number up to 3.4e\+38, not "
TOP_K = r"top_k must be at least 1, or 0 or -1 \(which are off\), and below 2\*\*31, not "

BAD_PARAMS = [
    (dict(temperature=-0.1), ValueError, TEMPERATURE + "-0.1"),
    (dict(temperature=math.nan), ValueError, TEMPERATURE + "nan"),
    (dict(temperature=math.inf), ValueError, TEMPERATURE + "inf"),
    (dict(temperature=10**400), ValueError, TEMPERATURE + "1000"),
    (dict(temperature="0.6"), TypeError, "temperature must be a number, not '0.6'"),
    (dict(temperature=None), TypeError, "temperature must be a number, not None"),
    (dict(temperature=True), TypeError, "temperature must be a number, not True"),
    (dict(temperature=1j), TypeError, "temperature must be a number, not 1j"),
    (dict(max_tokens=0), ValueError, "max_tokens must be at least 1, not 0"),
    (dict(max_tokens=-5), ValueError, "max_tokens must be at least 1, not -5"),
    (dict(max_tokens=16.0), TypeError, "max_tokens must be an integer or None, not 16.0"),
    (dict(max_tokens=True), TypeError, "max_tokens must be an integer or None, not True"),
    (dict(min_tokens=-1), ValueError, "min_tokens must be at least 0, not -1"),
    (dict(min_tokens=None), TypeError, "min_tokens must be an integer, not None"),
    (dict(min_tokens=17), ValueError, "min_tokens=17 must be at most max_tokens=16"),
    (dict(min_tokens=5, max_tokens=4), ValueError, "min_tokens=5 must be at most max_tokens=4"),
    (dict(seed=-2), ValueError, r"seed must be from 0 to 2\*\*63 - 1, or None or -1 .*, not -2"),
    (dict(seed=2**63), ValueError, f"not {2**63}"),
    (dict(seed=1.5), TypeError, "seed must be an integer or None, not 1.5"),
    (dict(seed=False), TypeError, "seed must be an integer or None, not False"),
    (dict(n=0), ValueError, "n must be from 1 to 16384, not 0"),
    (dict(n=16385), ValueError, "n must be from 1 to 16384, not 16385"),
    (dict(n=2.0), TypeError, "n must be an integer, not 2.0"),
    (dict(n=None), TypeError, "n must be an integer, not None"),
    (dict(n=3, temperature=0), ValueError, "n=3 with temperature=0 would be the same text 3 times"),
    (dict(top_k=-2), ValueError, TOP_K + "-2"),
    (dict(top_k=2**31), ValueError, TOP_K + str(2**31)),
    (dict(top_k=5.0), TypeError, "top_k must be an integer, not 5.0"),
    (dict(top_k=None), TypeError, "top_k must be an integer, not None"),
    (dict(top_p=0), ValueError, r"top_p must be above 0 and at most 1 \(which is off\), not 0"),
    (dict(top_p=1.0001), ValueError, "top_p must be .*, not 1.0001"),
    (dict(top_p=math.nan), ValueError, "top_p must be .*, not nan"),
    (dict(top_p="1"), TypeError, "top_p must be a number, not '1'"),
    (dict(min_p=-0.1), ValueError, r"min_p must be from 0 \(which is off\) to 1, not -0.1"),
    (dict(min_p=1.1), ValueError, "min_p must be .* not 1.1"),
    (dict(min_p=math.nan), ValueError, "min_p must be .* not nan"),
    (dict(presence_penalty=2.1), ValueError, "presence_penalty must be from -2 to 2, not 2.1"),
    (dict(presence_penalty=math.nan), ValueError, "presence_penalty must be from -2 to 2, not nan"),
    (dict(frequency_penalty=-2.1), ValueError, "frequency_penalty must be from -2 to 2, not -2.1"),
    (dict(frequency_penalty=[1]), TypeError, r"frequency_penalty must be a number, not \[1\]"),
    (dict(repetition_penalty=0), ValueError, "repetition_penalty must be above 0: .*, not 0"),
    (dict(repetition_penalty=-1), ValueError, "repetition_penalty must be above 0: .*, not -1"),
    (dict(repetition_penalty=math.nan), ValueError, "repetition_penalty must be above 0: .*, not nan"),
    (dict(repetition_penalty=math.inf), ValueError, "repetition_penalty must be above 0: .*, not inf"),
    (dict(logprobs=MAX_LOGPROBS + 1), ValueError, "logprobs must be from 0 to 20, not 21"),
    (dict(logprobs=-1), ValueError, "logprobs must be from 0 to 20, not -1"),
    (dict(logprobs=True), TypeError, "logprobs must be an integer or None, not True"),
    (dict(prompt_logprobs=21), ValueError, "prompt_logprobs must be from 0 to 20, not 21"),
    (dict(prompt_logprobs="3"), TypeError, "prompt_logprobs must be an integer or None, not '3'"),
    (dict(stop=""), ValueError, r"stop must not hold an empty string, which is everywhere: \[''\]"),
    (dict(stop=["", ""]), ValueError, "stop must not hold an empty string"),
    (dict(stop=["a", ""]), ValueError, "stop must not hold an empty string"),
    (dict(stop=b"a"), TypeError, "stop must be a string, a list of strings or None, not b'a'"),
    (dict(stop=["a", 7]), TypeError, r"stop must be a string, a list of strings or None, not \['a', 7\]"),
    (dict(stop=7), TypeError, "stop must be a string, a list of strings or None, not 7"),
    (dict(stop="a", detokenize=False), ValueError, r"stop=\['a'\] is looked for in the text: it needs detokenize=True"),
    (dict(stop_token_ids=5), TypeError, "stop_token_ids must be a list of token ids or None, not 5"),
    (dict(stop_token_ids="5"), TypeError, "stop_token_ids must be a list of token ids or None, not '5'"),
    (dict(stop_token_ids=np.array(5)), TypeError, r"stop_token_ids must be a list .*, not array\(5\)"),
    (dict(stop_token_ids={5: 1}), TypeError, "stop_token_ids must be a list of token ids or None, not {5: 1}"),
    (dict(stop_token_ids=[1, 2.0]), TypeError, "stop_token_ids must be integers, not 2.0"),
    (dict(stop_token_ids=[True]), TypeError, "stop_token_ids must be integers, not True"),
    (dict(logit_bias=[1, 2]), TypeError, r"logit_bias must be a dict from token id to number, or None, not \[1, 2\]"),
    (dict(logit_bias={"5": 1}), TypeError, r"logit_bias must have token ids \(integers\) as keys, not '5'"),
    (dict(logit_bias={5: "1"}), TypeError, r"logit_bias\[5\] must be a number, not '1'"),
    (dict(logit_bias={5: math.nan}), ValueError, r"logit_bias\[5\] must be a number, not nan"),
    (dict(ignore_eos=1), TypeError, "ignore_eos must be True or False, not 1"),
    (dict(include_stop_str_in_output=None), TypeError, "include_stop_str_in_output must be True or False, not None"),
    (dict(detokenize="no"), TypeError, "detokenize must be True or False, not 'no'"),
    (dict(skip_special_tokens=0), TypeError, "skip_special_tokens must be True or False, not 0"),
    (dict(best_of=2), TypeError, "best_of"),
]


@pytest.mark.parametrize(("params", "error", "message"), BAD_PARAMS)
def test_bad_sampling_params(params, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**params)


GOOD_PARAMS = [  # as given, as kept
    (dict(max_tokens=None), dict(max_tokens=None)),
    (dict(max_tokens=None, min_tokens=10**9), dict(min_tokens=10**9)),
    (dict(min_tokens=4, max_tokens=4), dict(min_tokens=4)),
    (dict(temperature=1e-9), dict(temperature=0.01)),
    (dict(temperature=0), dict(temperature=0)),
    (dict(temperature=0.01), dict(temperature=0.01)),
    (dict(temperature=5), dict(temperature=5.0)),
    (dict(seed=-1), dict(seed=None)),
    (dict(top_k=-1), dict(top_k=0)),
    (dict(top_k=10**6), dict(top_k=10**6)),
    (dict(top_p=1e-9, min_p=1), dict(top_p=1e-9, min_p=1.0)),
    (dict(stop="ab"), dict(stop=("ab",))),
    (dict(stop=["b", "a"]), dict(stop=("b", "a"))),
    (dict(stop=[]), dict(stop=())),
    (dict(stop_token_ids=[3, 1]), dict(stop_token_ids=(3, 1))),
    (dict(stop_token_ids=np.array([3, 1])), dict(stop_token_ids=(3, 1))),
    (dict(stop_token_ids={3}), dict(stop_token_ids=(3,))),
    (dict(logit_bias={1: 1000, 2: -math.inf, 3: 2}), dict(logit_bias={1: 100.0, 2: -100.0, 3: 2.0})),
    (dict(logit_bias={1: 10**400, 2: -(10**400)}), dict(logit_bias={1: 100.0, 2: -100.0})),
    (dict(logit_bias={}), dict(logit_bias={})),
    (dict(logprobs=0, prompt_logprobs=20), dict(logprobs=0, prompt_logprobs=20)),
    (dict(stop=[], detokenize=False), dict(detokenize=False)),
]


@pytest.mark.parametrize(("given", "kept"), GOOD_PARAMS)
def test_good_sampling_params(given, kept):
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in kept} == kept
    assert replace(params) == pickle.loads(pickle.dumps(params)) == params
    hash(params)


def test_numpys_numbers_become_pythons():
    given = SamplingParams(
        temperature=np.float32(0.5), max_tokens=np.int64(7), seed=np.uint8(3), logit_bias={np.int32(4): np.float16(2)}
    )
    assert given == SamplingParams(temperature=0.5, max_tokens=7, seed=3, logit_bias={4: 2.0})
    (bias,) = given.logit_bias.items()
    kinds = [type(value) for value in (given.temperature, given.max_tokens, given.seed, *bias)]
    assert kinds == [float, int, int, int, float]


def test_arrays_of_jax_become_pythons_numbers():
    ids, numbers = jnp.array([1, 2]), jnp.array([1.0, 2.0])
    given = SamplingParams(temperature=jnp.float32(0.5), top_k=jnp.int32(3), stop_token_ids=ids, steering=numbers)
    assert given == SamplingParams(temperature=0.5, top_k=3, stop_token_ids=[1, 2], steering=[1.0, 2.0])
    assert SamplingParams(steering=jnp.float32(2)) == SamplingParams(steering=2.0)
    kinds = [type(value) for value in (given.temperature, given.top_k, *given.stop_token_ids, *given.steering)]
    assert kinds == [float, int, int, int, float, float]
    with pytest.raises(TypeError, match=r"temperature must be a number, not \[0.5\]"):
        SamplingParams(temperature=jnp.array([0.5]))


def test_the_caller_may_change_what_it_gave():
    stop, ids, bias = ["a"], [1], {1: 2.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b")
    ids.append(2)
    bias[2] = 3.0
    assert params == SamplingParams(stop="a", stop_token_ids=[1], logit_bias={1: 2.0})


# --- what only the model can judge ---


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("params") / "model"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(stop_token_ids=[1, 512]), "stop_token_ids: token id 512 is not in the vocabulary: 0 to 511"),
        (dict(stop_token_ids=[-1]), "stop_token_ids: token id -1 is not in the vocabulary: 0 to 511"),
        (dict(logit_bias={512: 1}), "logit_bias: token id 512 is not in the vocabulary: 0 to 511"),
        (dict(logit_bias={2**70: 1}), f"logit_bias: token id {2**70} is not in the vocabulary"),
        (dict(stop_token_ids=range(512), min_tokens=1), "min_tokens=1 puts off .* which are the whole vocabulary"),
        (dict(stop_token_ids=range(511), min_tokens=2), "min_tokens=2 puts off"),  # 511 is the model's own end
    ],
)
def test_params_that_the_model_cannot_follow(llm, params, message):
    with pytest.raises(ValueError, match=message) as caught:
        llm.generate([[1], [2]], [SamplingParams(), SamplingParams(**params)], use_tqdm=False)
    assert caught.value.__notes__ == ["This is prompt 1 of 2, counted from 0; none was started."]
    assert_idle(llm)


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        (dict(stop_token_ids=range(512)), 1),
        (dict(stop_token_ids=range(1, 512), min_tokens=4, ignore_eos=True), 5),
        (dict(logit_bias=dict.fromkeys(range(512), -math.inf)), 6),  # moved to -100 each: a shift
        (dict(logit_bias=dict.fromkeys(range(512), math.inf), repetition_penalty=1e6, presence_penalty=2), 6),
        (dict(logit_bias=dict.fromkeys(range(1, 512), -100), min_p=1, top_k=1, top_p=1e-9), 6),
    ],
)
def test_what_leaves_little_or_weighs_all_alike(llm, params, tokens):
    """There is always a token to draw."""
    params = SamplingParams(**(dict(temperature=1, max_tokens=6, seed=5, ignore_eos=True) | params))
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len(output["token_ids"]) == tokens
    assert output.outputs[0].finish_reason in ("stop", "length")
    if list((params.logit_bias or {}).values()) == [-100.0] * 512:
        plain = llm.generate([[1, 2, 3]], replace(params, logit_bias=None), use_tqdm=False)
        assert plain[0]["token_ids"] == output["token_ids"]


def test_stop_strings_need_a_tokenizer(llm, monkeypatch):
    monkeypatch.setattr(llm, "door", replace(llm.door, tokenizer=None))
    with pytest.raises(ValueError, match=r"stop=\['a'\] needs a tokenizer, which the checkpoint lacks"):
        llm.generate([1], SamplingParams(stop="a"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.stream([1], SamplingParams(stop="a"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.add_request([1], SamplingParams(stop="a"))
    assert_idle(llm)
