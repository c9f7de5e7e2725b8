"""A large prefill's last layer, of which most tokens leave keys and values alone: results are as if it were whole."""

from dataclasses import replace

import pytest
from small_model import SMALL, assert_idle, small_llm, write_checkpoint

from nanovllm_jax import Probe, SamplingParams
from nanovllm_jax.engine import model_runner

CASES = {
    "plain": (replace(SMALL, tie_word_embeddings=True), False),
    "deterministic": (replace(SMALL, attention_bias=True), True),
}
SHARED = list(range(30, 80))
# More than a step's 64 tokens, a single one, prefixes that are shared, and so many that some come beside decodes.
PROMPTS = [[5, 6, 7], list(range(100, 200)), [9], SHARED, [*SHARED, 3], [*SHARED[:33], 4, 5]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3, prompt_logprobs=2),
    SamplingParams(temperature=1, seed=2, top_p=0.9, max_tokens=24, ignore_eos=True, logprobs=0),
]


@pytest.fixture(scope="module", params=CASES)
def engines(tmp_path_factory, request, programs_kept):
    """One whose steps have all of the last layer, and one whose steps spare it. Decodes are the same: made once."""
    config, deterministic = CASES[request.param]
    directory = write_checkpoint(tmp_path_factory.mktemp("last") / "model", config)
    with pytest.MonkeyPatch.context() as patch:
        llms = []
        for spared_from in (65, 64):
            patch.setattr(model_runner, "SPARED_FROM", spared_from)
            llms.append(small_llm(directory, deterministic=deterministic, num_kvcache_blocks=10))
        return llms


def numbers(entries):
    """(token, logprob) of all positions."""
    return [(token, found[token].logprob) for found in entries or [] if found for token in sorted(found)]


def answers(llm):
    """Tokens and log probabilities, in a first round and from cached prefixes."""
    llm.reset_prefix_cache()
    found = []
    for _ in range(2):
        for output in llm.generate(PROMPTS, PARAMS * 3, use_tqdm=False):
            text = output.outputs[0]
            found.append((text.token_ids, numbers(text.logprobs), numbers(output.prompt_logprobs)))
    assert_idle(llm)
    return found


def test_results_are_those_of_the_whole_layer(engines):
    """To the last bit with deterministic=True: else programs differ in how they round."""
    whole, spared = engines
    prefills = [[shape for shape in llm.runner.programs if shape.prefill_rows] for llm in engines]
    assert [[shape.spared for shape in shapes] for shapes in prefills] == [[False], [True]]
    for (tokens, *entries), (their_tokens, *their_entries) in zip(answers(spared), answers(whole), strict=True):
        assert tokens == their_tokens
        if spared.runner.config.deterministic:
            assert entries == their_entries
        for ours, theirs in zip(entries, their_entries, strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
            assert [number for _, number in ours] == pytest.approx([number for _, number in theirs], abs=1e-5)
    assert spared.scheduler.num_prefix_hit_tokens > 32
    assert spared.scheduler.num_preemptions > 0


@pytest.mark.parametrize("engines", ["plain"], indirect=True)  # else XLA does not see how often a loop goes round
def test_it_computes_less(engines):
    """Of two layers one, but for keys and values, of a step's 64 tokens for 4 rows that decode and 4 that prefill."""
    [whole, spared] = [
        program.cost_analysis()["flops"]
        for llm in engines
        for shape, program in llm.runner.programs.items()
        if shape.prefill_rows
    ]
    heads = SMALL.num_attention_heads * SMALL.head_dim
    of_token = 2 * SMALL.hidden_size * (heads + 3 * SMALL.intermediate_size)  # o, gate, up and down
    assert whole - spared > 60 * of_token


def test_with_a_probe_nothing_is_spared(tmp_path, monkeypatch):
    """It looks at all tokens of the last layer too."""
    monkeypatch.setattr(model_runner, "SPARED_FROM", 64)
    directory = write_checkpoint(tmp_path / "model", replace(SMALL, num_hidden_layers=1))
    llm = small_llm(directory, max_num_seqs=1, probe=Probe(capture=["residual.0"]))
    assert any(shape.prefill_rows for shape in llm.runner.programs)
    assert not any(shape.spared for shape in llm.runner.programs)
    output = llm.generate(PROMPTS[1], SamplingParams(max_tokens=1, capture=True), use_tqdm=False)[0]
    assert output.outputs[0].activations["residual.0"].shape == (100, SMALL.hidden_size)
