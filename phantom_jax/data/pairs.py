"""Every pair of answers of a training source once, for log-probabilities that are computed before training."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from phantom_jax.batch import Batch
from phantom_jax.data.pipeline import TrainingRows
from phantom_jax.data.rows import Asking, build_row


class PairBatches(Sequence[Batch]):
    """Batches of one shape that hold every pair of a training source once, by number, with `pair_ids`.

    A row holds one image and at most as many of its questions as a training row does of an image, so that a batch of as
    many rows takes no more memory than a training step's. The last batch is filled up with padding rows.

    Args:
      rows: the training source.
      batch_size: rows of a batch.

    Attributes:
      ids: [pairs, 2] int32, record and question of every pair, in order; that of the batches.
    """

    def __init__(self, rows: TrainingRows, batch_size: int):
        self._rows, self._batch_size = rows, batch_size
        self._shape = rows.single_shape()
        self._asked: list[tuple[int, tuple[int, ...]]] = []
        count = rows.options.questions_per_image
        for number, record in rows.taking_part():
            pairs = [index for index, question in rows.askable(record) if question.rejected]
            self._asked += [(number, tuple(pairs[at : at + count])) for at in range(0, len(pairs), count)]
        ids = [(number, question) for number, questions in self._asked for question in questions]
        self.ids = np.array(ids, np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return -(-len(self._asked) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        start = range(len(self))[index] * self._batch_size
        part = self._asked[start : start + self._batch_size]
        filled = [[self._asking(*one)] for one in part] + [[]] * (self._batch_size - len(part))
        rows = [build_row(one, self._rows.processor, self._shape, rejected=True) for one in filled]
        return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def _asking(self, number: int, questions: Sequence[int]) -> Asking:
        record = self._rows.records[number]
        return number, record, [record.questions[question] for question in questions]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the tokens and pixels of the pairs, and of their order."""
        digest, processor = hashlib.sha256(), self._rows.processor
        plain = {field.name: getattr(processor, field.name) for field in dataclasses.fields(processor)}
        tokenizer = plain.pop("tokenizer").to_str()
        texts = [tokenizer, json.dumps({**plain, "template": dataclasses.asdict(processor.template)})]
        _update(digest, *(text.encode() for text in texts), self.ids.tobytes())
        for number, questions in self._asked:
            record = self._rows.records[number]
            asked = [dataclasses.astuple(record.questions[question]) for question in questions]
            _update(digest, record.image, json.dumps([record.id, asked]).encode())
        return digest.hexdigest()


def _update(digest, *parts: bytes) -> None:
    for part in parts:
        # With its length, so that no two sequences of parts are the same bytes.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
