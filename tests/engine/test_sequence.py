from nanovllm_jax.engine.sequence import Sequence, Status


def test_a_new_sequence_waits_and_holds_nothing():
    seq = Sequence(7, "r7", [1, 2, 3], "params", stop_token_ids=frozenset({9}), max_len=10)
    assert (seq.seq_id, seq.request_id, seq.params, seq.max_len) == (7, "r7", "params", 10)
    assert seq.stop_token_ids == {9}
    assert (seq.status, seq.is_finished, seq.finish_reason) == (Status.WAITING, False, None)
    assert (seq.slot, seq.block_table, seq.num_computed, seq.num_pending) == (-1, [], 0, 0)


def test_prompt_and_completion_are_told_apart():
    seq = Sequence(0, "r0", [1, 2, 3], None, max_len=10)
    assert (len(seq.token_ids), seq.num_prompt_tokens, seq.num_completion_tokens) == (3, 3, 0)
    seq.token_ids.extend([4, 5])
    assert (len(seq.token_ids), seq.num_prompt_tokens, seq.num_completion_tokens) == (5, 3, 2)
    assert (seq.prompt_token_ids, seq.completion_token_ids) == ([1, 2, 3], [4, 5])


def test_the_callers_prompt_is_copied():
    prompt = [1, 2, 3]
    seq = Sequence(0, "r0", prompt, None, max_len=10)
    seq.token_ids.append(4)
    seq.prompt_token_ids.append(5)
    assert prompt == [1, 2, 3]
    assert seq.token_ids.tolist() == [1, 2, 3, 4]


def test_repr_tells_the_state():
    seq = Sequence(0, "r0", [1, 2, 3], None, max_len=10)
    assert repr(seq) == "Sequence('r0', WAITING, tokens=3+0, computed=0, pending=0)"
