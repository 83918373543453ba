"""Orbax checkpoints written block by block; that Orbax reads them is in tests/conversion_test.py."""

import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore

from phantom_jax.checkpoints import orbax_stream
from phantom_jax.checkpoints.arrays import StoredArray
from phantom_jax.errors import InputError
from phantom_jax.trees import flatten
from tests.checkpoints import memory


def stored(array, block_axis=0):
    return StoredArray(array.shape, array.dtype, lambda box: array[box], block_axis)


def tree():
    rng = np.random.default_rng(0)
    return {
        "number": np.asarray(2.5, np.float32),
        "norm": stored(rng.standard_normal(50).astype(np.float32)),
        "head": stored(rng.standard_normal((20, 33)), block_axis=1),
        "layers": {
            "half": stored(rng.standard_normal((3, 17, 11)).astype(ml_dtypes.bfloat16), block_axis=1),
            "last": stored(rng.standard_normal((2, 5, 7, 9)).astype(np.float16), block_axis=3),
            "device": jnp.asarray(rng.standard_normal((2, 6, 5)), jnp.bfloat16),
            "query": {"kernel": {"codes": stored(rng.integers(0, 255, (3, 8, 6)).astype(np.uint8))}},
            "mean": {"kernel": {"block_mean": stored(rng.standard_normal(3).astype(np.float32))}},
        },
    }


@pytest.mark.parametrize(("block", "chunk"), [(1 << 25, 1 << 20), (400, 200), (1, 64)])
def test_parts_read_back(block, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(orbax_stream, "_CHUNK_BYTES", chunk)
    expected = flatten(tree())
    orbax_stream.save(tmp_path / "saved", tree())
    found = orbax_stream.load(tmp_path / "saved")
    assert found.keys() == expected.keys()
    rng = np.random.default_rng(1)
    for path, array in expected.items():
        whole = np.asarray(array)
        assert (found[path].shape, found[path].dtype) == (whole.shape, whole.dtype), path
        assert np.asarray(found[path]).tobytes() == whole.tobytes(), path
        for _ in range(5):
            ends = [sorted(rng.integers(0, size + 1, 2)) for size in whole.shape]
            box = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(found[path][box], whole[box])


def test_each_chunk_is_of_one_layer(tmp_path):
    """Whoever reads a layer reads nothing else."""
    orbax_stream.save(tmp_path / "saved", tree())
    for path, array in flatten(tree()).items():
        if not array.ndim:
            continue
        spec = {"driver": "zarr", "kvstore": opened(tmp_path / "saved", path).spec().to_json()}
        chunk = tensorstore.open(spec, read=True, open=True).result().chunk_layout.read_chunk.shape
        layered = array.ndim > 2 or "/kernel/" in path
        assert chunk == ((1, *array.shape[1:]) if layered else array.shape), path


def opened(folder, path):
    """Description and chunks of an array by name."""
    prefix = path.replace("/", ".") + "/"
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/", "path": prefix}).result()


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_chunk_is_no_zeros(how, tmp_path):
    orbax_stream.save(tmp_path / "saved", tree())
    chunks = opened(tmp_path / "saved", "layers/half")
    names = sorted(name.decode() for name in chunks.list().result())
    assert names == [".zarray", "0.0.0", "1.0.0", "2.0.0"]
    content = chunks.read("1.0.0").result().value
    assert len(content) == 17 * 11 * 2
    chunks.write("1.0.0", None if how == "gone" else content[:-2]).result()
    found = orbax_stream.load(tmp_path / "saved")
    half = np.asarray(tree()["layers"]["half"])
    for index in (1, ...):
        with pytest.raises(InputError, match="cannot be read, it may be damaged"):
            found["layers/half"][index]
    np.testing.assert_array_equal(found["layers/half"][2], half[2])
    np.testing.assert_array_equal(found["head"], tree()["head"])


def test_no_arrays_at_all(tmp_path):
    with pytest.raises(InputError, match="it may be damaged .it holds no arrays"):
        orbax_stream.load(tmp_path)


def test_an_error_ends_the_threads(tmp_path):
    before = set(threading.enumerate())

    def read(box):
        if box[0].start:
            raise InputError("the source is damaged")
        return np.ones([part.stop - part.start for part in box], np.float32)

    broken = {"a": np.ones(3), "b": StoredArray((9, 4, 4), np.float32, read)}
    with pytest.raises(InputError, match="the source is damaged"):
        orbax_stream.save(tmp_path / "saved", broken)
    assert not (tmp_path / "saved").exists()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("ThreadPool")]


def test_memory_is_that_of_some_blocks(tmp_path):
    grown = memory.growth(
        """
import pathlib, sys
import numpy as np
from phantom_jax.checkpoints import orbax_stream
from phantom_jax.checkpoints.arrays import StoredArray

orbax_stream.BLOCK_BYTES, orbax_stream._IN_FLIGHT_BYTES = 1 << 22, 1 << 24

def write(name, layers):
    def read(box):
        return np.ones([part.stop - part.start for part in box], np.float32)

    orbax_stream.save(pathlib.Path(sys.argv[1]) / name, {"a": StoredArray((layers, 1024, 1024), np.float32, read)})

write("warm", 2)
run = lambda: write("whole", 100)
""",
        tmp_path,
    )
    assert sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*")) > 400 << 20
    assert grown < 200, grown
