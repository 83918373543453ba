"""Where the numbers of our arrays stand in a published tensor: strided views, of which any part can be read or written.

Every layout that is published only permutes numbers. So one description serves whole tensors, single layers, the
slices of one device of a mesh, and both directions.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from phantom_jax.checkpoints.arrays import Box, copy_into

Axis = tuple[tuple[int, int], ...]
"""An axis of ours as (size, stride) factors, outermost first; more than one where heads of a group stand together."""

Fetch = Callable[[np.ndarray, int], np.ndarray]
"""Gives the elements of runs, one after the other: starts [n] and the length that all of them have."""


@dataclasses.dataclass(frozen=True)
class View:
    """One of our arrays inside a published tensor; offset and strides count elements."""

    offset: int
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for size, _ in axis) for axis in self.axes)

    @property
    def _factors(self) -> list[tuple[int, int]]:
        return [factor for axis in self.axes for factor in axis]

    @property
    def outermost(self) -> tuple[int, int, int, int]:
        """(axis, size, stride, inner) of the factor with the largest stride; a step along it is `inner` of its axis."""
        candidates = [
            (stride, axis, size, math.prod(s for s, _ in factors[place + 1 :]))
            for axis, factors in enumerate(self.axes)
            for place, (size, stride) in enumerate(factors)
            if size > 1
        ]
        stride, axis, size, inner = max(candidates, default=(1, 0, 1, 1))
        return axis, size, stride, inner

    def read(self, box: Box, fetch: Fetch) -> np.ndarray:
        """A part of the array; only the runs of elements that hold it are fetched."""
        ranges, cut = [], []
        for axis, part in zip(self.axes, box, strict=True):
            factor_ranges, first = _factor_ranges([size for size, _ in axis], part.start, part.stop)
            ranges += factor_ranges
            cut.append(slice(part.start - first, part.stop - first))
        counts = [stop - start for start, stop in ranges]
        if 0 in counts:
            return np.empty([b.stop - b.start for b in box], fetch(np.zeros(0, np.int64), 0).dtype)
        first = self.offset + sum(start * stride for (start, _), (_, stride) in zip(ranges, self._factors, strict=True))
        strides = [stride for _, stride in self._factors]
        order = sorted(range(len(counts)), key=lambda factor: (-strides[factor], factor))
        run, outer = 1, list(order)
        while outer and (counts[outer[-1]] == 1 or strides[outer[-1]] == run):
            run *= counts[outer.pop()]
        starts = np.full([1] * len(outer), first, np.int64)
        for place, factor in enumerate(outer):
            steps = np.arange(counts[factor], dtype=np.int64) * strides[factor]
            starts = starts + steps.reshape([-1 if axis == place else 1 for axis in range(len(outer))])
        elements = fetch(starts.reshape(-1), run).reshape([counts[factor] for factor in order])
        elements = elements.transpose(np.argsort(order)) if order else elements
        widths = iter(counts)
        merged = elements.reshape([math.prod(next(widths) for _ in axis) for axis in self.axes])
        return merged[tuple(cut)]

    def write(self, flat: np.ndarray, array: np.ndarray, start: int, box: Box) -> None:
        """Puts a part of the array, whole in all but the outermost factor, into the elements from `start` on."""
        if not self.axes:
            flat[self.offset - start] = array
            return
        axis, _, stride, inner = self.outermost
        sizes = []
        for place, factors in enumerate(self.axes):
            for size, factor_stride in factors:
                outermost = place == axis and factor_stride == stride and size > 1
                sizes.append((box[place].stop - box[place].start) // inner if outermost else size)
        first = self.offset + box[axis].start // inner * stride - start
        strides = [factor_stride * flat.itemsize for _, factor_stride in self._factors]
        place = np.lib.stride_tricks.as_strided(flat[first:], sizes, strides)
        copy_into(place, array.reshape(sizes))


def _factor_ranges(sizes: Sequence[int], start: int, stop: int) -> tuple[list[tuple[int, int]], int]:
    """The smallest box of factors that holds a range of their axis, and where on the axis that box begins."""
    if len(sizes) == 1:
        return [(start, stop)], start
    inner = math.prod(sizes[1:])
    first, last = start // inner, -(-stop // inner)
    if last - first == 1:
        ranges, begin = _factor_ranges(sizes[1:], start - first * inner, stop - first * inner)
        return [(first, last), *ranges], first * inner + begin
    return [(first, last), *((0, size) for size in sizes[1:])], first * inner


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published tensor and our arrays in it; together they are all of it, nothing twice."""

    shape: tuple[int, ...]
    views: tuple[View, ...]

    def blocks(self, arrays: Sequence[Any], limit: int, dtype: Any) -> Iterator[Callable[[], np.ndarray]]:
        """The tensor's elements in their order, in flat blocks of at most about `limit`, each made when called.

        Args:
          arrays: ours, of the shapes of the views; only the part for one block is read at a time.
          limit: elements; a block is never less than one step of the outermost axis.
          dtype: of the tensor.
        """
        for start, group in self._segments():
            _, size, stride, _ = self.views[group[0]].outermost
            steps = max(1, limit // max(stride, 1))
            for first in range(0, size, steps):
                last = min(first + steps, size)
                yield functools.partial(self._block, arrays, group, start, first, last, dtype)

    def _block(
        self, arrays: Sequence[Any], group: Sequence[int], start: int, first: int, last: int, dtype: Any
    ) -> np.ndarray:
        """Steps `first` to `last` of the outermost axis of a segment that begins at element `start`."""
        _, _, stride, _ = self.views[group[0]].outermost
        flat = np.empty((last - first) * stride, dtype)
        for index in group:
            view = self.views[index]
            axis, _, _, inner = view.outermost
            box = [slice(0, length) for length in view.shape]
            if box:
                box[axis] = slice(first * inner, last * inner)
            view.write(flat, np.asarray(arrays[index][tuple(box)]), start + first * stride, tuple(box))
        return flat

    def _segments(self) -> list[tuple[int, list[int]]]:
        """Views that follow each other, or that lie interleaved, with the first element of each such group."""
        segments: list[tuple[int, list[int]]] = []
        for index in sorted(range(len(self.views)), key=lambda index: self.views[index].offset):
            view = self.views[index]
            if segments:
                start, group = segments[-1]
                _, size, stride, _ = self.views[group[0]].outermost
                if view.offset < start + size * stride:
                    group.append(index)
                    continue
            segments.append((view.offset, [index]))
        return segments


def runs_of(starts: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Runs as (start, stop), those that touch joined."""
    for _, group in itertools.groupby(enumerate(starts.tolist()), lambda pair: pair[1] - pair[0] * length):
        members = [start for _, start in group]
        yield members[0], members[-1] + length
