"""Orbax arrays written and read part by part.

Orbax writes whole arrays, and an array of ours holds all layers of a model. Here a leaf is a `StoredArray`, and a
handler of its own writes one block after the other; Orbax still writes its metadata, joins the files and renames the
folder when all is done, so that every reader of Orbax checkpoints reads the result.
"""

import collections
import contextlib
import functools
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from phantom_jax.checkpoints.arrays import Box, StoredArray, contiguous, made_ahead
from phantom_jax.checkpoints.quantized import blocks, in_kernel
from phantom_jax.errors import InputError
from phantom_jax.trees import flatten, unflatten

BLOCK_BYTES = 1 << 25
_IN_FLIGHT_BYTES = 1 << 27
_CHUNK_BYTES = 1 << 20
# What zarr keeps beside the chunks of an array.
_DESCRIPTION = "/.zarray"


class _Leaf:
    """What the handler is registered for; everything else is Orbax's own to write."""

    def __init__(self, path: str, array: Any):
        self.path, self.array = path, array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)
        self.chunk = _chunk(self.shape, self.dtype.itemsize, in_kernel(path) or len(self.shape) > 2)


def _chunk(shape: tuple[int, ...], itemsize: int, layered: bool) -> tuple[int, ...]:
    """At most 1 MiB of one layer, cut along its longest axes: whatever axis a mesh splits, few bytes are read twice."""
    chunk = [1, *shape[1:]] if layered else list(shape)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


class _Handler(ocp.type_handlers.TypeHandler):
    """Writes leaves one block after the other, on a thread that Orbax makes for it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._stopped = False
        self._idle = threading.Event()
        self._idle.set()

    def stop(self) -> None:
        """Writes no more; nothing is on its way to the disk when this returns."""
        with self._lock:
            self._stopped = True
        self._idle.wait()

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos):
        raise NotImplementedError("leaves are only written")

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("leaves are only written")

    async def serialize(self, values, infos, args=None):
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(values, infos), name="blocks")]

    async def _write(self, leaves: Sequence[_Leaf], infos: Sequence[Any]) -> None:
        for info in infos:
            await info.await_path_creation()
        with self._lock:
            if self._stopped:
                return
            self._idle.clear()
        waiting: collections.deque[tuple[Any, int]] = collections.deque()
        try:
            await self._write_blocks(leaves, infos, waiting)
        finally:
            for written, _ in waiting:
                with contextlib.suppress(Exception):
                    await written
            self._idle.set()

    async def _write_blocks(self, leaves: Sequence[_Leaf], infos: Sequence[Any], waiting: collections.deque) -> None:
        # Orbax names the pool in the specification; who writes the folder syncs its files once, not after each block.
        context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 1 << 26}, "file_io_sync": False})
        stores = {leaf.path: await _create(leaf, info, context) for leaf, info in zip(leaves, infos, strict=True)}
        arrays = {leaf.path: leaf.array for leaf in leaves}
        work = blocks(arrays, BLOCK_BYTES, {leaf.path: leaf.chunk for leaf in leaves})
        flying = 0
        with contextlib.closing(made_ahead(functools.partial(_block, arrays[path], box) for path, box in work)) as made:
            for (path, box), block in zip(work, made, strict=True):
                if self._stopped:
                    return
                written = stores[path][box].write(block, can_reference_source_data_indefinitely=True)
                waiting.append((written, block.nbytes))
                flying += block.nbytes
                while flying > _IN_FLIGHT_BYTES:
                    oldest, size = waiting.popleft()
                    await oldest
                    flying -= size
        while waiting:
            await waiting.popleft()[0]


def _block(array: Any, box: Box) -> np.ndarray:
    return contiguous(np.asarray(array[box]))


async def _create(leaf: _Leaf, info: Any, context: tensorstore.Context) -> tensorstore.TensorStore:
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=leaf.shape,
        local_shape=leaf.chunk,
        dtype=leaf.dtype,
        process_index=jax.process_index(),
    )
    return await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=context)


def save(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of arrays as an Orbax checkpoint, in memory of some blocks.

    Args:
      path: a folder that does not exist yet; it appears complete or not at all.
      tree: its leaves are `StoredArray`, numpy's or jax's arrays.
    """
    leaves = unflatten({name: _Leaf(name, array) for name, array in flatten(tree).items()})
    writer = _Handler()
    registry = ocp.type_handlers.create_type_handler_registry((_Leaf, writer))
    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            try:
                checkpointer.save(path, args=ocp.args.PyTreeSave(leaves))
            finally:
                writer.stop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs a traceback for each thread that an error passes; the error itself is raised."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load(path: pathlib.Path) -> dict[str, Any]:
    """Opens an Orbax checkpoint as flat `StoredArray`s by path; nothing is read yet but what describes them.

    Raises:
      InputError: it is damaged; also later, when a damaged array is read.
    """
    base = {"driver": "ocdbt", "base": f"file://{path}/"}
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(base).result().list().result()]
        found = [key.removesuffix(_DESCRIPTION) for key in keys if key.endswith(_DESCRIPTION)]
        if not found:
            raise ValueError("it holds no arrays")
        # A chunk that is not there would be read as zeros.
        specs = [
            {"driver": "zarr", "kvstore": {**base, "path": name + "/"}, "fill_missing_data_reads": False}
            for name in found
        ]
        opening = [tensorstore.open(spec, read=True, open=True) for spec in specs]
        return {
            name.replace(".", "/"): _stored(path, store.result()) for name, store in zip(found, opening, strict=True)
        }
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _stored(path: pathlib.Path, store: tensorstore.TensorStore) -> StoredArray:
    def read(box: Box) -> np.ndarray:
        try:
            return store[box].read().result() if box else np.asarray(store.read().result())
        except (ValueError, OSError) as error:
            raise _damaged(path, error) from error

    return StoredArray(store.shape, store.dtype.numpy_dtype, read, 1 if store.ndim > 2 else 0)


def _damaged(path: pathlib.Path, error: Exception) -> InputError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"{path} cannot be read, it may be damaged ({said[0][:200]}): if so, save the model again")
