"""Batch shapes: each schedule has one, the smallest, and it is among those that are compiled."""

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax.engine.batch import BatchShape
from nanovllm_jax.engine.buckets import Buckets, cpu_buckets, gpu_buckets
from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead


@settings(deadline=None)
@given(data=st.data(), max_num_seqs=st.integers(1, 600), max_num_batched_tokens=st.integers(1, 20_000))
def test_a_schedule_fits_the_smallest_shape_that_is_compiled(data, max_num_seqs, max_num_batched_tokens):
    spared_from = data.draw(st.sampled_from([1, 256, 1024, math.inf]))
    sizes = max_num_seqs, max_num_batched_tokens, 16, ONE_STEP
    kinds = cpu_buckets(*sizes), gpu_buckets(*sizes), gpu_buckets(*sizes, close_prompts=True)
    buckets = data.draw(st.sampled_from(kinds))
    buckets = replace(buckets, spared_from=spared_from)
    decodes = data.draw(st.integers(0, max_num_seqs))
    most = min(max_num_seqs, max_num_batched_tokens - decodes)
    prefills = data.draw(st.integers(0 if decodes else 1, most)) if most > 0 else 0
    tokens = data.draw(st.integers(decodes + prefills, max_num_batched_tokens)) if prefills else decodes
    shape = buckets.shape_for(decodes, prefills, tokens)
    shapes = buckets.all_shapes()
    assert len(set(shapes)) == len(shapes)
    assert all(shape.decode_rows <= shape.tokens <= max(max_num_seqs, max_num_batched_tokens) for shape in shapes)
    assert all(shape.spared == (shape.tokens >= spared_from) for shape in shapes if shape.prefill_rows)

    def fits(shape: BatchShape):
        enough = shape.decode_rows >= decodes and shape.prefill_rows >= prefills and shape.tokens >= tokens
        return enough and bool(shape.prefill_rows) == bool(prefills)

    assert shape == min(filter(fits, shapes), key=lambda s: (s.tokens, s.decode_rows))


@settings(deadline=None)
@given(
    decodes=st.integers(1, 600),
    max_num_seqs=st.integers(1, 600),
    rows=st.integers(1, 300),
    ratio=st.sampled_from([2, 16]),
    num_steps=st.integers(1, 5),
)
def test_several_steps_have_a_program(decodes, max_num_seqs, rows, ratio, num_steps):
    """Of as many sequences as may run ahead, whatever the size that they are padded to."""
    buckets = Buckets(max_num_seqs, 128, 16, ratio, (max_num_seqs,), RunAhead(num_steps, rows))
    decodes = min(decodes, rows, max_num_seqs)
    shapes = buckets.all_shapes()
    assert len({*shapes}) == len(shapes)
    assert buckets.shape_for(decodes, 0, decodes, num_steps) in shapes


def beside_prefills(buckets):
    """Tokens and decode rows of each shape, by decode rows."""
    shapes = [(shape.tokens, shape.decode_rows) for shape in buckets.all_shapes() if shape.prefill_rows]
    assert shapes == sorted(shapes, key=lambda shape: -shape[0]), "the largest first"
    return {rows: [tokens for tokens, own in shapes if own == rows] for _, rows in shapes}


def test_shapes_beside_a_prefill():
    assert beside_prefills(gpu_buckets(512, 16384, 16, ONE_STEP)) == {
        0: [16384, 8192, 4096, 2048, 1024, 512, 256, 128],
        64: [2080, 1056, 544, 288, 160],
        384: [384],
        512: [16384, 8448, 4352, 2304, 1280, 768, 512],
    }
    assert beside_prefills(gpu_buckets(512, 16384, 16, ONE_STEP, close_prompts=True)) == {
        0: [16384, 8192, 4096, 2048, 1024, 512, 256, 128],
        64: [3104, 2080, 1568, 1056, 800, 544, 416, 288, 224, 160],
        384: [384],
        512: [16384, 12544, 8448, 6400, 4352, 3328, 2304, 1792, 1280, 768, 512],
    }
    assert beside_prefills(gpu_buckets(512, 512, 16, ONE_STEP)) == {
        0: [512, 256, 128],
        64: [512, 288, 160],
        384: [384],
        512: [512],
    }
    assert beside_prefills(gpu_buckets(512, 32, 16, ONE_STEP)) == {0: [32], 32: [32]}
    assert beside_prefills(gpu_buckets(8, 256, 16, ONE_STEP)) == {0: [256, 128], 8: [256, 132]}
    assert beside_prefills(cpu_buckets(32, 1024, 16, ONE_STEP)) == {32: [1024, 144]}


def test_sizes_of_steps_that_only_decode():
    sizes = {most: gpu_buckets(most, 256, 16, ONE_STEP).decode_rows for most in (1, 2, 3, 4, 5, 200, 512)}
    assert sizes == {
        1: (1,),
        2: (1, 2),
        3: (1, 3),
        4: (1, 4),
        5: (1, 4, 5),
        200: (1, 4, 8, 16, 32, 64, 128, 164, 200),
        512: (1, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512),
    }
    assert cpu_buckets(32, 1024, 16, ONE_STEP).decode_rows == (1, 16, 32)
