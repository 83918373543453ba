"""Lazy arrays against numpy, and what is made ahead in threads."""

import contextlib
import itertools
import threading
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phantom_jax.checkpoints.arrays import (
    StoredArray,
    boxes,
    cast,
    contiguous,
    copy_into,
    layer_of,
    made_ahead,
    once,
    stack,
)

SHAPES = pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 3), (2, 3, 4, 5)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32, np.float64], ids=str)


def numbers(shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def stored(array, block_axis=0):
    return StoredArray(array.shape, array.dtype, lambda box: array[box], block_axis)


class Sliced:
    """Gives parts, and never all of itself."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.asked = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        self.asked.append(index)
        return self.array[index]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the whole array was read")


def random_index(rng, shape):
    """Integers, slices of all kinds and perhaps `...`, for the first axes or all of them."""
    parts = []
    for size in shape:
        if size and rng.random() < 0.3:
            parts.append(int(rng.integers(-size, size)))
        else:
            ends = [None if rng.random() < 0.2 else int(rng.integers(-size - 2, size + 3)) for _ in range(2)]
            parts.append(slice(*ends))
    if rng.random() < 0.5:
        start, stop = sorted(rng.integers(0, len(parts) + 1, 2))
        parts[start:stop] = [...]
    elif parts:
        parts = parts[: rng.integers(1, len(parts) + 1)]
    return parts[0] if len(parts) == 1 and rng.random() < 0.5 else tuple(parts)


@SHAPES
def test_parts_are_numpys(shape):
    rng = np.random.default_rng(0)
    array = numbers(shape)
    lazy = stored(array)
    assert (lazy.ndim, lazy.size, lazy.nbytes) == (array.ndim, array.size, array.nbytes)
    for _ in range(200):
        index = random_index(rng, shape)
        part, expected = lazy[index], np.asarray(array[index])
        assert part.shape == expected.shape and part.dtype == expected.dtype, index
        np.testing.assert_array_equal(part, expected, err_msg=str(index))
    np.testing.assert_array_equal(np.asarray(lazy), array)
    assert np.asarray(lazy, np.int32).dtype == np.int32


@pytest.mark.parametrize(
    "index", [3, -4, (0, 4), (0, 0, 0), slice(None, None, 2), (..., slice(None, None, -1))], ids=str
)
def test_other_indices_are_refused(index):
    with pytest.raises(IndexError):
        stored(numbers((3, 4)))[index]


@pytest.mark.parametrize("limit", [1, 40, 100, 10_000])
@pytest.mark.parametrize("layered", [None, True])
@pytest.mark.parametrize("chunk", [None, (1, 2, 3)])
@pytest.mark.parametrize(
    ("shape", "axis"), [((7,), 0), ((4, 9), 0), ((4, 9), 1), ((3, 5, 8), 1), ((3, 5, 8), 2)], ids=str
)
def test_boxes_hold_every_number_once(shape, axis, chunk, layered, limit):
    array = stored(numbers(shape), axis)
    chunk = chunk and chunk[: len(shape)]
    stacked = layered or len(shape) > 2
    axis = max(axis, 1) if stacked and len(shape) > 1 else axis
    row = int(np.prod([size for place, size in enumerate(shape) if place != axis and not (stacked and place == 0)]))
    seen = np.zeros(shape, int)
    for box in boxes(array, limit, chunk, layered=layered):
        seen[box] += 1
        part = array[box]
        assert part.nbytes <= max(limit, 4 * row * (chunk[axis] if chunk else 1))
        assert not stacked or part.shape[0] == 1
        if chunk:
            assert all(part.start % size == 0 for part, size in zip(box, chunk, strict=True))
    np.testing.assert_array_equal(seen, 1)


def test_boxes_of_one_number():
    assert list(boxes(numbers(()), 1)) == [()]


def test_a_stack_reads_what_is_asked_for():
    parts = [Sliced(numbers((6, 5)) + 100 * layer) for layer in range(4)]
    whole = stack(parts)
    expected = np.stack([part.array for part in parts])
    rng = np.random.default_rng(0)
    for _ in range(100):
        index = random_index(rng, whole.shape)
        np.testing.assert_array_equal(whole[index], expected[index], err_msg=str(index))
    for part in parts:
        part.asked.clear()
    np.testing.assert_array_equal(whole[2:3, 1:3, 4], expected[2:3, 1:3, 4])
    assert [part.asked for part in parts] == [[], [], [(slice(1, 3), slice(4, 5))], []]


@DTYPES
def test_a_stack_keeps_dtype_and_order(dtype):
    whole = stack([stored(numbers((2, 3), dtype), block_axis=1)] * 2)
    assert whole.block_axis == 2 and whole.dtype == dtype
    assert whole[0:0].dtype == dtype and whole[0:0].shape == (0, 2, 3)
    np.testing.assert_array_equal(whole, np.stack([numbers((2, 3), dtype)] * 2))


def test_a_stack_of_jax_arrays_and_of_single_numbers():
    parts = [jnp.full((3, 2), layer, jnp.bfloat16) for layer in range(3)]
    np.testing.assert_array_equal(stack(parts)[1:, :2], np.stack(parts)[1:, :2])
    np.testing.assert_array_equal(stack(list(jnp.arange(4.0)))[1:3], [1, 2])


def test_layers_and_casts_stay_lazy():
    source = Sliced(numbers((3, 4, 5)))
    lazy = StoredArray(source.shape, source.dtype, source.__getitem__, block_axis=2)
    layer = layer_of(cast(lazy, ml_dtypes.bfloat16), 1)
    assert (layer.shape, layer.dtype, layer.block_axis, source.asked) == ((4, 5), ml_dtypes.bfloat16, 1, [])
    np.testing.assert_array_equal(layer[1:3], source.array[1, 1:3].astype(ml_dtypes.bfloat16))
    assert source.asked == [(slice(1, 2), slice(1, 3), slice(0, 5))]
    assert cast(lazy, np.float32) is lazy


@DTYPES
@pytest.mark.parametrize("shape", [(5,), (70, 90), (17, 33, 20), (1, 80, 90), ()], ids=str)
def test_copies_are_numpys(shape, dtype):
    rng = np.random.default_rng(0)
    for axes in itertools.permutations(range(len(shape))):
        source = rng.integers(0, 256, shape).astype(dtype).transpose(axes)
        copy = contiguous(source)
        assert copy.flags.c_contiguous and copy.dtype == source.dtype
        np.testing.assert_array_equal(copy, source)
        # Into every second element of an array with the axes the other way round.
        target = np.zeros([2 * size for size in reversed(source.shape)], dtype).T[
            (..., *[slice(None, None, 2)] * source.ndim)
        ]
        copy_into(target, source)
        np.testing.assert_array_equal(target, source)
    whole = np.zeros(shape)
    copy_into(whole, numbers(shape, dtype))
    np.testing.assert_array_equal(whole, numbers(shape, dtype))


def test_once_in_many_threads():
    made, ready = [], threading.Barrier(8)

    @once
    def slow(name="a"):
        made.append(name)
        time.sleep(0.05)
        return object()

    found = []

    def ask():
        ready.wait()
        found.append(slow())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"] and len(found) == 8 and len(set(map(id, found))) == 1


def test_once_keeps_the_latest():
    made = []
    get = once(made.append, 2)
    for key in (1, 2, 1, 3, 1, 2):
        get(key)
    assert made == [1, 2, 3, 1, 2]


def test_what_is_made_ahead_keeps_its_order():
    before = set(threading.enumerate())

    def make(number):
        time.sleep(0.002 * (number % 3))
        return number

    assert list(made_ahead(lambda n=n: make(n) for n in range(30))) == list(range(30))
    assert list(made_ahead([])) == []
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_not_far_ahead(depth):
    before = set(threading.enumerate())
    begun = []
    with contextlib.closing(made_ahead((lambda n=n: begun.append(n) for n in range(100)), depth)) as made:
        for used, _ in enumerate(itertools.islice(made, 20), start=1):
            time.sleep(0.001)
            assert used <= len(begun) <= used + depth
    # Left in the middle, nothing more is begun and the threads are gone.
    assert len(begun) <= 20 + depth and set(threading.enumerate()) <= before


def test_errors_are_passed_on():
    before = set(threading.enumerate())

    def fail():
        raise OSError("no more")

    made = made_ahead([lambda: 1, lambda: 2, fail, *[lambda: 3] * 50])
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(OSError, match="no more"):
        next(made)
    assert set(threading.enumerate()) <= before
    with pytest.raises(StopIteration):
        next(made)
