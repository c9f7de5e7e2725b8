"""Batch shapes: each schedule has one, the smallest, and it is among those that are compiled."""

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_jax.engine.batch import BatchShape, StepSizes
from nanovllm_jax.engine.buckets import STEP_TOKENS, cpu_buckets, gpu_buckets
from nanovllm_jax.engine.schedule import ONE_STEP, RunAhead

KINDS = st.sampled_from([cpu_buckets, gpu_buckets])


@settings(deadline=None)
@given(data=st.data(), max_num_seqs=st.integers(1, 600), max_num_batched_tokens=st.integers(1, 20_000))
def test_a_schedule_fits_the_smallest_shape_that_is_compiled(data, max_num_seqs, max_num_batched_tokens):
    spared_from = data.draw(st.sampled_from([1, 256, 1024, math.inf]))
    sizes = max_num_seqs, max_num_batched_tokens, 16, ONE_STEP
    buckets = replace(data.draw(KINDS)(*sizes), spared_from=spared_from)
    assert (buckets.max_num_seqs, buckets.max_num_batched_tokens) == sizes[:2]
    decodes, prefills, tokens = step = drawn_step(data, max_num_seqs, max_num_batched_tokens)
    shape = buckets.shape_for(step)
    shapes = buckets.all_shapes()
    assert len(set(shapes)) == len(shapes)
    assert all(shape.decode_rows <= shape.tokens <= max(max_num_seqs, max_num_batched_tokens) for shape in shapes)
    assert all(shape.spared == (shape.tokens >= spared_from) for shape in shapes if shape.prefill_rows)

    def fits(shape: BatchShape):
        enough = shape.decode_rows >= decodes and shape.prefill_rows >= prefills and shape.tokens >= tokens
        return enough and shape.rows >= decodes + prefills and bool(shape.prefill_rows) == bool(prefills)

    assert shape == min(filter(fits, shapes), key=lambda s: (s.tokens, s.decode_rows))


def drawn_step(data, max_num_seqs, max_num_batched_tokens):
    decodes = data.draw(st.integers(0, max_num_seqs))
    most = min(max_num_seqs, max_num_batched_tokens) - decodes
    prefills = data.draw(st.integers(0 if decodes else 1, most)) if most > 0 else 0
    tokens = data.draw(st.integers(decodes + prefills, max_num_batched_tokens)) if prefills else decodes
    return StepSizes(decodes, prefills, tokens)


@settings(deadline=None)
@given(data=st.data(), groups=st.integers(1, 3), max_num_seqs=st.integers(1, 600), most=st.integers(1, 20_000))
def test_a_shape_holds_what_all_data_groups_do(data, groups, max_num_seqs, most):
    """Though one may decode all that can run, and another one prefill as many."""
    buckets, running = data.draw(KINDS)(max_num_seqs, most, 16, ONE_STEP), min(max_num_seqs, most)
    steps = [drawn_step(data, running, most) for _ in range(groups)]
    shape = buckets.shape_for(*steps)
    assert shape in buckets.all_shapes()
    assert all(map(shape.holds, steps))


@settings(deadline=None)
@given(
    decodes=st.integers(1, 600),
    max_num_seqs=st.integers(1, 600),
    rows=st.integers(1, 300),
    kind=KINDS,
    num_steps=st.integers(1, 5),
)
def test_several_steps_have_a_program(decodes, max_num_seqs, rows, kind, num_steps):
    """Of as many sequences as may run ahead, whatever the size that they are padded to."""
    buckets = kind(max_num_seqs, 128, 16, RunAhead(num_steps, rows))
    decodes = min(decodes, rows, max_num_seqs)
    shapes = buckets.all_shapes()
    assert len({*shapes}) == len(shapes)
    assert buckets.shape_for(StepSizes(decodes, 0, decodes), num_steps=num_steps) in shapes


def beside_prefills(buckets):
    """Tokens and decode rows of each shape, by decode rows."""
    shapes = [(shape.tokens, shape.decode_rows) for shape in buckets.all_shapes() if shape.prefill_rows]
    assert shapes == sorted(shapes, key=lambda shape: -shape[0]), "the largest first"
    return {rows: [tokens for tokens, own in shapes if own == rows] for _, rows in shapes}


def test_shapes_beside_a_prefill():
    assert beside_prefills(gpu_buckets(512, 16384, 16, ONE_STEP)) == {
        0: [16384, 1024, 512, 256, 128],
        64: [1024, 768, 512, 384, 256, 192, 128],
        448: [448],
        512: [16384, 10240, 7168, 5120, 3584, 2560, 1792, 1280, 896, 640],
    }
    assert beside_prefills(gpu_buckets(512, 512, 16, ONE_STEP)) == {
        0: [512, 256, 128],
        64: [384, 256, 192, 128],
        512: [512],
    }
    assert beside_prefills(gpu_buckets(64, 8192, 16, ONE_STEP)) == {
        0: [8192, 128],
        64: [8192, 5120, 3584, 2560, 1792, 1280, 896, 640, 448, 320, 224, 160, 128],
    }
    assert beside_prefills(gpu_buckets(512, 32, 16, ONE_STEP)) == {0: [32], 32: [32]}
    assert beside_prefills(gpu_buckets(8, 256, 16, ONE_STEP)) == {0: [256], 8: [256, 160]}
    assert beside_prefills(cpu_buckets(32, 1024, 16, ONE_STEP)) == {32: [1024, 144]}


@settings(deadline=None)
@given(data=st.data(), max_num_seqs=st.integers(1, 600), most=st.integers(2, 20_000), kind=KINDS)
def test_a_step_stops_short_of_padding(data, max_num_seqs, most, kind):
    """Where a smaller size is filled, and one for the rest is far below the size that all would have."""
    buckets = kind(max_num_seqs, most, 16, ONE_STEP)
    decodes = data.draw(st.integers(0, min(max_num_seqs, most) - 1))
    tokens = data.draw(st.integers(decodes + 1, most))

    def size_of(decodes, tokens):
        return buckets.shape_for(StepSizes(decodes, 1, tokens)).tokens

    taken, size = buckets.fitting(decodes, tokens), size_of(decodes, tokens)
    smaller = [
        shape.tokens
        for shape in buckets.mixed
        if shape.holds(StepSizes(decodes, 1, decodes + 1)) and decodes < shape.tokens < tokens
    ]
    if not smaller:
        assert taken == tokens
        return
    both = max(smaller) + size_of(decodes, tokens - max(smaller) + decodes)
    assert taken == (max(smaller) if both + STEP_TOKENS < size else tokens)


def test_a_long_prompt_in_two_steps():
    """Rather than padded by a fifth."""
    buckets = gpu_buckets(512, 16384, 16, ONE_STEP)
    asked = [(10, 12_000), (10, 5400), (300, 5300), (300, 6800), (10, 3510), (0, 600), (300, 16384), (400, 401)]
    assert [buckets.fitting(*sizes) for sizes in asked] == [10_240, 5120, 5120, 6800, 3510, 600, 16384, 401]


def test_sizes_of_steps_that_only_decode():
    sizes = {most: gpu_buckets(most, 256, 16, ONE_STEP).decode_rows for most in (1, 2, 3, 4, 5, 200, 512)}
    assert sizes == {
        1: (1,),
        2: (1, 2),
        3: (1, 3),
        4: (1, 4),
        5: (1, 5),
        200: (1, 4, 8, 16, 32, 64, 128, 200),
        512: (1, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512),
    }
    assert cpu_buckets(32, 1024, 16, ONE_STEP).decode_rows == (1, 16, 32)
