"""Writes safetensors block by block: the header first, then the tensors' bytes as they come."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from phantom_jax.checkpoints.arrays import made_ahead
from phantom_jax.checkpoints.tensor_files import DTYPES, INDEX, WEIGHTS
from phantom_jax.json_files import write_json

SHARD_BYTES = 5_000_000_000
"""As large as the shards that Hugging Face's libraries wrote when these models were published."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is yet to be written.

    Attributes:
      name, shape, dtype: as in the file.
      blocks: gives its elements in order, in flat arrays that are each made when called, maybe several at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[Callable[[], np.ndarray]]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(directory: pathlib.Path, tensors: Sequence[Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`; where that would be larger than `shard_bytes`, shards with an index.

    A tensor larger than that has a shard of its own. All is on the disk when this returns.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def write_file(path: pathlib.Path, tensors: Sequence[Tensor]) -> None:
    """Writes one file.

    Raises:
      RuntimeError: the blocks of a tensor are not of its dtype, or not as many bytes as its shape says.
    """
    # Wide dtypes first, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    # Readers of the PyTorch world want this metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        missing = {tensor.name: tensor.nbytes for tensor in tensors}
        makers = (functools.partial(_made, tensor, block) for tensor in tensors for block in tensor.blocks())
        with contextlib.closing(made_ahead(makers)) as blocks:
            for name, block in blocks:
                _write_all(file, memoryview(block.view(np.uint8)))
                missing[name] -= block.nbytes
        wrong = [f"{name} by {-count:+}" for name, count in missing.items() if count]
        if wrong:
            raise RuntimeError(f"{path} is not what its header says, bytes differ: {', '.join(wrong)}")
        os.fsync(file.fileno())


def _made(tensor: Tensor, block: Callable[[], np.ndarray]) -> tuple[str, np.ndarray]:
    array = block()
    if array.dtype != tensor.dtype:
        raise RuntimeError(f"{tensor.name} is to be {tensor.dtype}, a block of it is {array.dtype}")
    return tensor.name, array


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
