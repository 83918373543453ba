"""The data sets by name: preparing them, and reading their records in any order."""

import dataclasses
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from phantom_jax.data.conversation import TEMPLATES, Template
from phantom_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from phantom_jax.errors import InputError

SOURCES = {
    "handwritten_numbers": "phantom_jax.data.records:HandwrittenNumbers:full",
    "handwritten_numbers/tiny": "phantom_jax.data.records:HandwrittenNumbers:tiny",
}
"""Name -> module, builder and its configuration; imported where it is needed."""

TOKENIZER = "tokenizer"
"""Folder of a data set's tokenizer, beside its records."""


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


CACHE_BYTES = 2**28
"""How many bytes of encoded images `Records` keeps in memory."""


class Records(Sequence[Record]):
    """The records of one split, in any order; safe to read from several threads.

    What has been read stays in memory, up to `CACHE_BYTES`.
    """

    def __init__(self, name: str, split: str, source: Sequence[dict[str, Any]]):
        self.name, self.split, self._source = name, split, source
        self._cache: dict[int, Record] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        record = self._cache.get(index)
        if record is None:
            record = _to_record(self._source[index])
            if self._cached_bytes + len(record.image) <= CACHE_BYTES:
                self._cache[index] = record
                self._cached_bytes += len(record.image)
        return record

    def __repr__(self) -> str:
        return f"Records({self.name}, {self.split}, {len(self)})"


def _to_record(fields: dict[str, Any]) -> Record:
    columns = [fields["questions"][field.name] for field in dataclasses.fields(Question)]
    return Record(
        id=fields["id"].decode(),
        image=fields["image"],
        digits=tuple(map(int, fields["digits"])),
        rows=int(fields["rows"]),
        # The same few texts come again and again; one copy of each is kept.
        questions=tuple(
            Question(*(sys.intern(text.decode()) for text in question)) for question in zip(*columns, strict=True)
        ),
    )


def _builder(name: str, data_dir: str | os.PathLike):
    if name not in SOURCES:
        raise InputError(f"There is no data set {name!r}. The data sets are: {', '.join(SOURCES)}.")
    module, builder, config = SOURCES[name].split(":")
    builder_class = getattr(importlib.import_module(module), builder)
    return builder_class(config=config, data_dir=os.fspath(data_dir), file_format="array_record")


def _prepared(name: str, data_dir: str | os.PathLike):
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        others = [other for other in SOURCES if other != name and _builder(other, data_dir).is_prepared()]
        if others:
            raise InputError(
                f"{str(data_dir)!r} holds {' and '.join(others)}, not {name}. Set data.name to"
                f" {' or '.join(map(repr, others))}, or prepare {name} there (phantom-jax prepare --source={name}"
                " --target=FOLDER)."
            )
        raise InputError(
            f"{name} is not prepared in {str(data_dir)!r}. Prepare it there (phantom-jax prepare --source={name}"
            " --target=FOLDER), or give the folder that it was prepared in as data_dir."
        )
    return builder


def prepare(name: str, data_dir: str | os.PathLike) -> str:
    """Writes a data set's records and a tokenizer trained on them under `data_dir`, unless they are there.

    Returns:
      The folder that they are in. An interrupted preparation leaves nothing that counts as prepared.
    """
    builder = _builder(name, data_dir)
    if pathlib.Path(data_dir).exists() and not pathlib.Path(data_dir).is_dir():
        raise InputError(f"{data_dir} is a file; give a folder for the records.")
    builder.download_and_prepare()
    folder = pathlib.Path(os.fspath(builder.data_path))
    try:
        load_tokenizer(folder / TOKENIZER)
    except InputError:
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        template = TEMPLATES["qwen2"]
        tokenizer = train_tokenizer(_texts(open_records(name, "train", data_dir), template))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save_tokenizer(tokenizer, pathlib.Path(scratch) / TOKENIZER, end_of_answer=template.answer_end)
            (pathlib.Path(scratch) / TOKENIZER).rename(folder / TOKENIZER)
    return str(folder)


def _texts(records: Records, template: Template) -> Iterator[str]:
    yield from (template.user, template.assistant)
    for record in records:
        for question in record.questions:
            yield from (question.question, question.chosen, question.rejected)


def open_tokenizer(name: str, data_dir: str | os.PathLike) -> tokenizers.Tokenizer:
    """The tokenizer that was trained on a prepared data set; errors as `open_records`."""
    return load_tokenizer(_prepared(name, data_dir).data_path / TOKENIZER)


def open_records(name: str, split: str, data_dir: str | os.PathLike) -> Records:
    """Opens one split of a prepared data set.

    Raises:
      InputError: there is no such data set or split, or it has not been prepared in `data_dir`.
    """
    import tensorflow_datasets as tfds

    builder = _prepared(name, data_dir)
    if split not in builder.info.splits:
        raise InputError(f"{name} has no split {split!r}. Set split to one of: {', '.join(builder.info.splits)}.")
    decoders = {"image": tfds.decode.SkipDecoding()}
    return Records(name, split, builder.as_data_source(split=split, decoders=decoders))
