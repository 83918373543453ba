"""A task put together from a config: its model with its weights, its data, and how to export."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phantom_jax.checkpoints import adapter_folder, model_folder
from phantom_jax.checkpoints.adapter import base_numbers
from phantom_jax.checkpoints.arrays import cast
from phantom_jax.checkpoints.hf import Checkpoint, Origin
from phantom_jax.checkpoints.hf_config import TokenIds, publish
from phantom_jax.checkpoints.special_tokens import with_tokens
from phantom_jax.data import sources
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.data.sources import SOURCES
from phantom_jax.errors import InputError
from phantom_jax.ops.backends import check_backend
from phantom_jax.processor import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Processor
from phantom_jax.sharding.placement import on_host
from phantom_jax.training.adapters import adapter_of
from phantom_jax.training.beginning import open_weights
from phantom_jax.training.run_data import RunData
from phantom_jax.training.task import (
    Task,
    check_tile_size,
    make_model_config,
    model_task,
    resolve_image_mode,
)
from phantom_jax.trees import Params, flatten, unflatten


def assemble(config: Mapping[str, Any], mesh: Mesh) -> Task:
    """Builds the model and the data pipeline that a resolved config names.

    Args:
      config: resolved.
      mesh: of the run. Rows have a number of tokens that its `seq` divides.

    Raises:
      InputError: if a name or a model override does not exist, or weights or data are not there.
    """
    check_backend(config["model"]["attention_backend"], jnp.dtype(config["model"]["dtype"]))
    name, data_dir = _data_set(config), config["data"]["data_dir"]
    templates = _templates(config)
    begins = open_weights(config["model"], config["processor"]["template"]) if config["model"]["weights"] else None
    given = None if begins is None else begins.processor
    if given is not None:
        tokenizer = given.tokenizer
    else:
        # A data set's own tokenizer has the tokens of one template, and a new model room for those of any.
        tokenizer = with_tokens(
            sources.open_tokenizer(name, data_dir), [token for template in templates for token in template.tokens]
        )
    tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    model_config = make_model_config(config["model"], tokens) if begins is None else begins.checkpoint.config
    if begins is not None and given is None and model_config.language_model.vocab_size < tokens:
        raise InputError(
            f"model.weights is {begins.folder!r}, which has no tokenizer and {model_config.language_model.vocab_size}"
            f" tokens, and the tokenizer of data.name has {tokens}. Put the model's own tokenizer into the folder."
        )
    if given is not None:
        # What the model learned may differ in details from the template of that name.
        own = [phase["data"]["template"] for phase in config["phases"]]
        templates = [
            template if own_name else given.template for own_name, template in zip(own, templates, strict=True)
        ]
    processors = [
        _processor(config["processor"], tokenizer, model_config, template, phase["data"]["image_mode"], given)
        for template, phase in zip(templates, config["phases"], strict=True)
    ]
    processor = processors[-1]
    task = model_task(config, model_config, mean=processor.mean, std=processor.std)

    data = RunData(config, name, processors, mesh.shape["seq"])
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
        adapter = adapter_of(
            trainable,
            lora,
            model=(model_config, published, special),
            base=base,
            numbers=base_numbers(model_folder.read(base)[0].flat(), lora.kernels),
            template=config["processor"]["template"],
        )
        with model_folder.appearing(folder) as scratch:
            adapter_folder.write(adapter, scratch, format="ours")

    return dataclasses.replace(
        task,
        train_iterator=data.train_iterator,
        validation_batches=data.validation_batches,
        export=export,
        export_adapter=export_adapter,
        load_params=None if begins is None else begins.load_params,
        pairs=data.pairs,
        remarks=data.remarks,
    )


def _stored(tree: Params, dtype: Any) -> dict[str, Any]:
    """Arrays in one dtype, each read from where it is when it is asked for."""
    return unflatten(
        {
            path: cast(on_host(leaf) if isinstance(leaf, jax.Array) else leaf, np.dtype(dtype))
            for path, leaf in flatten(tree).items()
        }
    )


def _data_set(config: Mapping[str, Any]) -> str:
    """The one data set that all phases draw from."""
    chosen = config["data"]["name"]
    for index, phase in enumerate(config["phases"]):
        for name in phase["data"]["sources"]:
            if name not in SOURCES:
                raise InputError(
                    f"phases[{index}].data.sources names {name!r}, which cannot be opened. The data sets that can be"
                    f" are: {', '.join(SOURCES)}. Set data.name to one of them and the phases' data.sources to {{}}; or"
                    " try the recipe's variant `smoke`, which does."
                )
            if name != chosen:
                raise InputError(
                    f"phases[{index}].data.sources names {name!r} and data.name is {chosen!r}; a run reads one data"
                    f" set. Set data.name to {name!r}, or the phases' data.sources to {{}}."
                )
    return chosen


def _templates(config: Mapping[str, Any]) -> list[Any]:
    """The template of each phase."""
    names = {"processor.template": config["processor"]["template"]}
    for index, phase in enumerate(config["phases"]):
        if phase["data"]["template"]:
            names[f"phases[{index}].data.template"] = phase["data"]["template"]
    for key, name in names.items():
        if name not in TEMPLATES:
            raise InputError(f"{key} is {name!r}; it must be one of {', '.join(TEMPLATES)}.")
    return [TEMPLATES[phase["data"]["template"] or config["processor"]["template"]] for phase in config["phases"]]


def _processor(
    settings: Mapping[str, Any], tokenizer: Any, model: Any, template: Any, image_mode: str, given: Any
) -> Any:
    """A phase's processor: that of the model's folder, where there is one, with what the config says."""
    check_tile_size(settings, model)
    sizes = {"max_tiles": settings["max_tiles"], "max_length": settings["max_length"]}
    if given is not None:
        mode = given.image_mode if image_mode == "model" else image_mode
        return dataclasses.replace(given, template=template, image_mode=mode, **sizes)
    phantom = model.projector.kind == "pixel_shuffle"
    return Processor(
        tokenizer,
        template,
        settings["tile_size"],
        tokens_per_tile=model.tokens_per_tile,
        mean=IMAGENET_MEAN if phantom else CLIP_MEAN,
        std=IMAGENET_STD if phantom else CLIP_STD,
        image_mode=resolve_image_mode(image_mode, model),
        **sizes,
    )
