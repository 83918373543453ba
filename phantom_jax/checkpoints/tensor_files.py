"""Safetensors on disk: headers read and checked first, then just the byte ranges that are asked for."""

import copy
import json
import math
import os
import pathlib
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from phantom_jax.checkpoints.layout import runs_of
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

if sys.byteorder != "little":
    raise InputError("weights are stored in little-endian order, and this machine is big-endian: use another one")

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The floating point dtypes of the format; weights have no others here."""

# What the format's own library allows.
_MAX_HEADER = 100_000_000
_MOST_LISTED = 20


def listed(found: Sequence[str]) -> str:
    """Names of a file for an error, one a line: not thousands of them, and none that would write over a terminal."""
    lines = [name if name.isprintable() else repr(name) for name in found[:_MOST_LISTED]]
    if len(found) > _MOST_LISTED:
        lines.append(f"and {len(found) - _MOST_LISTED} more")
    return "\n    ".join(lines)


def weight_map(path: pathlib.Path) -> dict[str, str]:
    """What an index of shards says: for each tensor the name of a file that exists beside it.

    Raises:
      InputError: it is damaged, or names a file of another folder or one that does not exist.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise InputError(f"{path} has no 'weight_map' of tensor names to file names")
    for name in sorted(set(index.values())):
        if pathlib.PurePath(name).name != name or name in ("", ".."):
            raise InputError(f"{path} names the shard {name!r}: not a file of {path.parent}")
        # Unlike that of pathlib, False for whatever cannot be the name of a file.
        if not os.path.isfile(path.parent / name):
            raise InputError(f"{path} names the shard {name!r}, which is missing: fetch it again")
    return index


class TensorFiles:
    """The tensors of some safetensors files by name, read part by part."""

    def __init__(self, paths: list[pathlib.Path]):
        """Opens files.

        Raises:
          InputError: one is damaged, or two of them hold a tensor of one name.
        """
        self._where: dict[str, tuple[pathlib.Path, int, str, tuple[int, ...]]] = {}
        self._descriptors: dict[pathlib.Path, int] = {}
        weakref.finalize(self, _close, self._descriptors)
        self._lock = threading.Lock()
        for path in paths:
            for name, entry in _header(path).items():
                if name in self._where:
                    raise InputError(
                        f"{self._where[name][0]} and {path} both hold the tensor {name!r}: take all from one place"
                    )
                self._where[name] = (path, *entry)

    @classmethod
    def of_folder(cls, directory: pathlib.Path) -> "TensorFiles":
        """The weights of a Hugging Face folder, in one file or in shards with an index.

        Raises:
          InputError: there are none, a shard is missing, damaged or outside the folder, or the index lists others.
        """
        if not (directory / INDEX).is_file():
            if (directory / WEIGHTS).is_file():
                return cls([directory / WEIGHTS])
            found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
            raise InputError(f"{directory} holds neither {WEIGHTS} nor {INDEX} (it holds {found})")
        index = weight_map(directory / INDEX)
        files = cls([directory / name for name in sorted(set(index.values()))])
        elsewhere = [name for name, (path, *_) in files._where.items() if index.get(name) not in (path.name, None)]
        missing = sorted(set(index) - set(files._where)) + sorted(elsewhere)
        if missing:
            raise InputError(f"{directory / INDEX} lists tensors that their shards do not hold:\n    {listed(missing)}")
        return files

    def only(self, names: Iterable[str]) -> "TensorFiles":
        """The same files, as if they held these tensors alone."""
        some = copy.copy(self)
        # The files are closed when the last of the two goes.
        some._whole = self
        some._where = {name: self._where[name] for name in names}
        return some

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][3]

    def dtype_name(self, name: str) -> str:
        """As the format spells it, `BF16`; not all of them are `DTYPES`."""
        return self._where[name][2]

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self.dtype_name(name)]

    def path(self, name: str) -> pathlib.Path:
        """The file that holds the tensor."""
        return self._where[name][0]

    def fetch(self, name: str) -> Callable[[np.ndarray, int], np.ndarray]:
        """The function by which a `layout.View` of the tensor is read."""
        path, offset, _, _ = self._where[name]
        dtype = self.dtype(name)

        def fetch(starts: np.ndarray, length: int) -> np.ndarray:
            elements = np.empty(len(starts) * length, dtype)
            place = memoryview(elements.view(np.uint8))
            for start, stop in runs_of(starts, length):
                size = (stop - start) * dtype.itemsize
                self._read(path, place[:size], offset + start * dtype.itemsize)
                place = place[size:]
            return elements

        return fetch

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, for the small ones."""
        shape = self.shape(name)
        return self.fetch(name)(np.zeros(1, np.int64), math.prod(shape)).reshape(shape)

    def _read(self, path: pathlib.Path, place: memoryview, offset: int) -> None:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
        while place:
            # Not mapped into memory: pages that were looked at would count as memory of this process.
            count = os.preadv(self._descriptors[path], [place], offset)
            if count == 0:
                raise InputError(f"{path} ends at byte {offset}, in the middle of a tensor: fetch it again")
            place, offset = place[count:], offset + count


def _close(descriptors: dict[pathlib.Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _header(path: pathlib.Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """For each tensor where its data begin in the file, its dtype and its shape."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            content = file.read(size) if size <= _MAX_HEADER else b""
        # The format's library checks that ranges fit the shapes, do not overlap and fill the file.
        try:
            with safetensors.safe_open(path, framework="np"):
                pass
        except safetensors.SafetensorError as error:
            raise ValueError(_misfit(content) or error) from error
        entries = json.loads(content, object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no readable safetensors file, fetch it again: {error}") from error
    entries.pop("__metadata__", None)
    return {
        name: (8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def _misfit(content: bytes) -> str | None:
    """The first tensor whose bytes are not as many as its shape says; the format's library leaves its name out."""
    try:
        for name, entry in json.loads(content).items():
            if name != "__metadata__" and entry["dtype"] in DTYPES:
                start, stop = entry["data_offsets"]
                needed = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
                if stop - start != needed:
                    return f"{name!r} is {entry['dtype']} {entry['shape']}, {needed} bytes, and has {stop - start}"
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"its header holds {name!r} twice")
        unique[name] = value
    return unique
