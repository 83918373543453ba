"""The rows that a run reads: those of its phases and those of its validation."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from phantom_jax.batch import Batch
from phantom_jax.data import pairs, pipeline, sources
from phantom_jax.data.rows import RowStructure
from phantom_jax.ops.backends import SUPPORTS
from phantom_jax.processor import Processor
from phantom_jax.training.task import DataIterator

_OPTIONS = {field.name for field in dataclasses.fields(pipeline.RowOptions)}


class RunData:
    """The data of one run; a phase is named by its index.

    Args:
      config: resolved.
      name: of the data set.
      processors: one for each phase; validation uses the last.
      multiple: of which rows have some number of tokens.

    Raises:
      InputError: the split of the validation does not exist.
    """

    def __init__(self, config: Mapping[str, Any], name: str, processors: Sequence[Processor], multiple: int):
        self._config, self._name, self._processors, self._multiple = config, name, processors, multiple
        self._backend = config["model"]["attention_backend"]
        supports = SUPPORTS[self._backend]
        self._structure = RowStructure(supports.branches, supports.segments)
        # Read once: what a row may come to hold is measured over all records.
        self._records, self._rows = functools.cache(self._open_records), functools.cache(self._open_rows)
        self.validation_batches = functools.cache(self._open_validation)
        if config["validation"]["every"]:
            self._records(config["validation"]["split"])

    def train_iterator(self, phase: int) -> DataIterator:
        """The batches of a phase, from its first."""
        settings = self._config["phases"][phase]
        threads = settings["data"]["threads"]
        return pipeline.row_iterator(self._rows(phase), batch_size=settings["batch_size"], threads=threads)

    def pairs(self, phase: int) -> pairs.PairBatches:
        """Every pair of answers of a phase, once."""
        settings = self._config["phases"][phase]
        return pairs.PairBatches(self._rows(phase), settings["batch_size"] // settings["accumulation"])

    def remarks(self, phase: int) -> Iterator[str]:
        """What a user should know of a phase's rows."""
        shape = self._rows(phase).shape
        if shape.unfolded is not None:
            count, length = shape.unfolded
            yield (
                f"attention backend {self._backend!r} cannot keep conversations of one row apart: each gets a copy of"
                f" what they share, so rows of {shape.length:,} tokens take {count} x {length:,}"
                f" ({count * length / shape.length:.2f} times as many)"
            )

    def _open_records(self, split: str) -> Sequence[Any]:
        return sources.open_records(self._name, split, self._config["data"]["data_dir"])

    def _open_rows(self, phase: int) -> pipeline.TrainingRows:
        settings = self._config["phases"][phase]
        options = {key: value for key, value in settings["data"].items() if key in _OPTIONS}
        options["max_digits"] = options["max_digits"] or None
        options = pipeline.RowOptions(
            **options,
            # Only a preference reads wrong answers; leaving them out saves their tokens.
            rejected=settings["objective"]["name"] != "sft",
            pair_ids=settings["objective"].get("reference") == "stored",
            structure=self._structure,
            multiple=self._multiple,
        )
        # Not a sum: the phases of one seed would be shifted phases of the next.
        seed = int(np.random.SeedSequence([self._config["seed"], phase]).generate_state(1)[0])
        records = self._records(settings["data"]["split"])
        return pipeline.TrainingRows(records, self._processors[phase], options, seed)

    def _open_validation(self) -> Sequence[Batch]:
        settings = self._config["validation"]
        records = self._records(settings["split"])
        chosen = [records[index] for index in range(min(settings["images"] or len(records), len(records)))]
        return pipeline.evaluation_batches(
            chosen,
            self._processors[-1],
            batch_size=settings["batch_size"],
            structure=self._structure,
            multiple=self._multiple,
        )
