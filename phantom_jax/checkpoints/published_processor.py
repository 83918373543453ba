"""What a published folder holds beside the tokenizer for other libraries to prepare texts and images with."""

import dataclasses
import os
import pathlib

from absl import logging

from phantom_jax.data import chat_template
from phantom_jax.data.conversation import IMAGE_MARK
from phantom_jax.data.tokenizer import begin_token
from phantom_jax.json_files import write_json
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.processor import Processor

_BICUBIC = 3


def save_published(
    processor: Processor, directory: str | os.PathLike[str], *, layout: str, config: VisionLanguageConfig
) -> None:
    """Writes the conversation template in Jinja and, for `llava-hf`, what `transformers.AutoProcessor` loads.

    Args:
      processor: of that layout, see `special_tokens.for_format`.
      directory: the folder, which exists.
      layout: one of `layouts.PUBLISHED_LAYOUTS`.
      config: the model.
    """
    directory = pathlib.Path(directory)
    template = processor.template
    # The original code takes a text apart at the mark itself.
    original = layout == "llava-original"
    image = IMAGE_MARK if original else template.image_begin + template.image_token + template.image_end
    if layout == "llava-hf" and template.begin == begin_token(processor.tokenizer):
        # A LLaVA processor of transformers encodes the rendered text with the tokens that the tokenizer adds.
        template = dataclasses.replace(template, begin="")
    jinja = chat_template.to_jinja(template, processor.tokenizer, image=image)
    (directory / chat_template.FILE).write_text(jinja, encoding="utf-8")
    if layout != "llava-hf":
        return
    if processor.image_mode == "tiles":
        logging.warning("No LLaVA processor of transformers cuts images into tiles: AutoProcessor finds none here.")
        return
    write_json(directory / "preprocessor_config.json", _images(processor))
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": template.image_token,
        "patch_size": config.vision_tower.patch_size,
        "vision_feature_select_strategy": "default",
        # The class token, which "default" drops again.
        "num_additional_image_tokens": 1,
    }
    write_json(directory / "processor_config.json", settings)


def _images(processor: Processor) -> dict:
    size = processor.tile_size
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": processor.mean,
        "image_std": processor.std,
    }
    if processor.image_mode == "pad":
        # CLIP's own does not pad.
        settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return settings
