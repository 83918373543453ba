"""Arrays between host memory and devices."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phantom_jax.checkpoints.arrays import StoredArray
from phantom_jax.sharding.mesh import make_mesh
from phantom_jax.sharding.placement import on_host, place


@pytest.fixture
def mesh():
    return make_mesh({"data": 4, "tensor": 2})


SPECS = pytest.mark.parametrize("spec", [(), ("data",), ("tensor", "data"), (None, ("data", "tensor"))], ids=str)


@SPECS
def test_there_and_back(spec, mesh):
    array = np.arange(16 * 24).reshape(24, 16).astype(ml_dtypes.bfloat16).T
    lazy = StoredArray(array.shape, array.dtype, lambda box: array[box])
    placed = place(lazy, jax.sharding.NamedSharding(mesh, PartitionSpec(*spec)))
    assert isinstance(placed, jax.Array) and placed.dtype == array.dtype
    back = on_host(placed)
    for index in (..., 3, np.s_[2:9, 5:20], np.s_[0:16, 0:24], np.s_[4:4]):
        assert back[index].tobytes() == array[index].tobytes()
        np.testing.assert_array_equal(back[index], array[index])


def test_equal_parts_are_read_once(mesh):
    asked = []

    def read(box):
        asked.append(box)
        return np.zeros([part.stop - part.start for part in box])

    place(StoredArray((8, 8), np.float64, read), jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    assert sorted(box[0].start for box in asked) == [0, 2, 4, 6]


@pytest.mark.parametrize("index", [..., np.s_[0:16, 0:24]], ids=str)
def test_nothing_is_kept_on_the_host(index, mesh):
    """Jax keeps what it copied from several devices, and gives it again."""
    array = jax.device_put(np.ones((16, 24)), jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    back = on_host(array)
    first = back[index]
    assert not np.shares_memory(first, back[index]) and not np.shares_memory(first, np.asarray(array))
    assert np.shares_memory(np.asarray(array), np.asarray(array))
