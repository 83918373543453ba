"""Records to batches: an endless, resumable stream for training, and a finite list for evaluation.

Row r of epoch e depends on nothing but (seed, e, r): which images it holds, which of their questions are asked, and how
it is laid out. So the state of the stream is one number, and a restart continues with exactly the next row.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from phantom_jax.batch import Batch
from phantom_jax.data.rows import KNOWS_ALL, Asking, Bound, RowShape, RowStructure, build_row, count_tiles, length_bound
from phantom_jax.data.sources import Question, Record, Records
from phantom_jax.errors import InputError
from phantom_jax.processor import Processor


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """What a training row holds.

    Attributes:
      questions_per_image: how many questions share an image; all of them where a record has fewer.
      images_per_row: how many images, each with its questions, are packed into a row. Those of many tiles go with those
        of few, so that rows are of nearly equal size and little is padding.
      kind_weights: how likely a kind of question is drawn, in proportion; 1 where not given, 0 for never.
      max_digits: only records of at most so many digits; None for all.
      rejected: whether the wrong answers come too; then some question must have one.
      pair_ids: whether rows say which question each of their pairs is.
      structure: what the model's attention tells apart.
      multiple: of which rows have some number of tokens, for devices that share a row out.
    """

    questions_per_image: int = 1
    images_per_row: int = 1
    kind_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_digits: int | None = None
    rejected: bool = False
    pair_ids: bool = False
    structure: RowStructure = KNOWS_ALL
    multiple: int = 1

    def __post_init__(self):
        for name in ("questions_per_image", "images_per_row", "max_digits"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}. Set it to 1 or more.")
        weights = dict(self.kind_weights)
        for kind, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"kind_weights.{kind} is {weight}. Set it to 0 or more.")
        object.__setattr__(self, "kind_weights", weights)


class TrainingRows:
    """The rows of all epochs by index: the random-access source that Grain reads.

    Args:
      records: where the rows come from.
      processor: tokenizer, template and tiling.
      options: what a row holds.
      seed: of the order of the records and of the choice of questions.

    Attributes:
      shape: of every row, large enough for whatever a row may come to hold.
      rows_per_epoch: how many rows one pass over the records makes.

    Raises:
      InputError: too few records are left, an unknown kind is weighted, or a conversation is longer than the context.
    """

    def __init__(self, records: Records, processor: Processor, options: RowOptions, seed: int):
        self.records, self.processor, self.options, self.seed = records, processor, options, seed
        self._measure()
        self.rows_per_epoch = len(self._indices) // options.images_per_row
        if not self.rows_per_epoch:
            raise InputError(
                f"{records!r} has {len(self._indices)} records that fit the options, fewer than a row's "
                f"{options.images_per_row}. Set max_digits or kind_weights higher, or images_per_row lower."
            )
        self.shape = self._bound_shape()
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)
        logging.info(
            "%r: %d records excluded by the options, %d rows an epoch of %d tokens and %d tiles, %d records left over",
            *(records, len(records) - len(self._indices), self.rows_per_epoch, self.shape.length, self.shape.tiles),
            len(self._indices) % options.images_per_row,
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __repr__(self) -> str:
        return f"TrainingRows({self.records!r}, {self.options!r}, seed={self.seed})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, row = divmod(int(index), self.rows_per_epoch)
        rng = np.random.default_rng([self.seed, 1, epoch, row])
        asking: list[Asking] = []
        for number in self._indices[self._plan(epoch)[row]].tolist():
            record = self.records[number]
            asking.append((number, record, self._draw(record, rng)))
        return build_row(asking, self.processor, self.shape, rejected=self.options.rejected)

    def taking_part(self) -> Iterator[tuple[int, Record]]:
        """The records that rows come from, with their numbers in the source."""
        for number in self._indices.tolist():
            yield number, self.records[number]

    def askable(self, record: Record) -> list[tuple[int, Question]]:
        """The questions of a record that may be asked, with their numbers."""
        weights = self.options.kind_weights
        return [(index, one) for index, one in enumerate(record.questions) if weights.get(one.kind, 1) > 0]

    def single_shape(self) -> RowShape:
        """The shape of a row that holds any one of the records, with as many questions as a training row, and ids."""
        options = self.options
        bound = Bound(*(int(lengths.max()) for lengths in self._lengths)).rounded_up(options.multiple)
        unfolded = options.structure.unfolded(1, options.questions_per_image * (1 + options.rejected), bound)
        tiles = int(self._tiles.max())
        return RowShape(bound.shared, tiles, options.questions_per_image, options.structure, unfolded)

    def _measure(self) -> None:
        """Finds the records that take part, how many tiles each has, and how many tokens it may come to."""
        weights, rejected = self.options.kind_weights, self.options.rejected
        most_digits = sys.maxsize if self.options.max_digits is None else self.options.max_digits
        bound = length_bound(self.processor, rejected=rejected)
        taking_part, kinds, pairs = [], set(), 0
        for index, record in enumerate(self.records):
            kinds.update(question.kind for question in record.questions)
            questions = [question for _, question in self.askable(record)]
            if questions and len(record.digits) <= most_digits:
                tiles = count_tiles(record, self.processor)
                pairs += sum(bool(question.rejected) for question in questions)
                lengths = bound(record, questions, tiles, min(len(questions), self.options.questions_per_image))
                taking_part.append((index, tiles, *lengths))
        unknown = sorted(set(weights) - kinds)
        if unknown:
            raise InputError(f"kind_weights has {', '.join(unknown)}, but the kinds are {', '.join(sorted(kinds))}.")
        if taking_part and rejected and not pairs:
            raise InputError(
                f"{self.records!r} has no rejected answer to any question that the options leave, and the objective"
                " compares two answers. Take data with rejected answers, or the objective sft."
            )
        self._indices, self._tiles, *self._lengths = np.array(taking_part, int).reshape(-1, 5).T

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """[rows, images_per_row] positions in `_indices`. The few that fill no row sit this epoch out."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(len(self._indices))[: self.rows_per_epoch * self.options.images_per_row]
        by_size = order[np.argsort(self._tiles[order], kind="stable")]
        return rng.permutation(self._fold(by_size))

    def _fold(self, by_size: np.ndarray) -> np.ndarray:
        """[rows * images_per_row], small ones first -> [rows, images_per_row] of nearly equal sums.

        Of the parts, from the smallest to the largest, every other one is taken backwards.
        """
        parts = by_size.reshape(self.options.images_per_row, self.rows_per_epoch)
        return np.stack([part[:: 1 - 2 * (number % 2)] for number, part in enumerate(parts)], axis=1)

    def _bound_shape(self) -> RowShape:
        options, (shared, apart, longest) = self.options, self._lengths
        sizes, place = np.unique(self._tiles, return_inverse=True)
        # Whichever sit out, the sizes of the others are at most those without the smallest ones.
        left_out = len(self._tiles) % options.images_per_row

        def up_to_size(lengths):
            # In a row's place for a record of a certain size any record up to that size may stand.
            return np.array([lengths[self._tiles <= size].max() for size in sizes])[place]

        def most(values):
            return int(self._fold(np.sort(values)[left_out:]).sum(axis=1).max())

        pairs = options.images_per_row * options.questions_per_image
        bound = Bound(most(up_to_size(shared)), most(up_to_size(apart)), int(longest.max()))
        bound = bound.rounded_up(options.multiple)
        return RowShape(
            bound.shared,
            most(self._tiles),
            pairs if options.pair_ids else 0,
            options.structure,
            options.structure.unfolded(options.images_per_row, pairs * (1 + options.rejected), bound),
        )

    def _draw(self, record: Record, rng: np.random.Generator) -> list[Question]:
        """Draws questions without replacement, by the weight of their kind."""
        weights = np.array([self.options.kind_weights.get(question.kind, 1) for question in record.questions], float)
        count = min(self.options.questions_per_image, np.count_nonzero(weights))
        chosen = rng.choice(len(weights), count, replace=False, p=weights / weights.sum())
        return [record.questions[index] for index in chosen]


def train_iterator(
    records: Records,
    processor: Processor,
    options: RowOptions | Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    threads: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator over batches, as `Batch` of numpy arrays, shuffled anew each epoch.

    Two iterators of equal arguments give equal batches, and after `set_state(get_state())` one goes on with exactly the
    batch that would have come next. All batches have one shape, that of `TrainingRows.shape`.

    Args:
      records: one split of a data set.
      processor: tokenizer, template and tiling.
      options: `RowOptions`, or its fields by name.
      batch_size: rows of a batch.
      seed: of the order of the records and of the choice of questions.
      threads: how many prepare batches ahead; their number changes no batch.

    Raises:
      InputError: as in `TrainingRows`.
    """
    if not isinstance(options, RowOptions):
        options = RowOptions(**options)
    return row_iterator(TrainingRows(records, processor, options, seed), batch_size=batch_size, threads=threads)


def row_iterator(rows: TrainingRows, *, batch_size: int, threads: int = 1) -> grain.DatasetIterator:
    """The iterator of `train_iterator` over given rows."""
    rows = grain.MapDataset.source(rows).batch(batch_size)
    return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def evaluation_batches(
    records: Sequence[Record],
    processor: Processor,
    *,
    batch_size: int,
    structure: RowStructure = KNOWS_ALL,
    multiple: int = 1,
) -> list[Batch]:
    """Every question of every record once, for scoring given answers: a row a record, its questions as branches.

    All batches have one shape; the last is filled up with padding rows (`segment_ids` 0, `row_ids` -1).
    """
    bound = length_bound(processor, rejected=False)
    asking = [(index, record, record.questions) for index, record in enumerate(records)]
    sizes = []
    for _, record, questions in asking:
        tiles = count_tiles(record, processor)
        sizes.append((len(questions), tiles, *bound(record, questions, tiles, len(questions))))
    questions, tiles, *lengths = np.max(sizes, axis=0).tolist()
    most = Bound(*lengths).rounded_up(multiple)
    shape = RowShape(most.shared, tiles, structure=structure, unfolded=structure.unfolded(1, questions, most))
    batches = []
    for start in range(0, len(asking), batch_size):
        part = asking[start : start + batch_size]
        filled = [[one] for one in part] + [[]] * (batch_size - len(part))
        rows = [build_row(one, processor, shape, rejected=False) for one in filled]
        batches.append(Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]}))
    return batches
