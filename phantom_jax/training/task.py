"""What the loop trains, and the part of it that a config's model makes: no data, no weights, no files.

The loop itself knows none of them. It takes a `Task`, so that a test or a study can train anything that scores tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from phantom_jax.batch import Batch
from phantom_jax.config import DEFAULTS
from phantom_jax.errors import InputError
from phantom_jax.lora import Lora
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.processor import IMAGENET_MEAN, IMAGENET_STD
from phantom_jax.training.step import Score
from phantom_jax.trees import Params


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
      train_iterator: makes the data iterator of a phase, by the phase's index, at its beginning. None, as is the next,
        where phases are only traced.
      validation_batches: all batches of a validation, of one shape; called for each validation.
      export: writes parameters as a model into a new folder that appears complete or not at all; None for no export.
        Parameters are jax's arrays, or read when they are asked for (`StoredArray`).
      export_adapter: does so with an adapter: the trainable tree, factors and parameters trained in full, the adapter,
        the folder of the model that it is for, and the new folder.
      load_params: gives the parameters that the run begins with instead of those of `init_params`. Its arguments are
        the dtype of a float array by path, what gives the array at a path in its final form, quantised or as it is, and
        the sharding of the array at a path; see `sharding.parameters.place_parameters`.
      parameter_names: logical axis names of the parameters by path, see `models.partitioning`; those that are not there
        are not split over devices.
      model: sizes of what is trained, to count its FLOPs; None counts none.
      pairs: every pair of answers that a phase may compare once, by the phase's index, for an objective whose reference
        is stored; see `phantom_jax.training.reference.Pairs`.
      remarks: lines to print at the beginning of a phase, by its index.
    """

    init_params: Callable[[jax.Array], Params]
    score: Score
    train_iterator: Callable[[int], DataIterator] | None = None
    validation_batches: Callable[[], Iterable[Batch]] | None = None
    export: Callable[[Params, Path], None] | None = None
    export_adapter: Callable[[Params, Lora, str, Path], None] | None = None
    load_params: Callable[..., Params] | None = None
    parameter_names: Mapping[str, Sequence[str | None]] = dataclasses.field(default_factory=dict)
    model: VisionLanguageConfig | None = None
    pairs: Callable[[int], Any] | None = None
    remarks: Callable[[int], Iterable[str]] = lambda index: ()


def model_task(
    config: Mapping[str, Any],
    model_config: VisionLanguageConfig,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Task:
    """The part of a task that needs no data.

    Args:
      config: a resolved config.
      model_config: the model, see `make_model_config`.
      mean, std: by which pixels (from 0 to 1) are normalised, for each channel.
    """
    from flax.linen import meta

    from phantom_jax.models.vlm import VisionLanguageModel
    from phantom_jax.ops.image import normalize_pixels
    from phantom_jax.sharding.rules import parameter_names

    settings = config["model"]
    dtype = jnp.dtype(settings["dtype"])
    model = VisionLanguageModel(model_config, dtype, settings["attention_backend"], remat=settings["remat"])
    rope_length = config["processor"]["max_length"]

    def prepared(batch):
        return {**batch, "pixels": normalize_pixels(batch["pixels"], mean, std)}

    def score(params, batch):
        return model.apply({"params": params}, prepared(batch), rope_length=rope_length, method="score")

    def init_params(key):
        batch = prepared(_smallest_batch(model_config.vision_tower.image_size))
        return meta.unbox(model.init(key, batch, rope_length=rope_length, method="score")["params"])

    return Task(init_params, score, parameter_names=parameter_names(model), model=model_config)


def make_model_config(settings: Mapping[str, Any], tokens: int | None = None) -> VisionLanguageConfig:
    """The model that a config's section `model` describes.

    Args:
      settings: the section.
      tokens: how many tokens the tokenizer has; None leaves the vocabulary as the model has it.

    Raises:
      InputError: a name or an override does not exist, or the vocabulary is too small.
    """
    from phantom_jax.models import zoo

    overrides = {key: value for key, value in settings.items() if key not in DEFAULTS["model"]}
    if tokens is None:
        return zoo.get_config(settings["name"], **overrides)
    config = zoo.get_config(settings["name"], **{"vocab_size": tokens, **overrides})
    if config.language_model.vocab_size < tokens:
        raise InputError(
            f"model.vocab_size is {config.language_model.vocab_size}, but the tokenizer has {tokens} tokens."
            " Leave it out, or set it to at least as many."
        )
    return config


def check_tile_size(settings: Mapping[str, Any], model: VisionLanguageConfig) -> None:
    """Raises an `InputError` where tiles of the section `processor` are of another size than the tower takes."""
    if settings["tile_size"] != model.vision_tower.image_size:
        raise InputError(
            f"processor.tile_size is {settings['tile_size']}, but the vision tower takes"
            f" {model.vision_tower.image_size} pixels; set processor.tile_size or model.image_size to the other."
        )


def resolve_image_mode(mode: str, model: VisionLanguageConfig) -> str:
    """A phase's `data.image_mode`, `model` being what the model is used with: tiles for a Phantom, one for a LLaVA."""
    if mode != "model":
        return mode
    return "tiles" if model.projector.kind == "pixel_shuffle" else "crop"


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
