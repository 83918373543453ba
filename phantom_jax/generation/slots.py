"""Slots of a cache: which sizes exist, how a shared prefix gets into a row, how beams change places.

A row is [prefix | prompt | answers]. Each part is filled up to a size of its own with slots that nothing sees, and the
answers of a prompt (beams, samples) are branches of its row: they share prefix and prompt, and see nothing of one
another. Slot `t * branches + k` of the last part holds token t of branch k.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.models.cache import Cache, LayerCache


def bucket(count: int) -> int:
    """The smallest of 16, 32, 64, 128, 256, 384, 512, 768, 1024, ... that is `count` or more.

    Few sizes compile few programs; from 256 on, where empty slots begin to cost time, there are two to a doubling.
    """
    size = 16
    while size < count:
        if size >= 256 and size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def over_tokens(function: Callable[..., jax.Array], cache: Cache, *others: Cache) -> Cache:
    """Applies a function to all arrays with an axis of tokens, keys and values and where they stand; axis 1 is it."""
    layers = tuple(
        dataclasses.replace(jax.tree.map(function, *map(_tokens, same)), phantom=same[0].phantom)
        for same in zip(cache.layers, *(other.layers for other in others), strict=True)
    )
    structure = jax.tree.map(function, cache.structure, *(other.structure for other in others))
    return dataclasses.replace(cache, layers=layers, structure=structure)


def _tokens(layer: LayerCache) -> LayerCache:
    return dataclasses.replace(layer, phantom=None)


@functools.partial(jax.jit, static_argnames="slots", donate_argnames="cache")
def place_prefix(cache: Cache, prefix: Cache, row: jax.Array, *, slots: int) -> Cache:
    """A batch's cache with the first `slots` slots of a prefix [1, S, ...] in the first slots of one of its rows."""

    def put(whole, part):
        return jax.lax.dynamic_update_slice(whole, part[:, :slots], (row,) + (0,) * (whole.ndim - 1))

    return over_tokens(put, cache, prefix)


def reorder_branches(cache: Cache, parents_BK: jax.Array, new_slots: int) -> Cache:
    """The cache after branch k of each row took the place of branch `parents_BK[:, k]`; only answers are moved."""
    branches = parents_BK.shape[1]

    def move(whole):
        first = whole.shape[1] - new_slots * branches
        part = whole[:, first:].reshape(whole.shape[0], new_slots, branches, *whole.shape[2:])
        index = parents_BK.reshape(parents_BK.shape[0], 1, branches, *(1,) * (whole.ndim - 2))
        part = jnp.take_along_axis(part, index, axis=2).reshape(whole.shape[0], -1, *whole.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=1)

    # Where tokens stand does not change: token t of branch k is again in slot t * branches + k.
    return dataclasses.replace(over_tokens(move, cache), structure=cache.structure)


def left_padded(rows: list[np.ndarray], starts: list[int], *, length: int) -> dict[str, np.ndarray]:
    """Token ids, positions and segments [B, length] of rows that go on at position `starts[row]`."""
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("token_ids", "positions", "segment_ids")}
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        first = length - len(ids)
        batch["token_ids"][row, first:] = ids
        batch["positions"][row, first:] = np.arange(start, start + len(ids))
        batch["segment_ids"][row, first:] = 1
    return batch
