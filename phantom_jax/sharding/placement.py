"""From arrays that lie on disk or in host memory to devices, each process what its own devices hold; and back."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from phantom_jax.checkpoints.arrays import Box, StoredArray, contiguous


def place(array: Any, sharding: Sharding) -> jax.Array:
    """An array on devices.

    Args:
      array: anything with shape and dtype that gives numpy arrays for slices; slices are all that is asked of it.
      sharding: where it goes. Equal parts of several devices are read once.
    """
    if isinstance(array, jax.Array | np.ndarray):
        return jax.device_put(array, sharding)
    parts: dict[Any, np.ndarray] = {}

    def part(index):
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in parts:
            parts[key] = contiguous(np.asarray(array[index]))
        return parts[key]

    return jax.make_array_from_callback(tuple(array.shape), sharding, part)


def on_host(array: jax.Array) -> StoredArray:
    """The array, copied from its devices part by part, when a part is read."""

    def read(box: Box) -> np.ndarray:
        # An array keeps the host's copy of all of it; this one, which shares its buffers, goes with its copy.
        shards = [shard.data for shard in array.addressable_shards]
        same = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
        return np.asarray(same[box])

    return StoredArray(array.shape, array.dtype, read)
