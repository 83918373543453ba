"""From arrays that lie on disk or in host memory to devices, each process what its own devices hold; and back."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from phantom_jax.checkpoints.arrays import Box, StoredArray, contiguous
from phantom_jax.ops.quantize import NF4_BLOCK, QuantizedTensor


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


def quantized_shardings(tensor: QuantizedTensor, kernel: NamedSharding) -> QuantizedTensor:
    """Shardings of the arrays of a quantised kernel of one layer that are split as the float kernel is.

    The blocks of NF4 run over the inputs: they are split where every part is whole blocks. What is small is not split.
    """
    spec = (*kernel.spec, *[None] * (len(tensor.shape) - len(kernel.spec)))
    inputs, outputs = spec[: len(tensor.input_shape)], spec[len(tensor.input_shape) :]

    def sharding(*axes: Any) -> NamedSharding:
        return NamedSharding(kernel.mesh, PartitionSpec(*axes))

    if tensor.kind == "int8":
        codes, scales, block_codes, block_mean = sharding(*inputs, *outputs), sharding(*outputs), None, None
    else:
        names = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0],) if inputs[0] else ()
        parts = int(np.prod([kernel.mesh.shape[name] for name in names]))
        whole = np.prod(tensor.input_shape) % (parts * NF4_BLOCK) == 0
        blocks = inputs[0] if whole else None
        codes, block_codes = sharding(blocks, None, *outputs), sharding(blocks, *outputs)
        scales, block_mean = sharding(), sharding()
    return QuantizedTensor(codes, scales, block_codes, block_mean, tensor.kind, tensor.input_shape, tensor.output_shape)
