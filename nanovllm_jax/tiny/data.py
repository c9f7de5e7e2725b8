"""Training batches: conversations packed into rows, made by worker processes ahead of the device.

Legend: R rows, T tokens of a row.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nanovllm_jax.tiny.conversations import Segment, training_conversation

_ENCODED_AT_ONCE = 256  # conversations; the tokenizer is faster on many texts


class Batch(NamedTuple):
    """Rows of several conversations one after another; each starts at position 0, which is how they are told apart."""

    tokens: np.ndarray
    """[R, T] int16."""
    positions: np.ndarray
    """[R, T] int16 place in the conversation; 0 in the padding."""
    learned: np.ndarray
    """[R, T] bool: tokens that the model learns to predict."""


def encode(tokenizer: Tokenizer, conversations: list[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
    """Each conversation's token ids, and which of them are learned."""
    texts = [segment.text for conversation in conversations for segment in conversation]
    ids = iter(tokenizer.encode_batch_fast(texts))
    encoded = []
    for conversation in conversations:
        tokens, learned = [], []
        for segment in conversation:
            piece = next(ids).ids
            tokens += piece
            learned += [segment.learned] * len(piece)
        encoded.append((tokens, learned))
    return encoded


def pack(conversations: Iterator[tuple[list[int], list[bool]]], rows: int, length: int) -> Batch:
    """Fill `rows` rows of `length` tokens; a conversation longer than a row is left out."""
    batch = Batch(
        np.zeros((rows, length), np.int16), np.zeros((rows, length), np.int16), np.zeros((rows, length), bool)
    )
    row = column = 0
    for tokens, learned in conversations:
        if len(tokens) > length:
            continue
        if column + len(tokens) > length:
            row, column = row + 1, 0
            if row == rows:
                break
        span = slice(column, column + len(tokens))
        batch.tokens[row, span] = tokens
        batch.positions[row, span] = np.arange(len(tokens))
        batch.learned[row, span] = learned
        column += len(tokens)
    return batch


def make_batches(tokenizer: Tokenizer, seed: int, rows: int, length: int) -> Iterator[Batch]:
    """An endless stream of batches, the same for the same seed."""
    rng = Random(seed)

    def conversations() -> Iterator[tuple[list[int], list[bool]]]:
        while True:
            yield from encode(tokenizer, [training_conversation(rng) for _ in range(_ENCODED_AT_ONCE)])

    stream = conversations()
    while True:
        yield pack(stream, rows, length)


def _work(queue, tokenizer_json: str, seed: int, rows: int, length: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains, which ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    for batch in make_batches(Tokenizer.from_str(tokenizer_json), seed, rows, length):
        queue.put(batch)


@contextmanager
def batches_ahead(tokenizer: Tokenizer, seed: int, rows: int, length: int, workers: int) -> Iterator[Iterator[Batch]]:
    """`make_batches` by `workers` processes, some batches ahead; 0 makes them in this process, in a fixed order."""
    if workers == 0:
        yield make_batches(tokenizer, seed, rows, length)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(maxsize=4 * workers)
    arguments = (queue, tokenizer.to_str())
    processes = [
        context.Process(target=_work, args=(*arguments, seed + i, rows, length), daemon=True) for i in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        yield iter(partial(queue.get, timeout=120), None)  # workers that died must not be waited for
    finally:
        for process in processes:
            process.terminate()
            process.join()
        queue.close()
        queue.cancel_join_thread()
