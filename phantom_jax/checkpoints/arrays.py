"""Arrays that stay where they are until a part of them is asked for."""

import collections
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from phantom_jax.errors import InputError

Box = tuple[slice, ...]
"""One slice of step 1 for each axis, with both ends set."""


class StoredArray:
    """An array that is read part by part: `array[index]` reads that part alone, `np.asarray(array)` all of it.

    Attributes:
      shape: sizes of the axes.
      dtype: numpy's.
      block_axis: parts that follow each other along this axis also do so where the array is stored. Whoever walks
        through the array in blocks cuts it along this axis, or along the first, whose entries are layers.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[Box], np.ndarray], block_axis: int = 0):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.block_axis = min(block_axis, max(len(self.shape) - 1, 0))
        self._read = read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Numpy's basic indexing with integers, slices of step 1 and `...`."""
        box, dropped = resolve(index, self.shape)
        # Numpy gives a scalar for all of an array without axes.
        part = np.asarray(self._read(box))
        return part.reshape([b.stop - b.start for b, drop in zip(box, dropped, strict=True) if not drop])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[...]
        return whole if dtype is None else whole.astype(dtype)

    def __repr__(self) -> str:
        return f"StoredArray({self.dtype}{list(self.shape)})"


def resolve(index: Any, shape: tuple[int, ...]) -> tuple[Box, list[bool]]:
    """An index as a box, and for each axis whether an integer dropped it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    if len(parts) != len(shape):
        raise IndexError(f"{len(parts)} indices for an array of shape {shape}")
    box, dropped = [], []
    for part, size in zip(parts, shape, strict=True):
        drop = not isinstance(part, slice)
        if drop:
            start = part + size if part < 0 else part
            stop, step = start + 1, 1
            if not 0 <= start < size:
                raise IndexError(f"index {part} is outside an axis of size {size}")
        else:
            start, stop, step = part.indices(size)
        if step != 1:
            raise IndexError(f"stored arrays are read in steps of 1, not {step}")
        box.append(slice(start, max(start, stop)))
        dropped.append(drop)
    return tuple(box), dropped


def boxes(array: Any, limit: int, chunk: Sequence[int] | None = None, *, layered: bool | None = None) -> Iterator[Box]:
    """The array in parts of at most about `limit` bytes, in the order in which it is stored.

    Args:
      array: anything with shape and dtype.
      limit: bytes; a part is never less than a chunk.
      chunk: sizes of what is never cut, where parts need that.
      layered: whether the first axis counts layers, which are taken one by one; by default with more than two axes.
    """
    shape, chunk = tuple(array.shape), tuple(chunk or (1,) * len(array.shape))
    axis, itemsize = getattr(array, "block_axis", 0), np.dtype(array.dtype).itemsize
    if not (len(shape) > 2 if layered is None else layered):
        yield from _cut(shape, chunk, axis, limit // itemsize)
        return
    for layer in range(shape[0]):
        for box in _cut(shape[1:], chunk[1:], max(axis - 1, 0), limit // itemsize):
            yield (slice(layer, layer + 1), *box)


def _cut(shape: tuple[int, ...], chunk: tuple[int, ...], axis: int, limit: int) -> Iterator[Box]:
    """Boxes of at most about `limit` elements."""
    if not shape:
        yield ()
        return
    box = [slice(0, size) for size in shape]
    width = math.prod(shape) // max(shape[axis], 1)
    step = chunk[axis] * max(limit // max(width * chunk[axis], 1), 1)
    for start in range(0, shape[axis], step):
        box[axis] = slice(start, min(start + step, shape[axis]))
        yield tuple(box)


def layer_of(array: Any, layer: int) -> Any:
    """One entry of the first axis; of a `StoredArray` again one, nothing is read."""
    if not isinstance(array, StoredArray):
        return array[layer]
    shape, axis = array.shape[1:], max(array.block_axis - 1, 0)
    return StoredArray(shape, array.dtype, lambda box: array[(layer, *box)], axis)


def stack(arrays: Sequence[Any]) -> StoredArray:
    """Arrays of one shape on a new first axis, each read when it is asked for."""

    def read(box: Box) -> np.ndarray:
        layers = arrays[box[0]]
        if len(layers) == 1:
            return np.asarray(layers[0][box[1:]])[None]
        whole = np.empty([part.stop - part.start for part in box], arrays[0].dtype)
        for layer, array in enumerate(layers):
            copy_into(whole[layer : layer + 1], np.asarray(array[box[1:]])[None])
        return whole

    return StoredArray((len(arrays), *arrays[0].shape), arrays[0].dtype, read, getattr(arrays[0], "block_axis", 0) + 1)


def cast(array: Any, dtype: Any) -> Any:
    """The array in another dtype; of a `StoredArray` again one, nothing is read.

    Raises:
      InputError: a number is too large for the dtype; of a `StoredArray` when it is read.
    """
    if array.dtype == dtype:
        return array
    if not isinstance(array, StoredArray):
        return _converted(np.asarray(array), dtype)
    return StoredArray(array.shape, dtype, lambda box: _converted(array[box], dtype), array.block_axis)


def _converted(array: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    overflown = np.isinf(result) & ~np.isinf(array)
    if overflown.any():
        value = float(array[overflown][0])
        raise InputError(f"a weight of {value:.4g} overflows in {np.dtype(dtype)}: take bfloat16 or float32")
    return result


def once(make: Callable[..., Any], size: int = 1) -> Callable[..., Any]:
    """A function that keeps what it made, the last `size` results; a thread that asks for one in the making waits."""
    lock = threading.Lock()
    kept: dict[tuple[Any, ...], Any] = {}

    def get(*arguments: Any) -> Any:
        with lock:
            if arguments not in kept:
                kept[arguments] = make(*arguments)
                # The oldest, used or not: a thread that is late with it must not cost the newer ones their place.
                if len(kept) > size:
                    del kept[next(iter(kept))]
            return kept[arguments]

    return get


def made_ahead(makers: Iterable[Callable[[], Any]], depth: int = 2) -> Iterator[Any]:
    """What the makers give, in their order; the next `depth` are made in threads while one is used.

    Close it, `contextlib.closing`, where it is not used up: that waits for the threads.
    """
    pending: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(depth) as pool:
        try:
            for maker in makers:
                pending.append(pool.submit(maker))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy whose numbers stand in the order of its axes."""
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    copy_into(copy, array)
    return copy


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, several times as fast where the fastest axes of the two differ.

    Numpy walks along one of them, and each step along the other touches another cache line; a strip of 16 fits.
    """
    width = target.dtype.itemsize
    if source.dtype == target.dtype and width in (1, 2, 4, 8) and target.dtype.names is None:
        # Plain integers copy faster than dtypes that numpy does not know.
        target, source = target.view(f"u{width}"), source.view(f"u{width}")
    fast = [min(range(target.ndim), key=lambda axis: _pace(a, axis), default=0) for a in (target, source)]
    if fast[0] == fast[1] or target.size < 4096:
        target[...] = source
        return
    strip = [slice(None)] * target.ndim
    for start in range(0, target.shape[fast[0]], 16):
        strip[fast[0]] = slice(start, start + 16)
        target[tuple(strip)] = source[tuple(strip)]


def _pace(array: np.ndarray, axis: int) -> tuple[bool, int]:
    return array.shape[axis] == 1, abs(array.strides[axis])
