"""The processor of a model folder: ours where there is one, else one made from what was published."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from absl import logging

from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.checkpoints.hf_tokenizer import read_tokenizer
from phantom_jax.checkpoints.special_tokens import UNKNOWN
from phantom_jax.data.conversation import Template, describe_template, get_template, template_names
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.processor import CLIP_MEAN, CLIP_STD, CONFIG, Processor

_MAX_TILES = 6


def load_processor(
    directory: str | os.PathLike[str],
    config: VisionLanguageConfig,
    published: Published,
    tokens: TokenIds,
    *,
    template: str | None = None,
) -> Processor | None:
    """Loads the processor of a model folder, or makes one for a published folder that has none of ours.

    Args:
      directory: the folder.
      config: the model.
      published: how it looks outside.
      tokens: its special ids.
      template: name of a template to take instead of a published folder's default: the language model's name for
        Phantom, `vicuna_v1` for LLaVA. In a folder with a processor of ours only its own will do.

    Returns:
      The processor, or None where the folder has no tokenizer.

    Raises:
      InputError: a file is damaged, there is no such template or the model has another one, or template, tokenizer and
        images do not go together.
    """
    directory = pathlib.Path(directory)
    phantom = published.format == "phantom"
    chosen = get_template(template or (published.language_model if phantom else "vicuna_v1"))
    if (directory / CONFIG).is_file():
        processor = Processor.load(directory)
        if template is not None and template not in template_names(processor.template):
            raise InputError(
                f"{directory} was saved with the template {describe_template(processor.template)}, and {template} is "
                f"asked for: leave template out, or store another one with convert --template={template}"
            )
        return processor
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        return None
    _check_size(tokenizer, config, directory)
    images = read_image_settings(directory)
    image_token = _image_token(published, tokenizer.id_to_token(tokens.image))
    return make_processor(tokenizer, dataclasses.replace(chosen, image_token=image_token), config, published, images)


def make_processor(
    tokenizer: tokenizers.Tokenizer,
    template: Template,
    config: VisionLanguageConfig,
    published: Published,
    images: Mapping[str, Any],
) -> Processor:
    """The processor of a model that was published, or that is made of published parents.

    Args:
      tokenizer: with the tokens of the template.
      template: with the image token that the tokenizer has.
      config: the model.
      published: how it looks outside.
      images: the settings of its image processor, see `read_image_settings`; Phantom needs none.

    Raises:
      InputError: template, tokenizer and images do not go together.
    """
    processor = Processor(
        tokenizer,
        template,
        tile_size=config.vision_tower.image_size,
        max_tiles=_MAX_TILES,
        tokens_per_tile=config.tokens_per_tile,
        max_length=config.language_model.rope.max_length,
    )
    if published.format == "phantom":
        return processor
    return dataclasses.replace(
        processor,
        max_tiles=1,
        mean=_channels(images, "image_mean", CLIP_MEAN),
        std=_channels(images, "image_std", CLIP_STD),
        image_mode=_image_mode(images, published.config),
    )


def read_image_settings(directory: pathlib.Path) -> Mapping[str, Any]:
    """The settings of a folder's image processor; empty where it has none."""
    # Newer versions write all into the first of these files.
    images = _read(directory / "processor_config.json").get("image_processor")
    return images or _read(directory / "preprocessor_config.json")


def with_template(processor: Processor, name: str) -> Processor:
    """The processor with another template, by name; its image token stays.

    Raises:
      InputError: there is none of that name, or the tokenizer lacks one of its tokens.
    """
    template = dataclasses.replace(get_template(name), image_token=processor.template.image_token)
    return dataclasses.replace(processor, template=template)


def _check_size(tokenizer: tokenizers.Tokenizer, config: VisionLanguageConfig, directory: pathlib.Path) -> None:
    """Warns of tokens without an embedding. Some published folders have such ones, and no text comes to them."""
    count = config.language_model.vocab_size
    without = [token for token, token_id in tokenizer.get_vocab().items() if token_id >= count]
    if without:
        logging.warning(
            "%s: the tokenizer has %d tokens, %r for instance, beyond the %d that the model has embeddings for.",
            directory,
            len(without),
            without[0],
            count,
        )


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _image_token(published: Published, configured: str | None) -> str:
    """The token that stands for an image's features: the config decides, whatever the template calls it."""
    if published.format == "llava-original":
        return UNKNOWN
    if configured is None:
        raise InputError(
            "the tokenizer does not have the image token that config.json names: take both from one folder"
        )
    return configured


def _channels(images: Mapping[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    values = images.get(key, default)
    try:
        red, green, blue = map(float, values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key} of the image processor is {values!r}: it must be three numbers") from error
    return red, green, blue


def _image_mode(images: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    ratio = config.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad"):
        raise InputError(f"config.json has image_aspect_ratio={ratio!r}: only square and pad are supported")
    return "pad" if ratio == "pad" or images.get("do_pad") else "crop"
