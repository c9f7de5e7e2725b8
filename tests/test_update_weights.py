"""Weights swapped in a running engine: what is shared, what is computed again, and what is refused."""

import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import SMALL, assert_idle, join, random_tensors, small_llm, whole, write_checkpoint
from test_model_runner import compiles

from nanovllm_jax import SamplingParams
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.engine import weights
from nanovllm_jax.models.parameters import checked_weights, parameter_targets, parameters_of, set_parameters
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("programs_kept")

PROMPTS = [[5, 6, 7], list(range(40)), [9] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Two checkpoints of one shape."""
    made = tmp_path_factory.mktemp("weights")
    return [write_checkpoint(made / str(seed), tensors=random_tensors(SMALL, seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def models(directories):
    return [load_model(path, SMALL, dtype=np.dtype("float32"), mesh=make_mesh(1)) for path in directories]


@pytest.fixture(scope="module")
def expected(directories):
    """expected(i, prompt, max_tokens): what checkpoint i says, by engines whose weights never change."""
    engines = [small_llm(directory) for directory in directories]

    def tokens(i, prompt, max_tokens=20):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return engines[i].generate([prompt], params, use_tqdm=False)[0]["token_ids"]

    return tokens


@pytest.fixture(scope="module")
def engine(directories):
    return small_llm(directories[0])


@pytest.fixture
def llm(engine, models):
    """An engine with the first checkpoint's weights and nothing in its cache."""
    engine.update_weights(models[0])
    yield engine
    assert_idle(engine)


def arrays_of(model):
    return {path: param[...] for path, param in parameters_of(model).items()}


def run(llm, prompts=PROMPTS):
    return [output["token_ids"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_the_new_weights_count_and_nothing_compiles(llm, models, expected):
    assert run(llm) == [expected(0, prompt) for prompt in PROMPTS]
    with compiles() as seen:
        llm.update_weights(models[1])
        assert run(llm) == [expected(1, prompt) for prompt in PROMPTS]
        llm.update_weights(arrays_of(models[0]))
        assert run(llm) == [expected(0, prompt) for prompt in PROMPTS]
    assert seen == []
    assert run(llm) != [expected(1, prompt) for prompt in PROMPTS], "the two checkpoints say the same"


def test_cached_prefixes_are_dropped(llm, models):
    cached = []
    for _ in range(2):
        outputs = llm.generate([PROMPTS[1], PROMPTS[1]], GREEDY, use_tqdm=False)
        cached += [output.num_cached_tokens for output in outputs]
        llm.update_weights(models[1])
    assert cached == [0, 32, 0, 32]


def pointers(arrays):
    return [array.unsafe_buffer_pointer() for array in arrays]


def test_arrays_are_shared(llm, models):
    """Of the engine's own dtype: no second copy. The caller may give his up, and the engine keeps them."""
    model = jax.tree.map(jnp.copy, models[1])
    given = pointers(arrays_of(model).values())
    llm.update_weights(model)
    assert pointers(llm.runner.weights.leaves) == given
    before = run(llm)
    del model
    assert run(llm) == before


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_numpy_arrays_are_copied(llm, models, expected, dtype):
    arrays = {path: np.array(array, dtype) for path, array in arrays_of(models[1]).items()}
    llm.update_weights(arrays)
    for array in arrays.values():
        array[...] = np.nan
    assert run(llm) == [expected(1, prompt) for prompt in PROMPTS]


def test_old_arrays_go_one_by_one(directories, models, monkeypatch):
    """What programs take for them keeps none of the large ones."""
    llm = small_llm(directories[0], dtype="bfloat16", max_num_seqs=1)
    old = [weakref.ref(leaf) for leaf in llm.runner.weights.leaves if leaf.ndim > 1]
    left, cast = [], weights._cast

    def counted(*args):
        left.append(sum(leaf() is not None for leaf in old))
        return cast(*args)

    monkeypatch.setattr(weights, "_cast", counted)
    llm.update_weights(models[1])
    assert {*left} == {*range(len(old) + 1)}
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("donate", [False, True])
def test_other_dtypes_are_cast_on_the_device(directories, models, donate):
    """Master weights of float32 for an engine of bfloat16; donated, they are given up."""
    llm = small_llm(directories[0], dtype="bfloat16", max_num_seqs=1)
    arrays = {path: jnp.copy(array) for path, array in arrays_of(models[1]).items()}
    wanted = [np.asarray(array.astype(jnp.bfloat16)) for array in arrays.values()]
    llm.update_weights(arrays, donate=donate)
    for leaf, array, want in zip(llm.runner.weights.leaves, arrays.values(), wanted, strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf), want)
        assert array.is_deleted() == donate
    with compiles() as seen:
        llm.update_weights(models[0])
        run(llm)
    assert seen == []


# --- with requests under way ---


def start(llm, steps, **options):
    for prompt in PROMPTS:
        llm.add_request(prompt, GREEDY, **options)
    return [output for _ in range(steps) for output in llm.step()]


def drain(llm):
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    return outputs


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_unfinished_requests_need_a_word(llm, models, expected, steps):
    start(llm, steps)
    with pytest.raises(RuntimeError, match=r"3 requests are unfinished: .*in_flight='finish'.*in_flight='recompute'"):
        llm.update_weights(models[1])
    outputs = sorted(drain(llm), key=lambda output: int(output.request_id))
    assert [output["token_ids"] for output in outputs] == [expected(0, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("stream", [False, True])
def test_finish(llm, models, expected, stream):
    """They end on the old weights, later ones run on the new, and no output is lost."""
    outputs = start(llm, 7, stream=stream)
    llm.update_weights(models[1], in_flight="finish")
    assert llm.has_unfinished_requests()
    with pytest.raises(RuntimeError, match=r"generate\(\) needs the engine for itself"):
        run(llm)
    llm.add_request(PROMPTS[0], GREEDY, stream=stream)
    outputs += drain(llm)
    found = [text for [(_, text, _)] in (join(outputs) if stream else sorted_whole(outputs))]
    assert found == [*(expected(0, prompt) for prompt in PROMPTS), expected(1, PROMPTS[0])]


def sorted_whole(outputs):
    return whole(sorted(outputs, key=lambda output: int(output.request_id)))


def test_finish_within_a_stream(llm, models, expected):
    stream = llm.stream(PROMPTS, GREEDY)
    outputs = [next(stream) for _ in range(4)]
    llm.update_weights(models[1], in_flight="finish")
    outputs += stream
    assert [text for [(_, text, _)] in join(outputs)] == [expected(0, prompt) for prompt in PROMPTS]
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    llm.update_weights(models[0], in_flight="finish")
    stream.close()  # what was ready goes with it
    assert not llm._ready
    assert run(llm) == [expected(0, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
def test_recompute(llm, models, expected, steps):
    """Tokens stay, and each request goes on from them as the new weights alone would."""
    outputs = start(llm, steps)
    sequences = [request.completions[0].seq for request in llm._requests.values()]
    llm.update_weights(models[1], in_flight="recompute")
    kept = [len(seq.token_ids) + seq.num_pending for seq in sequences]  # those of the step in flight are read later
    outputs += drain(llm)
    assert max(kept) > 40 or steps < 3
    assert len(outputs) == len(PROMPTS)
    for prompt, seq, count in zip(PROMPTS, sequences, kept):
        tokens = seq.token_ids[:count].tolist()
        assert tokens[len(prompt) :] == expected(0, prompt)[: count - len(prompt)]
        assert seq.token_ids[count:].tolist() == expected(1, tokens, 20 - (count - len(prompt)))
        assert len(seq.completion_token_ids) == 20


@pytest.mark.parametrize("steps", [1, 2])
def test_recompute_prompt_logprobs(llm, models, steps):
    """Of a prompt of two chunks. After the first, the new weights give all of them, after both the old ones."""
    prompt = np.random.default_rng(0).integers(0, 500, 100).tolist()
    llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    for _ in range(steps):
        llm.step()
    llm.update_weights(models[1], in_flight="recompute")
    [output] = drain(llm)
    llm.update_weights(models[1 if steps == 1 else 0])
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    assert found == pytest.approx(llm.score([prompt[:1]], [prompt[1:]], use_tqdm=False)[0], abs=1e-5)


# --- what is refused ---


def changed(models, path, array):
    return arrays_of(models[1]) | {path: array}


NORM = ("layers", 1, "self_attn", "q_norm", "weight")


def deleted():
    array = jnp.ones(16)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (jnp.ones(17), r"layers\.1\.self_attn\.q_norm\.weight has shape \(17,\), not \(16,\)"),
        (jnp.ones(16, jnp.int32), r"layers\.1\.self_attn\.q_norm\.weight has dtype int32, not one of bfloat16"),
        (deleted(), r"layers\.1\.self_attn\.q_norm\.weight has been deleted"),
        ("ones", r"layers\.1\.self_attn\.q_norm\.weight must be a NumPy or JAX array, not 'ones'"),
        (
            jax.ShapeDtypeStruct((16,), jnp.float32),
            r"q_norm\.weight must be a NumPy or JAX array, not ShapeDtypeStr",
        ),
        (
            SimpleNamespace(shape=(16,), dtype="torch.float32"),
            r"q_norm\.weight must be a NumPy or JAX array, not namesp",
        ),
    ],
)
def test_bad_arrays_are_named(llm, models, expected, array, message):
    leaves = list(llm.runner.weights.leaves)
    with pytest.raises(ValueError, match=message):
        llm.update_weights(changed(models, NORM, array))
    assert all(now is before for now, before in zip(llm.runner.weights.leaves, leaves, strict=True))
    assert run(llm) == [expected(0, prompt) for prompt in PROMPTS]


def test_bad_names(llm, models):
    arrays = arrays_of(models[1])
    arrays["layers", 2, "norm"] = arrays.pop(NORM)
    with pytest.raises(ValueError, match=r"q_norm\.weight is missing; layers\.2\.norm is unexpected"):
        llm.update_weights(arrays)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is missing.* and \d+ more"):
        llm.update_weights({})
    with pytest.raises(ValueError, match=r"'a name' is unexpected"):
        llm.update_weights(arrays_of(models[1]) | {"a name": 1})


def test_what_is_no_weights(llm, models):
    with pytest.raises(TypeError, match="weights must be a Qwen3ForCausalLM or a dict of arrays by path, not <class"):
        llm.update_weights(llm.runner.weights.leaves)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight must be a NumPy or JAX array, not Param"):
        llm.update_weights(nnx.eval_shape(lambda: models[1]))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight must be a NumPy or JAX array, not "):
        jax.jit(lambda arrays: llm.update_weights(arrays))(arrays_of(models[1]))
    with pytest.raises(TypeError, match=r"of an nnx\.State make one by nnx\.merge\(graph, state\)"):
        llm.update_weights(nnx.state(llm.model))
    with pytest.raises(ValueError, match="in_flight must be None, 'finish' or 'recompute', not 'now'"):
        llm.update_weights(models[1], in_flight="now")
    with pytest.raises(TypeError, match="donate must be True or False, not 'no'"):
        llm.update_weights(models[1], donate="no")


def test_another_model(llm, models):
    """Equal shapes do not make it the same model."""
    other = jax.tree.map(lambda array: array, models[1])
    other.config = SMALL.__class__(**(vars(SMALL) | dict(rms_norm_eps=1e-5)))
    with pytest.raises(ValueError, match=r"another model's: rms_norm_eps=1e-05 \(here 1e-06\)"):
        llm.update_weights(other)


def test_other_copies_of_kv_heads(llm, models, expected):
    """To the form of an engine on more devices than kv heads, and from there."""
    split = Qwen3ForCausalLM(replace(SMALL, kv_copies=2), rngs=nnx.Rngs(0))
    set_parameters(split, checked_weights(models[1], split.config, parameter_targets(split, make_mesh(1))))
    llm.update_weights(split)
    assert run(llm) == [expected(1, prompt) for prompt in PROMPTS]
    for path, array in arrays_of(models[1]).items():
        np.testing.assert_array_equal(arrays_of(llm.model)[path], array, err_msg=str(path))


# --- what fails on the way ---


def fails_at(monkeypatch, place, name, number):
    """The number-th call raises, as a device out of memory does; those after it go on."""
    real, calls = getattr(place, name), itertools.count(1)

    def call(*args):
        if next(calls) == number:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return real(*args)

    monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize("number", [1, 8])
def test_half_an_update_is_not_served(llm, models, expected, monkeypatch, number):
    """The requests under way end, and none begins until an update has come through."""
    start(llm, 3)
    fails_at(monkeypatch, weights, "_placed", number)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        llm.update_weights(models[1], in_flight="recompute")
    assert not llm.has_unfinished_requests()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="update_weights failed half way, and left old weights beside new ones"):
            run(llm)
    llm.update_weights(models[1])
    assert run(llm) == [expected(1, prompt) for prompt in PROMPTS]


def test_finish_on_a_device_that_fails(llm, models, expected, monkeypatch):
    """What had ended is told; of the others nothing is left."""
    start(llm, 3, stream=True)
    llm.add_request(PROMPTS[0], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), "short")
    fails_at(monkeypatch, llm.runner, "collect", 6)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        llm.update_weights(models[1], in_flight="finish")
    assert [(output.request_id, output.finished) for output in drain(llm)] == [("short", True)]
    assert run(llm) == [expected(0, prompt) for prompt in PROMPTS]


def test_an_id_is_in_use_until_its_last_output(llm, models):
    llm.add_request(PROMPTS[0], GREEDY, "mine")
    llm.update_weights(models[1], in_flight="finish")
    with pytest.raises(ValueError, match="request_id 'mine' is in use"):
        llm.add_request(PROMPTS[1], GREEDY, "mine")
    [output] = drain(llm)
    assert output.prompt_token_ids == PROMPTS[0]
    assert llm.add_request(PROMPTS[1], GREEDY, "mine") == "mine"
    drain(llm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_array_under_several_paths_is_donated_once(directories, dtype):
    """As a trainer may have it of all norms that begin as ones."""
    results = []
    for donate in (False, True):
        llm = small_llm(directories[0])
        arrays = {path: param[...].astype(dtype) for path, param in parameters_of(llm.model).items()}
        one = jnp.ones(SMALL.hidden_size, dtype)
        shared = [path for path in arrays if "layernorm" in str(path)]
        assert len(shared) > 1
        llm.update_weights(arrays | dict.fromkeys(shared, one), donate=donate)
        results.append(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert [output["token_ids"] for output in results[0]] == [output["token_ids"] for output in results[1]]
