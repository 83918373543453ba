"""What the loop trains: the model, the data and how to export, put together from a config.

The loop itself knows none of them. It takes a `Task`, so that a test or a study can train anything that scores tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.batch import Batch
from phantom_jax.config import DEFAULTS
from phantom_jax.errors import InputError
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.training.state import Params, cast
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
      export: writes parameters as a model into a new folder that appears complete or not at all; None for no export.
      model: sizes of what is trained, to count its FLOPs; None counts none.
    """

    init_params: Callable[[jax.Array], Params]
    score: Score
    train_iterator: Callable[[int], DataIterator]
    validation_batches: Callable[[], Iterable[Batch]]
    export: Callable[[Params, Path], None] | None = None
    model: VisionLanguageConfig | None = None


def assemble(config: Mapping[str, Any]) -> Task:
    """Builds the model and the data pipeline that a resolved config names.

    Raises:
      InputError: if a name or a model override does not exist, or the data are not there.
    """
    from flax.linen import meta

    from phantom_jax.checkpoints import model_folder
    from phantom_jax.checkpoints.hf import Checkpoint, Origin
    from phantom_jax.checkpoints.hf_config import TokenIds, publish
    from phantom_jax.data import pipeline, sources
    from phantom_jax.models.vlm import VisionLanguageModel
    from phantom_jax.ops.image import normalize_pixels

    _refuse_without_reference(config["phases"])
    name, data_dir = config["data"]["name"], config["data"]["data_dir"]
    tokenizer = sources.open_tokenizer(name, data_dir)
    model_config = _model_config(config["model"], tokenizer.get_vocab_size(with_added_tokens=True))
    processor = _processor(config["processor"], tokenizer, model_config)
    model = VisionLanguageModel(model_config, jnp.dtype(config["model"]["dtype"]), config["model"]["attention_backend"])
    rope_length = processor.max_length

    def prepared(batch):
        return {**batch, "pixels": normalize_pixels(batch["pixels"], processor.mean, processor.std)}

    def score(params, batch):
        return model.apply({"params": params}, prepared(batch), rope_length=rope_length, method="score")

    def init_params(key):
        batch = prepared(_smallest_batch(processor.tile_size))
        return meta.unbox(model.init(key, batch, rope_length=rope_length, method="score")["params"])

    @functools.cache
    def open_split(split):
        return sources.open_records(name, split, data_dir)

    def train_iterator(index):
        phase = config["phases"][index]
        options = {key: value for key, value in phase["data"].items() if key not in ("sources", "split", "threads")}
        return pipeline.train_iterator(
            open_split(phase["data"]["split"]),
            processor,
            # Only a preference reads wrong answers; leaving them out saves their tokens.
            {**options, "max_digits": options["max_digits"] or None, "rejected": phase["objective"]["name"] != "sft"},
            batch_size=phase["batch_size"],
            # Not a sum: the phases of one seed would be shifted phases of the next.
            seed=int(np.random.SeedSequence([config["seed"], index]).generate_state(1)[0]),
            threads=phase["data"]["threads"],
        )

    @functools.cache
    def validation_batches():
        settings = config["validation"]
        records = open_split(settings["split"])
        chosen = [records[index] for index in range(min(settings["images"] or len(records), len(records)))]
        return pipeline.evaluation_batches(chosen, processor, batch_size=settings["batch_size"])

    if config["validation"]["every"]:
        # A split that does not exist shall come up now.
        open_split(config["validation"]["split"])

    def export(params, folder):
        tokens = TokenIds(image=processor.image_token_id, eos=(processor.end_id,), pad=processor.pad_id)
        # One dtype for all of it: in bfloat16 runs what was trained is float32 and what was frozen is not.
        params = cast(params, config["model"]["dtype"])
        checkpoint = Checkpoint(model_config, params, {}, publish(model_config), tokens, Origin(data=(name,)))
        model_folder.write(checkpoint, processor, folder)

    return Task(init_params, score, train_iterator, validation_batches, export, model=model_config)


def _refuse_without_reference(phases: Sequence[Mapping[str, Any]]) -> None:
    for index, phase in enumerate(phases):
        if phase["objective"]["name"] == "dpo":
            raise InputError(
                f"phases[{index}].objective.name is 'dpo', which needs log-probabilities under a reference model beside"
                " the rows, and no data set brings them; take phantom_optimization, simpo or orpo, which need none."
            )


def _model_config(settings: Mapping[str, Any], tokens: int) -> Any:
    from phantom_jax.models import zoo

    overrides = {key: value for key, value in settings.items() if key not in DEFAULTS["model"]}
    config = zoo.get_config(settings["name"], **{"vocab_size": tokens, **overrides})
    if config.language_model.vocab_size < tokens:
        raise InputError(
            f"model.vocab_size is {config.language_model.vocab_size}, but the tokenizer has {tokens} tokens."
            " Leave it out, or set it to at least as many."
        )
    return config


def _processor(settings: Mapping[str, Any], tokenizer: Any, model: Any) -> Any:
    from phantom_jax.data.conversation import TEMPLATES
    from phantom_jax.processor import Processor

    if settings["template"] not in TEMPLATES:
        raise InputError(f"processor.template is {settings['template']!r}; it must be one of {', '.join(TEMPLATES)}.")
    if settings["tile_size"] != model.vision_tower.image_size:
        raise InputError(
            f"processor.tile_size is {settings['tile_size']}, but the vision tower takes"
            f" {model.vision_tower.image_size} pixels; set processor.tile_size or model.image_size to the other."
        )
    return Processor(
        tokenizer,
        TEMPLATES[settings["template"]],
        settings["tile_size"],
        settings["max_tiles"],
        model.tokens_per_tile,
        settings["max_length"],
    )


def _smallest_batch(tile_size: int) -> Batch:
    """A batch to initialise parameters with; none of their shapes depends on its size, save for the tile's."""
    length = 8
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
        pixels=jnp.zeros((1, 1, tile_size, tile_size, 3), jnp.uint8),
        row_ids=jnp.zeros((1,), jnp.int32),
    )
