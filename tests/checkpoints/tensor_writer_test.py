"""Safetensors as the format's own library reads them, and what must not be written."""

import functools
import json
import runpy
import struct
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from phantom_jax.checkpoints import tensor_files
from phantom_jax.checkpoints.tensor_files import INDEX, WEIGHTS, TensorFiles
from phantom_jax.checkpoints.tensor_writer import Tensor, write_file, write_folder
from phantom_jax.errors import InputError
from tests.checkpoints import memory

DTYPES = [np.float16, np.float64, ml_dtypes.bfloat16, np.float32]
SHAPES = [(3,), (5, 7), (), (0, 4), (1, 3, 9), (11, 1)]


def tensor(name, array, step=5):
    """An array as a tensor that comes in blocks of `step` elements."""
    flat = array.reshape(-1)
    makers = [functools.partial(flat.__getitem__, slice(start, start + step)) for start in range(0, flat.size, step)]
    return Tensor(name, array.shape, array.dtype, lambda: iter(makers))


def arrays():
    rng = np.random.default_rng(0)
    return {
        f"{number}.weight": rng.standard_normal(shape).astype(DTYPES[number % len(DTYPES)])
        for number, shape in enumerate(SHAPES * 3)
    }


def check_alignment(path):
    """Header and tensors begin at multiples of what they hold, so that files may be mapped into memory."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for entry in header.values():
        assert (8 + size + entry["data_offsets"][0]) % tensor_files.DTYPES[entry["dtype"]].itemsize == 0
    return header


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("shard_bytes", [1, 100, 300])
def test_the_formats_library_reads_shards(shard_bytes, tmp_path):
    expected = arrays()
    write_folder(tmp_path, [tensor(name, array) for name, array in expected.items()], shard_bytes)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert list(index["weight_map"]) == list(expected)
    shards = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert [path.name for path in shards] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    found = {}
    for path in shards:
        header = check_alignment(path)
        assert {name for name, shard in index["weight_map"].items() if shard == path.name} == set(header)
        held = sum(expected[name].nbytes for name in header)
        assert held <= shard_bytes or sum(expected[name].nbytes > 0 for name in header) == 1
        found |= load_file(path)
    same(found, expected)
    ours = TensorFiles.of_folder(tmp_path)
    same({name: ours.read(name) for name in ours.names()}, expected)


def test_one_file_has_no_index(tmp_path):
    expected = arrays()
    write_folder(tmp_path, [tensor(name, array) for name, array in expected.items()])
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    check_alignment(tmp_path / WEIGHTS)
    same(load_file(tmp_path / WEIGHTS), expected)
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("count", "dtype", "message"),
    [
        (5, np.float32, r"model\.safetensors is not what its header says, bytes differ: b by -4$"),
        (7, np.float32, r"model\.safetensors is not what its header says, bytes differ: b by \+4$"),
        (0, np.float32, r"b by -24$"),
        # As many bytes, and other numbers.
        (12, np.float16, "b is to be float32, a block of it is float16"),
        (6, np.int32, "b is to be float32, a block of it is int32"),
    ],
)
def test_blocks_that_do_not_fit_the_header(count, dtype, message, tmp_path):
    good = tensor("a", np.ones((2, 3), np.float32))
    bad = Tensor("b", (2, 3), np.dtype(np.float32), tensor("b", np.ones(count, dtype)).blocks)
    with pytest.raises(RuntimeError, match=message):
        write_file(tmp_path / WEIGHTS, [good, bad, tensor("c", np.ones(3, np.float32))])


def test_what_two_tensors_lack_and_have_does_not_cancel(tmp_path):
    tensors = [
        Tensor(name, (4,), np.dtype(np.float32), tensor(name, np.ones(count, np.float32)).blocks)
        for name, count in (("a", 3), ("b", 5))
    ]
    with pytest.raises(RuntimeError, match=r"a by -4, b by \+4$"):
        write_file(tmp_path / WEIGHTS, tensors)


def test_an_error_ends_the_threads(tmp_path):
    before = set(threading.enumerate())

    def fail():
        raise InputError("the source is damaged")

    broken = Tensor("b", (9,), np.dtype(np.float32), lambda: iter([fail] * 9))
    with pytest.raises(InputError, match="the source is damaged") as caught:
        write_file(tmp_path / WEIGHTS, [tensor("a", np.ones(50, np.float32)), broken])
    # The error, which holds the frames of what it passed, is still there.
    assert caught.traceback and set(threading.enumerate()) <= before


def test_big_endian_machines_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(InputError, match="this machine is big-endian"):
        runpy.run_path(tensor_files.__file__)


def test_memory_is_that_of_some_blocks(tmp_path):
    grown = memory.growth(
        """
import pathlib, sys
import numpy as np
from phantom_jax.checkpoints.tensor_writer import Tensor, write_folder

def write(name, count):
    directory = pathlib.Path(sys.argv[1]) / name
    directory.mkdir()
    block = lambda: np.ones(1 << 20, np.float32)
    write_folder(directory, [Tensor("a", (count, 1 << 20), np.dtype(np.float32), lambda: iter([block] * count))])

write("warm", 1)
run = lambda: write("whole", 50)
""",
        tmp_path,
    )
    assert (tmp_path / "whole" / WEIGHTS).stat().st_size > 200 << 20
    assert grown < 60
