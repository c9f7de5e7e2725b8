"""What sampling should do, in plain NumPy, row by row; and rows to try it on."""

from typing import NamedTuple

import numpy as np

COUNT, PROMPT, ENDS = (1 << 24) - 1, 1 << 24, 1 << 25


class Rows(NamedTuple):
    """Arguments of sampling_threshold: logits [R, V], the rest [R]."""

    logits: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray

    def one(self, i: int):
        return tuple(array[i] for array in self)


def rows_of(logits, settings) -> Rows:
    """Rows from logits and (temperature, top_k, top_p, min_p) for each."""
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    floats = (np.array(x, np.float32) for x in (logits, temperature, top_p, min_p))
    logits, temperature, top_p, min_p = floats
    return Rows(logits, temperature, np.array(top_k, np.int32), top_p, min_p)


def kept(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """[V] bool: which entries of one row may be drawn."""
    if temperature == 0:
        return logits == logits.max()
    with np.errstate(over="ignore"):  # to minus infinity
        weights = np.exp((logits - logits.max()) / temperature)  # probabilities over the largest one
    keep = weights >= min_p
    if top_k > 0:
        keep &= logits >= np.sort(logits)[-min(top_k, logits.size)]
    if top_p < 1:
        whole = weights[keep].sum(dtype=np.float64)
        for value in np.unique(logits)[::-1]:
            if weights[keep & (logits >= value)].sum(dtype=np.float64) >= top_p * whole:
                break
        keep &= logits >= value
    return keep & (logits > -np.inf)


def distribution(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """[V] float64: with which probability each entry of one row is drawn."""
    keep = kept(logits, temperature, top_k, top_p, min_p)
    scale = temperature or 1  # what is kept at 0 is equally large
    weights = np.where(keep, np.exp((logits - logits.max()) / np.float64(scale)), 0)
    return weights / weights.sum()


def random_rows(seed: int, rows: int, vocab: int, scale=3.0) -> Rows:
    """All kinds of settings mixed, over logits of which some are tied or masked."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((rows, vocab))
    logits[::3] = np.round(logits[::3])
    logits[1::5] = np.where(rng.random(logits[1::5].shape) < 0.5, -np.inf, logits[1::5])
    logits[:, rng.integers(vocab)] = scale  # one that is never masked
    temperature = rng.choice([0, 0.01, 0.3, 1, 2, 100], rows)
    top_k = rng.choice([0, 0, 1, 2, 20, vocab - 1, vocab, vocab + 7], rows)
    top_p = rng.choice([1, 1, 0.999, 0.95, 0.5, 0.1, 1e-6], rows)
    min_p = rng.choice([0, 0, 0, 1e-6, 0.05, 0.5, 1], rows)
    return rows_of(logits, zip(temperature, np.maximum(top_k, 0), top_p, min_p, strict=True))


def adjusted(logits, counts, bias, suppress_ends, repetition, frequency, presence) -> np.ndarray:
    """[V] float64: one row with its bias, mask and penalties."""
    x = logits.astype(np.float64) + bias
    if suppress_ends:
        x[counts & ENDS != 0] = -np.inf
    generated = counts & COUNT
    seen = (generated > 0) | (counts & PROMPT != 0)
    x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    return x - frequency * generated - presence * (generated > 0)


def logprobs(logits, token, num_top):
    """(logprob, rank, ids [num_top], logprobs [num_top]) of one row."""
    x = logits.astype(np.float64)
    all_logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
    best = np.lexsort((np.arange(x.size), -x))[:num_top]
    return all_logprobs[token], 1 + (x > x[token]).sum(), best, all_logprobs[best]
