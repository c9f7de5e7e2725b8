"""n texts for one prompt: their seeds, their order, and the blocks that they share."""

from dataclasses import replace

import pytest
from small_model import assert_idle, join, small_llm, whole, write_checkpoint

from nanovllm_jax import SamplingParams

pytestmark = pytest.mark.usefixtures("programs_kept")

PROMPT = list(range(40))  # two blocks of 16 and a half
SAMPLED = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True, seed=70)
THREE = replace(SAMPLED, n=3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("n") / "model"))


@pytest.fixture(scope="module")
def expected(llm):
    """What three requests with seeds of their own give."""
    params = [replace(SAMPLED, seed=seed) for seed in (70, 71, 72)]
    outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    tokens = [output["token_ids"] for output in outputs]
    assert len(set(map(tuple, tokens))) == 3
    return tokens


def test_one_output_with_n_texts(llm, expected):
    one, three, two = llm.generate([[1], PROMPT, [2]], [SAMPLED, THREE, replace(SAMPLED, n=2)], use_tqdm=False)
    assert [completion.token_ids for completion in three.outputs] == expected
    assert [completion.index for completion in three.outputs] == [0, 1, 2]
    assert [len(output.outputs) for output in (one, three, two)] == [1, 3, 2]
    assert int(two.request_id) == int(three.request_id) + 1 == int(one.request_id) + 2
    assert_idle(llm)


def test_more_texts_than_run_at_a_time(llm, expected):
    (output,) = llm.generate(PROMPT, replace(SAMPLED, n=11), use_tqdm=False)
    assert [completion.token_ids for completion in output.outputs][:3] == expected
    assert len(output.outputs) == 11


def test_texts_that_end_at_different_times(llm, expected):
    """The output comes once all have ended."""
    stop = expected[1][2]
    llm.add_request(PROMPT, replace(THREE, stop_token_ids=[stop]))
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    (output,) = outputs
    for completion, tokens in zip(output.outputs, expected, strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else 8
        assert completion.token_ids == tokens[:end]
        assert completion.finish_reason == ("stop" if stop in tokens else "length")
    assert output.outputs[1].stop_reason == stop
    assert_idle(llm)


def test_the_prompts_full_blocks_are_shared(llm, expected):
    manager = llm.scheduler.block_manager
    manager.reset_prefix_cache()
    llm.add_request(PROMPT, THREE)
    llm.step()
    assert manager.num_used_blocks == 2 + 3
    tables = [seq.block_table for seq in llm.scheduler.running.values()]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 3
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert [completion.token_ids for completion in outputs[0].outputs] == expected
    assert outputs[0].num_cached_tokens == 0


def test_a_stream_tells_the_texts_apart(llm, expected):
    outputs = list(llm.stream([PROMPT, [7]], THREE))
    assert [tokens for _, tokens, _ in join(outputs)[0]] == expected
    assert join(outputs) == whole(llm.generate([PROMPT, [7]], THREE, use_tqdm=False))
    assert [output.finished for output in outputs].count(True) == 2


def test_aborting_ends_all(llm, expected):
    request_id = llm.add_request(PROMPT, replace(SAMPLED, n=6), stream=True)  # two of them wait
    other = llm.add_request([1], SAMPLED)
    for _ in range(4):
        llm.step()
    assert len(llm.scheduler.running) == 4
    llm.abort_request(request_id)
    assert llm.scheduler.block_manager.num_used_blocks == 0
    assert len(llm.scheduler.waiting) == 1
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert [output.request_id for output in outputs] == [other]
    assert_idle(llm)


def test_unseeded_requests_draw_one_seed_each(tmp_path):
    """So the number of texts of one request does not change what the next one draws."""
    directory = write_checkpoint(tmp_path)
    sampled = replace(SAMPLED, seed=None)
    found = []
    for n in (1, 3):
        llm = small_llm(directory, seed=5)
        found.append(llm.generate([PROMPT, [7]], [replace(sampled, n=n), sampled], use_tqdm=False))
    assert found[0][0]["token_ids"] == found[1][0]["token_ids"]
    assert found[0][1]["token_ids"] == found[1][1]["token_ids"]
    assert len({tuple(completion.token_ids) for completion in found[1][0].outputs}) == 3


def test_the_largest_seed_has_successors(llm):
    (output,) = llm.generate(PROMPT, replace(THREE, seed=2**63 - 2), use_tqdm=False)
    zero = llm.generate(PROMPT, replace(SAMPLED, seed=0), use_tqdm=False)[0]
    assert output.outputs[2].token_ids == zero["token_ids"]
