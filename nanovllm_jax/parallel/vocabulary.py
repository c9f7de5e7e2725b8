"""Logits of which each device has its part of the vocabulary: what needs whole rows, with the results of a whole one.

Devices exchange parts, so that each has some of the rows whole, and never all. They do in every step, whatever its rows
ask for: a branch around an exchange would be the host's to take, and the host would wait at it for the device.

R rows, V vocabulary, N devices; a device has logits [R, V / N].
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nanovllm_jax.parallel.sharding import MODEL_AXIS, first_of_shard, is_split


def by_rows(function: Callable, logits: Sequence[jax.Array], *args: jax.Array) -> Any:
    """function(*logits [R, V], *args [R, ...]) -> arrays [R, ...], of which each device computes R / N rows.

    logits: [R, V / N] each, of one dtype; args: the same on every device, as the results are, which are of one dtype.
    """
    if not is_split():
        return function(*logits, *args)
    rows, devices = len(args[0]), lax.axis_size(MODEL_AXIS)
    share = -(-rows // devices)

    def padded(x):  # with the last row, which asks for no more than it does itself
        return jnp.pad(x, [(0, share * devices - rows)] + [(0, 0)] * (x.ndim - 1), mode="edge")

    parts = jnp.stack([padded(x) for x in logits])  # one array, so that it is one exchange
    whole = lax.all_to_all(parts, MODEL_AXIS, split_axis=1, concat_axis=2, tiled=True)  # (len(logits), R / N, V)
    mine = [lax.dynamic_slice_in_dim(padded(x), first_of_shard(share), share) for x in args]
    results, treedef = jax.tree.flatten(function(*whole, *mine))
    columns = jnp.concatenate([x.reshape(share, -1) for x in results], axis=1)  # as above, one exchange
    columns = lax.all_gather(columns, MODEL_AXIS, tiled=True)[:rows]
    ends = np.cumsum([x.size // share for x in results])[:-1]
    parts = zip(jnp.split(columns, ends, axis=1), results)
    return jax.tree.unflatten(treedef, [part.reshape(rows, *x.shape[1:]) for part, x in parts])
