"""How rows sample, as the kernels read it, of columns by name."""

import numpy as np

from nanovllm_jax.sampling_rows import FLOAT_COLUMNS, SamplingRows

ASKS_NOTHING = dict(seed_low=0, seed_high=0, temperature=1, top_k=0, top_p=1, min_p=0)
ASKS_NOTHING |= dict(repetition=1, frequency=0, presence=0, min_len=0, adjusts=0, num_top=-1)


def sampling_array(rows: int, **columns) -> np.ndarray:
    """[R, 12] int32: numbers for all rows or one a row, of SamplingRows by name, and `seeds` [R, 2]; rest: neutral."""
    if "seeds" in columns:
        columns["seed_low"], columns["seed_high"] = np.asarray(columns.pop("seeds"), np.uint32).T.view(np.int32)
    array = np.zeros((rows, len(SamplingRows._fields)), np.int32)
    for i, (name, value) in enumerate(SamplingRows(**(ASKS_NOTHING | columns))._asdict().items()):
        array[:, i] = np.asarray(value, np.float32).view(np.int32) if name in FLOAT_COLUMNS else value
    return array
