"""What the loop trains: the model, the data and how to export, put together from a config.

The loop itself knows none of them. It takes a `Task`, so that a test or a study can train anything that scores tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from phantom_jax.batch import Batch
from phantom_jax.training.state import Params
from phantom_jax.training.step import Score


class DataIterator(Iterator[Batch], Protocol):
    """An endless iterator of batches of one shape, which can be put back where it stood."""

    def get_state(self) -> Any:
        """JSON values: where it stands, after the batches that `next` has given."""

    def set_state(self, state: Any) -> None:
        """Continues from there: the next batch is the one that would have come next."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
      init_params: gives all parameters from a random key, as nested dictionaries. Pure; it is traced.
      score: the log-probabilities and correctness of a batch's targets. Pure; it is traced.
      train_iterator: makes the data iterator of a phase, by the phase's index, at its beginning.
      validation_batches: all batches of a validation, of one shape; called for each validation.
      export: writes parameters as a model into a new folder, or None for no export.
    """

    init_params: Callable[[jax.Array], Params]
    score: Score
    train_iterator: Callable[[int], DataIterator]
    validation_batches: Callable[[], Iterable[Batch]]
    export: Callable[[Params, Path], None] | None = None


def assemble(config: Mapping[str, Any]) -> Task:
    """Builds the model and the data pipeline that a resolved config names.

    Raises:
      InputError: if a name or a model override does not exist, or the data are not there.
    """
    from flax.linen import meta

    from phantom_jax.data import conversation, pipeline, sources, tokenizer
    from phantom_jax.models import zoo
    from phantom_jax.models.vlm import VisionLanguageModel
    from phantom_jax.ops.image import normalize_pixels
    from phantom_jax.processor import Processor

    overrides = {key: value for key, value in config["model"].items() if key not in ("name", "dtype")}
    tokens = tokenizer.load_tokenizer(config["data"]["data_dir"])
    model_config = zoo.get_config(
        config["model"]["name"], **{"vocab_size": tokens.get_vocab_size(with_added_tokens=True)} | overrides
    )
    settings = config["processor"]
    processor = Processor(
        tokens,
        conversation.TEMPLATES[settings["template"]],
        settings["tile_size"],
        settings["max_tiles"],
        model_config.tokens_per_tile,
        settings["max_length"],
    )
    model = VisionLanguageModel(model_config, dtype=jnp.dtype(config["model"]["dtype"]))

    def prepared(batch):
        return {**batch, "pixels": normalize_pixels(batch["pixels"], processor.mean, processor.std)}

    def score(params, batch):
        return model.apply({"params": params}, prepared(batch), rope_length=settings["max_length"], method="score")

    def open_split(split):
        return sources.open_records(config["data"]["name"], split, config["data"]["data_dir"])

    def train_iterator(index):
        phase = config["phases"][index]
        options = {key: value for key, value in phase["data"].items() if key not in ("split", "threads")}
        return pipeline.train_iterator(
            open_split(phase["data"]["split"]),
            processor,
            # Only a preference reads wrong answers; leaving them out saves their tokens.
            {**options, "max_digits": options["max_digits"] or None, "rejected": phase["objective"]["name"] != "sft"},
            batch_size=phase["batch_size"],
            seed=config["seed"] + index,
            threads=phase["data"]["threads"],
        )

    validation = []

    def validation_batches():
        if not validation:
            settings = config["validation"]
            records = open_split(settings["split"])
            chosen = [records[index] for index in range(min(settings["images"] or len(records), len(records)))]
            batches = pipeline.evaluation_batches(chosen, processor, batch_size=settings["batch_size"])
            validation.extend(item.batch for item in batches)
        return validation

    def init_params(key):
        batch = prepared(_smallest_batch(tile=settings["tile_size"], length=8))
        return meta.unbox(model.init(key, batch, rope_length=settings["max_length"], method="score")["params"])

    return Task(init_params, score, train_iterator, validation_batches)


def _smallest_batch(*, tile: int, length: int) -> Batch:
    zeros = jnp.zeros((1, length), jnp.int32)
    return Batch(
        token_ids=zeros,
        positions=jnp.arange(length, dtype=jnp.int32)[None],
        segment_ids=zeros + 1,
        branch_ids=zeros,
        image_slots=zeros - 1,
        targets=zeros,
        sft_mask=zeros > 0,
        answer_slots=zeros,
        pixels=jnp.zeros((1, 1, tile, tile, 3), jnp.uint8),
        row_ids=jnp.zeros((1,), jnp.int32),
    )
