"""Looking inside a running engine: what a probe takes out and changes, against the same model run as a whole."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import SMALL, assert_idle, random_tensors, small_llm, write_checkpoint

from nanovllm_jax import Probe, SamplingParams
from nanovllm_jax.checkpoints.load import load_model
from nanovllm_jax.layers.attention import causal_attention
from nanovllm_jax.layers.linear import Parts
from nanovllm_jax.layers.rope import rope_angles
from nanovllm_jax.models import qwen3
from nanovllm_jax.models.qwen3 import Qwen3ForCausalLM
from nanovllm_jax.models.watch import Watch
from nanovllm_jax.parallel.sharding import make_mesh

D = SMALL.hidden_size
PLACES = ["residual.0", "residual.1", "attention.1", "logits"]
PROBE = Probe(
    capture=dict.fromkeys(PLACES) | {"attention.0": lambda model, x: jnp.argmax(x, axis=-1)},
    edit={"residual.0": lambda x, steering: x + steering},
    steering_size=D,
)


def greedy(n=24, **options):
    return SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, **options)


def prompts(count, seed=0):
    """Prompts of 1 to 90 tokens: some longer than a step's 64."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 511, n).tolist() for n in [1, 16, 90, *rng.integers(2, 90, count)][:count]]


def vector(seed):
    return (3 * np.random.default_rng(seed).standard_normal(D)).astype(np.float32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def llm(directory):
    """Several steps in a program where it can, and blocks for three long texts."""
    return small_llm(directory, probe=PROBE, num_scheduler_steps=4, num_kvcache_blocks=22)


@pytest.fixture(scope="module")
def expected(directory):
    return by_training_forward(load(directory))


def load(directory):
    return load_model(directory, SMALL, dtype=jnp.float32, mesh=make_mesh(1))


def by_training_forward(model):
    """expected(tokens, steering) -> every place's activations of a whole text."""

    @jax.jit
    def run(tokens, steering):
        watch = Watch(PROBE, model, steering)
        hidden, _ = model(tokens, jnp.arange(len(tokens)), None, causal_attention, watch.run_layer)
        watch.take("logits", model.logits(hidden))
        return watch.captured

    def padded(tokens, steering=None):
        steering = np.zeros(D, np.float32) if steering is None else steering
        captured = run(np.pad(tokens, (0, 128 - len(tokens))), np.broadcast_to(steering, (128, D)))
        return {place: np.asarray(array)[: len(tokens)] for place, array in captured.items()}

    return padded


def assert_captured(output, expected, steering=None):
    """Each text's activations, of every position but the last, and the logits of each of its tokens."""
    for text in output.outputs:
        whole = expected(output.prompt_token_ids + text.token_ids[:-1], steering)
        assert set(text.activations) == set(whole) == set(PROBE.capture)
        for place, array in text.activations.items():
            wanted = whole[place][-len(text.token_ids) :] if place == "logits" else whole[place]
            np.testing.assert_allclose(array, wanted, atol=2e-4, rtol=2e-4, err_msg=place)
        assert text.token_ids == text.activations["logits"].argmax(-1).tolist()


def test_activations_of_prompts_in_chunks_and_of_decoded_tokens(llm, expected):
    outputs = llm.generate(prompts(6), greedy(capture=True), use_tqdm=False)
    for output in outputs:
        assert_captured(output, expected)
    assert_idle(llm)


def test_a_capturing_request_computes_what_the_prefix_cache_holds(llm, expected):
    prompt = prompts(3)[2]
    first, second, third = (
        llm.generate(prompt, greedy(4, capture=capture), use_tqdm=False)[0] for capture in (False, True, False)
    )
    assert (second.num_cached_tokens, third.num_cached_tokens) == (0, 80)
    assert first.outputs[0].activations is third.outputs[0].activations is None
    assert_captured(second, expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_other_weights_in_the_middle_of_a_prompt(llm, directory, tmp_path, expected, steps):
    """Of a prompt that is not computed to its end all is captured again, of others nothing."""
    other = load(write_checkpoint(tmp_path, tensors=random_tensors(SMALL, seed=1)))
    prompt = prompts(3)[2]  # of two chunks
    llm.add_request(prompt, replace(greedy(3, capture=True), temperature=1, n=2))
    for _ in range(steps):
        llm.step()
    llm.update_weights(other, in_flight="recompute")
    try:
        outputs = []
        while llm.has_unfinished_requests():
            outputs += llm.step()
        [output] = outputs
        assert len(output.outputs) == 2
        for text in output.outputs:
            wanted = by_training_forward(other)(prompt + text.token_ids[:-1])["residual.1"]
            if steps == 2 and text.index == 0:
                wanted = np.concatenate((expected(prompt)["residual.1"], wanted[len(prompt) :]))
            np.testing.assert_allclose(text.activations["residual.1"], wanted, atol=2e-4, rtol=2e-4)
        assert_idle(llm)
    finally:
        llm.update_weights(load(directory))


def test_n_texts(llm, expected):
    params = SamplingParams(temperature=1, n=3, seed=1, max_tokens=23, ignore_eos=True, capture=True)
    for output in llm.generate(prompts(2), params, use_tqdm=False):
        for text in output.outputs:
            whole = expected(output.prompt_token_ids + text.token_ids[:-1])
            np.testing.assert_allclose(text.activations["residual.1"], whole["residual.1"], atol=2e-4, rtol=2e-4)
            np.testing.assert_allclose(text.activations["logits"], whole["logits"][-23:], atol=2e-4, rtol=2e-4)


def test_preempted_sequences_have_each_position_once(llm, expected):
    before = llm.scheduler.num_preemptions
    outputs = llm.generate([p[:30] for p in prompts(6, seed=3)], greedy(90, capture=True), use_tqdm=False)
    assert llm.scheduler.num_preemptions > before
    for output in outputs:
        assert_captured(output, expected)


def test_layers_that_hand_on_parts_of_sums():
    """As they do for up to 256 rows of 16 bits: each place is what it is among more rows."""
    config = replace(SMALL, hidden_size=512, intermediate_size=512, head_dim=64)
    model = Qwen3ForCausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    probe = Probe(capture=PLACES, edit={"residual.0": lambda x, steering: x + steering}, steering_size=512)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 511, 300))

    @jax.jit
    def captured(model, tokens):
        watch = Watch(probe, model, jnp.linspace(-1, 1, 512)[None])
        hidden, _ = model(tokens, jnp.arange(len(tokens)), None, causal_attention, watch.run_layer)
        watch.take("logits", model.logits(hidden))
        return watch.captured

    in_four, in_halves, whole = (captured(model, tokens[:rows]) for rows in (40, 100, 300))
    down = model.layers[0].mlp.down_proj
    assert [len(down.no_parts((rows,))) for rows in (40, 100, 300)] == [4, 2, 1]
    for place in PLACES:
        want = np.asarray(whole[place], np.float32)
        for parts in (in_four, in_halves):
            assert parts[place].dtype == whole[place].dtype
            got = np.asarray(parts[place], np.float32)
            np.testing.assert_allclose(got, want[: len(got)], atol=0.02 * np.abs(want).max(), err_msg=place)


def test_layers_that_hand_on_nothing_to_add(monkeypatch):
    """As they do for many rows, where nobody looks: what is taken out of one layer, and edited, is the same."""
    model = Qwen3ForCausalLM(replace(SMALL, num_hidden_layers=4), rngs=nnx.Rngs(0))
    places = ["attention.1", "residual.1", "logits"]
    probe = Probe(capture=places, edit={"residual.2": lambda x, steering: 2 * x + steering}, steering_size=48)

    @jax.jit
    def captured(model):
        watch, tokens = Watch(probe, model, jnp.linspace(-1, 1, 48)[None]), jnp.arange(30)
        hidden, _ = model(tokens, tokens, None, causal_attention, watch.run_layer)
        watch.take("logits", model.logits(hidden))
        return watch.captured

    expected = captured(model)
    monkeypatch.setattr(qwen3, "ADDED_SIZE", 30 * D)
    jax.clear_caches()  # all would be as it was traced before
    got = captured(model)
    for place in places:
        np.testing.assert_allclose(got[place], expected[place], rtol=1e-5, atol=1e-6, err_msg=place)


def test_each_request_is_steered_by_its_own_vector(llm, expected):
    """In one batch, with prompts that share their prefix: the cache tells them apart."""
    prompt = prompts(3)[2][:40]
    vectors = [None, vector(1), vector(2), None, vector(1)]
    params = [greedy(capture=i % 2 == 0, steering=v) for i, v in enumerate(vectors)]
    for _ in range(2):  # the second time from the prefix cache, where it may
        outputs = llm.generate([prompt] * 5, params, use_tqdm=False)
        for output, wanted in zip(outputs[::2], vectors[::2]):
            assert_captured(output, expected, wanted)
        texts = [output.outputs[0].token_ids for output in outputs]
        assert texts[0] == texts[3]
        assert texts[1] == texts[4]
        assert len({tuple(text) for text in texts}) == 3
    assert outputs[1].num_cached_tokens == outputs[3].num_cached_tokens == 32


def test_a_slot_forgets_its_steering(llm):
    prompt = prompts(3)[1]
    plain, steered, again = (
        llm.generate(prompt, greedy(steering=v), use_tqdm=False)[0]["token_ids"] for v in (None, vector(1), None)
    )
    assert plain == again != steered


def test_streams_bring_activations_at_their_end(llm, expected):
    outputs = list(llm.stream(prompts(3)[2], greedy(capture=True)))
    assert [output.outputs[0].activations is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    assert outputs[-1].outputs[0].activations["residual.0"].shape == (90 + 24 - 1, D)


# --- no cost when unused ---


def test_without_a_probe_the_programs_are_what_they_were(llm, monkeypatch):
    """Line by line those of a model whose loop knows nothing of probes."""
    settings = llm.runner.steps.settings
    monkeypatch.setattr(llm.runner.steps, "settings", settings._replace(config=replace(settings.config, probe=None)))
    lowered = {shape: llm.runner.steps.lower(shape) for shape in llm.runner.buckets.all_shapes()}
    monkeypatch.setattr(Qwen3ForCausalLM, "__call__", plain_model)
    monkeypatch.setattr(Qwen3ForCausalLM, "of_rows", plain_of_rows)
    monkeypatch.setattr(qwen3, "_run_layer", jax.jit(plain_layer))
    assert {shape.num_steps for shape in lowered} == {1, 4}
    for shape, program in lowered.items():
        assert program.out_info[0].activations == {}
        assert program.as_text() == llm.runner.steps.lower(shape).as_text().replace("plain_layer", "__call__")


def test_programs_with_a_probe_are_not_kept_on_disk(llm, monkeypatch):
    """Another probe's functions may have the same names."""
    monkeypatch.setattr(llm.runner, "on_gpu", True)
    assert llm.runner._program_store().directory is None
    monkeypatch.setattr(llm.runner, "config", replace(llm.runner.config, probe=None))
    assert llm.runner._program_store().directory is not None


def plain_model(model, tokens, positions, cache, attend, run_layer, peers):
    residual, delta, _, _, cache = plain_layers(model, model.layers, tokens, positions, cache, attend)
    return model.norm.add(residual, delta)[1], cache


def plain_of_rows(model, rows, tokens, positions, cache, attend, attend_of_rows, peers):
    *others, last = model.layers
    *stream, cache = plain_layers(model, others, tokens, positions, cache, attend)
    attend_of_last = attend_of_rows.of_layer(len(others))
    before, residual, delta, cache = qwen3._run_rows(last, rows, *stream, cache, attend_of_last)
    return model.norm.add(residual, delta)[1], before, cache


def plain_layers(model, layers, tokens, positions, cache, attend):
    residual, delta = model.embed_tokens(tokens), Parts(model.layers[0].mlp.down_proj.no_parts(tokens.shape))
    cos, sin = rope_angles(positions, model.config.rope, model.config.head_dim)
    for number, layer in enumerate(layers):
        own = attend.of_layer(number)
        residual, delta, cache = qwen3._run_layer(layer, residual, delta, cos, sin, cache, own)
    return residual, delta, cos, sin, cache


def plain_layer(layer, residual, delta, cos, sin, cache, attend):
    residual, delta, cache = layer.self_attn(layer.input_layernorm, residual, delta, cos, sin, cache, attend)
    return *layer.mlp(layer.post_attention_layernorm, residual, delta), cache


# --- bad input ---

BAD_PROBES = {
    "a_layer_that_is_not_there": (
        dict(capture=["residual.2"]),
        "no 'residual.2': the model's layers are 0 to 1",
    ),
    "an_edit_of_such_a_layer": (dict(edit={"residual.9": lambda x, s: x}), "no 'residual.9': the model's layers are"),
    "no_name": (dict(capture=[["residual.0"]]), r"\['residual.0'\] is no place"),
    "no_place": (dict(capture=["mlp.0"]), "'mlp.0' is no place"),
    "a_negative_layer": (dict(capture=["residual.-1"]), "'residual.-1' is no place"),
    "a_number_written_another_way": (dict(capture=["residual.00"]), "'residual.00' is no place"),
    "an_edit_of_logits": (dict(edit={"logits": lambda x, s: x}), "only the residual stream can be edited"),
    "a_vector_of_another_shape": (
        dict(edit={"residual.0": lambda x, s: x + s[:, :1] * np.ones(47, np.float32)}, steering_size=1),
        r"the edit of 'residual.0' fails on arrays of shape \[3, 48\] and \[3, 1\]: .*47",
    ),
    "an_edit_to_another_shape": (
        dict(edit={"residual.0": lambda x, s: x[:, :5]}),
        r"must give .*\[3, 48\].*not \[3, 5\]",
    ),
    "a_capture_of_fewer_rows": (dict(capture={"logits": lambda m, x: x[0]}), r"must give an array \[3, \.\.\.\]"),
    "a_capture_that_fails": (dict(capture={"logits": lambda m, x: m.nothing}), "capture of 'logits' fails.*nothing"),
    "a_size": (dict(steering_size=-1), "steering_size must be at least 0, not -1"),
}
WRONG_TYPES = {
    "a_string": (dict(capture="logits"), "capture is a list or a dict"),
    "no_function": (dict(capture={"logits": 3}), "'logits' needs a function, not 3"),
    "no_edit": (dict(edit={"residual.0": None}), "edit of 'residual.0' needs a function"),
}


@pytest.mark.parametrize("case", BAD_PROBES)
def test_bad_probes_are_refused_at_construction(directory, case):
    options, message = BAD_PROBES[case]
    with pytest.raises(ValueError, match=message):
        small_llm(directory, probe=Probe(**options))


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types_are_refused(case):
    options, message = WRONG_TYPES[case]
    with pytest.raises(TypeError, match=message):
        Probe(**options)


def test_a_probe_is_a_probe(directory):
    with pytest.raises(TypeError, match="probe must be a Probe or None, not 'logits'"):
        small_llm(directory, probe="logits")


def test_requests_that_ask_for_what_the_probe_lacks_are_refused(llm, monkeypatch):
    with pytest.raises(ValueError, match="steering brings 1 numbers, and the engine's probe takes 48"):
        llm.generate([1], greedy(steering=2.0), use_tqdm=False)
    monkeypatch.setattr(llm, "door", replace(llm.door, probe=None))
    with pytest.raises(ValueError, match=r"capture=True needs an engine that takes something out"):
        llm.generate([1], greedy(capture=True), use_tqdm=False)
    with pytest.raises(ValueError, match="steering brings 48 numbers, and the engine's probe takes 0"):
        llm.generate([1], greedy(steering=vector(0)), use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize("steering", ["1", [1.0, "x"], {0: 1.0}, [None], 1j, np.zeros((2, 2))])
def test_steering_is_numbers(steering):
    with pytest.raises(TypeError, match="steering must be a number"):
        SamplingParams(steering=steering)


@pytest.mark.parametrize("steering", [float("nan"), [1e300], [float("inf")]])
def test_steering_is_finite(steering):
    with pytest.raises(ValueError, match="steering must be finite"):
        SamplingParams(steering=steering)
