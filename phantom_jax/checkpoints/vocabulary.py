"""Embedding tables and heads with rows for new tokens, without the whole of them in memory."""

import functools
from typing import Any

import numpy as np

from phantom_jax.checkpoints.arrays import Box, StoredArray, once

# Share of the covariance of the rows that are there, as in the converter of the llava-hf models.
_SPREAD = 1e-5
_BLOCK = 1 << 22


def resize_rows(array: Any, size: int, *, seed: int, kept: int | None = None, axis: int = 0) -> Any:
    """The array with another number of rows, one for each token of a vocabulary.

    New rows are drawn from N(mean, 1e-5 covariance) of those that are kept, so that no new token is one that the head
    prefers, and no two are equal.

    Args:
      array: embedding [V, D], or head [D, V] with `axis` 1.
      size: number of rows of the result.
      seed: of the new rows.
      kept: how many of the first rows stay, byte for byte; by default all that fit.
      axis: the axis of the vocabulary.

    Returns:
      The array itself where nothing changes, else a `StoredArray` of its dtype. New rows are computed when one of them
      is first asked for: that reads the kept rows once, in blocks.
    """
    rows = array.shape[axis]
    kept = min(rows, size) if kept is None else kept
    if not 0 < kept <= min(rows, size):
        raise ValueError(f"{kept} of {rows} rows cannot be kept in {size}")
    if rows == kept == size:
        return array
    shape = tuple(size if place == axis else length for place, length in enumerate(array.shape))
    new_rows = once(functools.partial(_new_rows, array, kept, size - kept, seed, axis))

    def read(box: Box) -> np.ndarray:
        part = box[axis]
        found = []
        if part.stop <= kept or part.start < kept:
            found.append(np.asarray(array[_replace(box, axis, slice(part.start, min(part.stop, kept)))]))
        if part.stop > kept:
            new = slice(max(part.start - kept, 0), part.stop - kept)
            found.append(new_rows()[_replace(box, axis, new)])
        return found[0] if len(found) == 1 else np.concatenate(found, axis)

    return StoredArray(shape, array.dtype, read, axis)


def _replace(box: Box, axis: int, part: slice) -> Box:
    return (*box[:axis], part, *box[axis + 1 :])


def _new_rows(array: Any, kept: int, count: int, seed: int, axis: int) -> np.ndarray:
    """Draws rows as mean + sqrt(1e-5 / kept) sum_i z_i (row_i - mean) with normal z: the covariance is never formed."""
    rng = np.random.default_rng((seed, axis))
    width = array.shape[1 - axis]
    total, mixed, weights = np.zeros(width), np.zeros((count, width)), np.zeros(count)
    step = max(1, _BLOCK // width)
    for start in range(0, kept, step):
        block = np.asarray(array[_replace((slice(None),) * 2, axis, slice(start, min(start + step, kept)))])
        rows_ND = np.moveaxis(block, axis, 0).astype(np.float64)
        z_NC = rng.standard_normal((len(rows_ND), count))
        total += rows_ND.sum(0)
        mixed += z_NC.T @ rows_ND
        weights += z_NC.sum(0)
    mean = total / kept
    rows = mean + np.sqrt(_SPREAD / kept) * (mixed - weights[:, None] * mean)
    return np.moveaxis(rows.astype(array.dtype), 0, axis)
