"""A schedule as a batch: where its tokens lie."""

from simulated_device import prompt

from nanovllm_jax.engine.buckets import Buckets
from nanovllm_jax.engine.packing import BatchPacker
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.engine.sequence import Sequence
from nanovllm_jax.sampling_params import SamplingParams


def test_prompts_begin_right_behind_what_decodes():
    """Their rows and their tokens, whatever number of rows may decode: padding is at the end."""
    scheduler = Scheduler(num_blocks=20, block_size=4, max_num_seqs=6, max_num_batched_tokens=32, max_model_len=60)
    packer = BatchPacker(Buckets((1, 4, 6), ((6, 32),), 15))

    def add(number, length):
        tokens = prompt(number, length)
        scheduler.add(Sequence(number, str(number), tokens, SamplingParams(temperature=0), max_len=length + 5))
        return tokens

    add(0, 8), add(1, 3)
    packer.pack(first := scheduler.schedule())
    scheduler.update(first, [], [71, 72])
    prompts = add(2, 5), add(3, 7)
    schedule = scheduler.schedule()
    assert [seq.seq_id for seq in schedule.decodes] == [0, 1]
    shape, buffer = packer.pack(schedule)
    view = shape.views(buffer)
    assert (shape.decode_rows, shape.prefill_rows, shape.tokens) == (6, 6, 32)
    assert view.tokens[:14].tolist() == [71, 72, *prompts[0], *prompts[1]]
    assert view.num_decodes.tolist() == [2]
    assert view.starts.tolist() == [0, 1, 2, 7, 14, 14, 14]
    assert view.context_lens.tolist() == [9, 4, 5, 7, 0, 0]
    assert list(map(list, packer.places(schedule, shape))) == [[0, 1], [2, 3], [2, 7]]
    packer.pack(later := scheduler.schedule())  # of all four, whose tokens the host has not read
    shape, buffer = packer.pack(later)
    view = shape.views(buffer)
    assert (shape.decode_rows, shape.prefill_rows, shape.tokens) == (4, 0, 4)
    assert view.tokens.tolist() == [-1] * 4
    assert view.starts.tolist() == [0, 1, 2, 3, 4]
