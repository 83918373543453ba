"""The data sets by name: preparing them, and reading their records in any order."""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

from phantom_jax.errors import InputError

SOURCES = {
    "handwritten_numbers": "phantom_jax.data.records:HandwrittenNumbers:full",
    "handwritten_numbers/tiny": "phantom_jax.data.records:HandwrittenNumbers:tiny",
}
"""Name -> module, builder and its configuration; imported where it is needed."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about an image, with the right answer and a wrong one ("" where there is none)."""

    kind: str
    question: str
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One image, encoded, and what is asked about it."""

    id: str
    image: bytes
    digits: tuple[int, ...]
    rows: int
    questions: tuple[Question, ...]


class Records(Sequence[Record]):
    """The records of one split, read from disk one by one; safe to read from several threads."""

    def __init__(self, name: str, split: str, source: Sequence[dict[str, Any]]):
        self.name, self.split, self._source = name, split, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        fields = self._source[index]
        columns = fields["questions"]
        questions = zip(*(columns[field.name] for field in dataclasses.fields(Question)), strict=True)
        return Record(
            id=fields["id"].decode(),
            image=fields["image"],
            digits=tuple(map(int, fields["digits"])),
            rows=int(fields["rows"]),
            questions=tuple(Question(*(text.decode() for text in question)) for question in questions),
        )

    def __repr__(self) -> str:
        return f"Records({self.name}, {self.split}, {len(self)})"


def _builder(name: str, data_dir: str | os.PathLike):
    if name not in SOURCES:
        raise InputError(f"There is no data set {name!r}. Set data.name to one of: {', '.join(SOURCES)}.")
    module, builder, config = SOURCES[name].split(":")
    builder_class = getattr(importlib.import_module(module), builder)
    return builder_class(config=config, data_dir=os.fspath(data_dir), file_format="array_record")


def prepare(name: str, data_dir: str | os.PathLike) -> str:
    """Writes a data set's records under `data_dir`, unless they are there.

    Returns:
      The folder that they are in. An interrupted preparation leaves none.
    """
    builder = _builder(name, data_dir)
    builder.download_and_prepare()
    return os.fspath(builder.data_path)


def open_records(name: str, split: str, data_dir: str | os.PathLike) -> Records:
    """Opens one split of a prepared data set.

    Raises:
      InputError: there is no such data set or split, or it has not been prepared in `data_dir`.
    """
    import tensorflow_datasets as tfds

    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        raise InputError(f"{name} is not prepared in {data_dir}. Prepare it first, or set data.data_dir to where it is.")
    if split not in builder.info.splits:
        raise InputError(f"{name} has no split {split!r}. Set split to one of: {', '.join(builder.info.splits)}.")
    decoders = {"image": tfds.decode.SkipDecoding()}
    return Records(name, split, builder.as_data_source(split=split, decoders=decoders))
