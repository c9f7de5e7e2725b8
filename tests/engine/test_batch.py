"""Batch shapes: each schedule has one, the smallest, and it is among those that are compiled."""

import math

from hypothesis import given
from hypothesis import strategies as st

from nanovllm_jax.engine.batch import BatchShape, Buckets
from nanovllm_jax.engine.schedule import RunAhead


def buckets_of(max_num_seqs, max_num_batched_tokens, ratio=2, alone_from=8192, large_from=8192):
    mixed = tuple(sorted({min(32, max_num_seqs), max_num_seqs}))
    sizes = max_num_seqs, max_num_batched_tokens, 16, ratio, mixed
    return Buckets(*sizes, alone_from=alone_from, large_from=large_from)


@given(data=st.data(), max_num_seqs=st.integers(1, 600), max_num_batched_tokens=st.integers(1, 20_000))
def test_a_schedule_fits_the_smallest_shape_that_is_compiled(data, max_num_seqs, max_num_batched_tokens):
    alone_from, large_from = (data.draw(st.sampled_from([0, 1024, 8192, math.inf])) for _ in range(2))
    ratio = data.draw(st.sampled_from([2, 16]))
    buckets = buckets_of(max_num_seqs, max_num_batched_tokens, ratio, alone_from, large_from)
    decodes = data.draw(st.integers(0, max_num_seqs))
    prefills = data.draw(st.integers(0 if decodes else 1, min(max_num_seqs, max_num_batched_tokens)))
    tokens = data.draw(st.integers(prefills, max_num_batched_tokens)) if prefills else 0
    shape = buckets.shape_for(decodes, prefills, tokens)
    shapes = buckets.all_shapes()
    assert len(set(shapes)) == len(shapes)

    def fits(shape: BatchShape):
        enough = shape.decode_rows >= decodes and shape.prefill_rows >= prefills and shape.prefill_tokens >= tokens
        return enough and bool(shape.prefill_tokens) == bool(prefills)

    assert shape == min(filter(fits, shapes), key=lambda s: (s.prefill_tokens, s.decode_rows))


@given(
    decodes=st.integers(1, 600),
    max_num_seqs=st.integers(1, 600),
    rows=st.integers(1, 300),
    ratio=st.sampled_from([2, 16]),
)
def test_several_steps_have_a_program(decodes, max_num_seqs, rows, ratio):
    """Of as many sequences as may run ahead, whatever the size that they are padded to."""
    buckets = Buckets(max_num_seqs, 128, 16, ratio, (max_num_seqs,), RunAhead(4, rows))
    decodes = min(decodes, rows, max_num_seqs)
    assert buckets.shape_for(decodes, 0, 0, num_steps=4) in buckets.all_shapes()


def test_shapes_beside_a_prefill():
    shapes = [(s.prefill_tokens, s.decode_rows) for s in buckets_of(512, 16384).all_shapes() if s.prefill_tokens]
    assert shapes == [
        *((tokens, rows) for tokens in (16384, 8192) for rows in (512, 0)),
        *((tokens, rows) for tokens in (4096, 2048, 1024, 512, 256, 128) for rows in (512, 32)),
    ]
    large_model = buckets_of(512, 16384, alone_from=0).all_shapes()
    assert [s.decode_rows for s in large_model if s.prefill_tokens == 8192] == [512, 0]
    assert [s.decode_rows for s in large_model if s.prefill_tokens == 128] == [512, 32, 0]
