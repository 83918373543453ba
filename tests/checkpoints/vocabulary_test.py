import ml_dtypes
import numpy as np
import pytest

from phantom_jax.checkpoints import vocabulary
from phantom_jax.checkpoints.arrays import StoredArray
from phantom_jax.checkpoints.vocabulary import resize_rows


def stored(array):
    """The array as one that is read part by part, and the list of how much was read at once."""
    sizes = []

    def read(box):
        sizes.append(array[box].size)
        return array[box]

    return StoredArray(array.shape, array.dtype, read), sizes


@pytest.fixture
def table(rng):
    return (3.0 + rng.normal(size=(50, 6))).astype(ml_dtypes.bfloat16)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("axis", [0, 1])
def test_old_rows_keep_their_bytes(table, axis):
    array = table if axis == 0 else np.ascontiguousarray(table.T)
    resized = resize_rows(array, 57, seed=1, kept=48, axis=axis)
    whole = np.asarray(resized)
    assert whole.dtype == table.dtype
    assert whole.shape == ((57, 6) if axis == 0 else (6, 57))
    rows = np.moveaxis(whole, axis, 0)
    assert rows[:48].tobytes() == table[:48].tobytes()
    for start, stop in ((0, 5), (40, 50), (48, 57), (50, 53), (56, 57), (7, 7)):
        part = resized[start:stop] if axis == 0 else resized[:, start:stop]
        np.testing.assert_array_equal(np.moveaxis(part, axis, 0), rows[start:stop])
    np.testing.assert_array_equal(np.moveaxis(resized[2:4, 1:5], axis, 0), np.moveaxis(whole[2:4, 1:5], axis, 0))


def test_cut(table):
    array, sizes = stored(table)
    assert np.asarray(resize_rows(array, 41, seed=0)).tobytes() == table[:41].tobytes()
    assert max(sizes) == 41 * 6


def test_nothing_to_do(table):
    assert resize_rows(table, 50, seed=0) is table


def test_old_rows_need_no_new_ones(table):
    array, sizes = stored(table)
    resize_rows(array, 60, seed=0)[3:5]
    assert sizes == [2 * 6]


def test_new_rows_have_mean_and_spread_of_the_old(rng):
    mixing = rng.normal(size=(3, 3))
    table = (rng.normal(size=(200, 3)) @ mixing + [5.0, -2.0, 0.0]).astype(np.float32)
    count = 20_000
    rows = np.asarray(resize_rows(table, 200 + count, seed=3))[200:].astype(np.float64)
    covariance = 1e-5 * np.cov(table.T.astype(np.float64), bias=True)
    deviation = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(rows.mean(0) - table.mean(0)) < 5 * deviation / np.sqrt(count))
    np.testing.assert_allclose(np.cov(rows.T), covariance, atol=0.05 * deviation.max() ** 2)


def test_new_rows_depend_on_the_seed_alone(table, monkeypatch):
    first = np.asarray(resize_rows(table, 60, seed=0))
    monkeypatch.setattr(vocabulary, "_BLOCK", 7 * 6)
    array, sizes = stored(table)
    again = np.asarray(resize_rows(array, 60, seed=0))
    assert max(sizes[1:]) == 7 * 6, "new rows are made in blocks"
    np.testing.assert_allclose(again.astype(np.float32), first.astype(np.float32), rtol=0.01)
    assert np.any(np.asarray(resize_rows(table, 60, seed=1)) != first)
    assert len(np.unique(first.astype(np.float32)[50:], axis=0)) > 1


def test_rows_that_are_not_there_cannot_be_kept(table):
    with pytest.raises(ValueError, match="51 of 50 rows"):
        resize_rows(table, 60, seed=0, kept=51)
