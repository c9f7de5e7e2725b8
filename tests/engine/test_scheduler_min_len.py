"""Stop tokens before a sequence's min_len, and sequences that are finished from outside."""

import pytest

from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence

PROMPT, STOP = [1, 2, 3], 7


def run(tokens, *, min_len, max_len, depth=0):
    """Feed these tokens to one sequence, with up to `depth` steps in flight behind each."""
    scheduler = Scheduler(num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=24)
    seq = Sequence(0, "r0", PROMPT, None, stop_token_ids=frozenset({STOP}), min_len=min_len, max_len=max_len)
    scheduler.add(seq)
    in_flight, tokens = [], iter(tokens)
    while scheduler.has_unfinished:
        if schedule := scheduler.schedule():
            in_flight.append(schedule)
        while len(in_flight) > (depth if schedule else 0):
            oldest = in_flight.pop(0)
            token = next(tokens)
            scheduler.update(oldest, [token] * len(oldest.decodes), [token] * len(oldest.prefills))
            scheduler.check()
    assert scheduler.block_manager.num_used_blocks == 0
    return seq.completion_token_ids, seq.finish_reason


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
def test_a_stop_token_counts_after_min_len(min_tokens, depth):
    """The first min_tokens tokens are more than the stop token's: vLLM's min_tokens does not count it."""
    assert run([STOP] * 20, min_len=3 + min_tokens, max_len=20, depth=depth) == ([STOP] * (min_tokens + 1), "stop")
    assert run([4, 5, 6, 4, 5, STOP, 4, 4], min_len=3 + min_tokens, max_len=20)[0] == [4, 5, 6, 4, 5, STOP]


def test_the_length_ends_what_min_len_keeps_going():
    assert run([STOP] * 20, min_len=8, max_len=8) == ([STOP] * 5, "length")
    assert run([STOP] * 20, min_len=7, max_len=8) == ([STOP] * 5, "stop")
    assert run([STOP] * 20, min_len=6, max_len=8) == ([STOP] * 4, "stop")
