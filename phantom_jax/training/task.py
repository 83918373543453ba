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
from phantom_jax.lora import Lora
from phantom_jax.training.state import Params
from phantom_jax.training.step import Score
from phantom_jax.trees import flatten, unflatten

_NOT_OF_ROWS = ("sources", "split", "threads", "template", "image_mode")
"""Keys of `phases[].data` that `pipeline.RowOptions` does not hold."""


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
    """

    init_params: Callable[[jax.Array], Params]
    score: Score
    train_iterator: Callable[[int], DataIterator] | None = None
    validation_batches: Callable[[], Iterable[Batch]] | None = None
    export: Callable[[Params, Path], None] | None = None
    export_adapter: Callable[[Params, Lora, str, Path], None] | None = None
    load_params: Callable[..., Params] | None = None
    parameter_names: Mapping[str, Sequence[str | None]] = dataclasses.field(default_factory=dict)


def model_task(
    config: Mapping[str, Any],
    model_config: Any,
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

    model = VisionLanguageModel(model_config, jnp.dtype(config["model"]["dtype"]), config["model"]["attention_backend"])
    rope_length = config["processor"]["max_length"]

    def prepared(batch):
        return {**batch, "pixels": normalize_pixels(batch["pixels"], mean, std)}

    def score(params, batch):
        return model.apply({"params": params}, prepared(batch), rope_length=rope_length, method="score")

    def init_params(key):
        batch = prepared(_smallest_batch(model_config.vision_tower.image_size))
        return meta.unbox(model.init(key, batch, rope_length=rope_length, method="score")["params"])

    return Task(init_params, score)


def assemble(config: Mapping[str, Any]) -> Task:
    """Builds the model and the data pipeline that a resolved config names.

    Raises:
      InputError: if a name or a model override does not exist, or the data are not there.
    """
    from flax.linen import meta

    from phantom_jax.checkpoints import adapter_folder, model_folder
    from phantom_jax.checkpoints.hf import Checkpoint, Origin
    from phantom_jax.checkpoints.hf_config import TokenIds, publish
    from phantom_jax.checkpoints.special_tokens import with_tokens
    from phantom_jax.data import pipeline, sources
    from phantom_jax.models.vlm import VisionLanguageModel
    from phantom_jax.ops.backends import check_backend
    from phantom_jax.ops.image import normalize_pixels
    from phantom_jax.sharding.rules import parameter_names
    from phantom_jax.training.adapters import adapter_of
    from phantom_jax.training.beginning import open_weights

    _refuse_without_reference(config["phases"])
    name, data_dir = config["data"]["name"], config["data"]["data_dir"]
    begins = open_weights(config["model"], config["processor"]["template"]) if config["model"]["weights"] else None
    if begins is not None and begins.processor is not None:
        tokenizer = begins.processor.tokenizer
    else:
        tokenizer = sources.open_tokenizer(name, data_dir)
    tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    model_config = _model_config(config["model"], tokens) if begins is None else begins.checkpoint.config
    if begins is not None and begins.processor is None and model_config.language_model.vocab_size < tokens:
        raise InputError(
            f"model.weights is {begins.folder!r}, which has no tokenizer and {model_config.language_model.vocab_size}"
            f" tokens, and the tokenizer of data.name has {tokens}. Put the model's own tokenizer into the folder."
        )
    processor = _processor(config["processor"], tokenizer, model_config, None if begins is None else begins.processor)
    settings = config["model"]
    backend, dtype = settings["attention_backend"], jnp.dtype(settings["dtype"])
    check_backend(backend, dtype)
    _refuse_packing(config["phases"], backend)
    model = VisionLanguageModel(model_config, dtype, backend, remat=settings["remat"])
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
        options = {key: value for key, value in phase["data"].items() if key not in _NOT_OF_ROWS}
        return pipeline.train_iterator(
            open_split(phase["data"]["split"]),
            processors[index],
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

    special = TokenIds(image=processor.image_token_id, eos=(processor.end_id,), pad=processor.pad_id)
    published, unused, origin = publish(model_config), {}, Origin(data=(name,))
    if begins is not None:
        _, published, special = begins.checkpoint.description
        unused = begins.checkpoint.unused
        origin = dataclasses.replace(begins.checkpoint.origin, data=(*begins.checkpoint.origin.data, name))

    def export(params, folder):
        # One dtype for all of it: in bfloat16 runs what was trained is float32 and what was frozen is not.
        params, kept = (_stored(tree, config["model"]["dtype"]) for tree in (params, unused))
        model_folder.write(Checkpoint(model_config, params, kept, published, special, origin), processor, folder)

    def export_adapter(trainable, lora, base, folder):
        template = config["processor"]["template"]
        model = model_config, published, special
        adapter = adapter_of(trainable, lora, model=model, base=base, template=template)
        with model_folder.appearing(folder) as scratch:
            adapter_folder.write(adapter, scratch, format="ours")

    return Task(
        init_params,
        score,
        train_iterator,
        validation_batches,
        export,
        export_adapter,
        None if begins is None else begins.load_params,
        parameter_names(model),
    )


def _stored(tree: Params, dtype: Any) -> dict[str, Any]:
    """Arrays in one dtype, each read from where it is when it is asked for."""
    from phantom_jax.checkpoints.arrays import cast
    from phantom_jax.sharding.placement import on_host

    return unflatten(
        {
            path: cast(on_host(leaf) if isinstance(leaf, jax.Array) else leaf, np.dtype(dtype))
            for path, leaf in flatten(tree).items()
        }
    )


def _refuse_without_reference(phases: Sequence[Mapping[str, Any]]) -> None:
    for index, phase in enumerate(phases):
        if phase["objective"]["name"] == "dpo":
            raise InputError(
                f"phases[{index}].objective.name is 'dpo', which needs log-probabilities under a reference model beside"
                " the rows, and no data set brings them; take phantom_optimization, simpo or orpo, which need none."
            )


def _refuse_packing(phases: Sequence[Mapping[str, Any]], backend: str) -> None:
    from phantom_jax.ops.backends import SUPPORTS

    for index, phase in enumerate(phases):
        images = phase["data"]["images_per_row"]
        if images > 1 and not SUPPORTS[backend].segments:
            raise InputError(
                f"phases[{index}].data.images_per_row is {images}, and attention backend {backend!r} cannot"
                " keep several conversations of a row apart; set it to 1, or model.attention_backend to 'chunked'."
            )


def _model_config(settings: Mapping[str, Any], tokens: int) -> Any:
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


def _processor(settings: Mapping[str, Any], tokenizer: Any, model: Any, given: Any = None) -> Any:
    """The run's processor: that of the model's folder, where there is one, with the sizes of the config."""
    from phantom_jax.data.conversation import TEMPLATES
    from phantom_jax.processor import Processor

    if settings["template"] not in TEMPLATES:
        raise InputError(f"processor.template is {settings['template']!r}; it must be one of {', '.join(TEMPLATES)}.")
    if settings["tile_size"] != model.vision_tower.image_size:
        raise InputError(
            f"processor.tile_size is {settings['tile_size']}, but the vision tower takes"
            f" {model.vision_tower.image_size} pixels; set processor.tile_size or model.image_size to the other."
        )
    if given is not None:
        return dataclasses.replace(given, max_tiles=settings["max_tiles"], max_length=settings["max_length"])
    return Processor(
        tokenizer,
        template,
        settings["tile_size"],
        settings["max_tiles"],
        model.tokens_per_tile,
        settings["max_length"],
        mean=IMAGENET_MEAN if phantom else CLIP_MEAN,
        std=IMAGENET_STD if phantom else CLIP_STD,
        image_mode=resolve_image_mode(image_mode, model),
    )


def resolve_image_mode(mode: str, model: Any) -> str:
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
