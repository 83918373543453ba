"""The files of a published folder that other libraries read; that they understand them is tested in tests/parity."""

import dataclasses
import json

import pytest

from phantom_jax.checkpoints import hf
from phantom_jax.checkpoints.published_processor import save_published
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.processor import CLIP_MEAN, CLIP_STD, Processor
from tests.tiny_tokenizers import byte_level, llama


@pytest.fixture
def llava():
    return Processor(llama("first"), TEMPLATES["vicuna_v1"], 28, 1, 4, 4096, CLIP_MEAN, CLIP_STD, "crop")


def written(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_llava_for_transformers(llava, golden, tmp_path):
    config = hf.load(golden / "llava-hf").config
    save_published(llava, tmp_path, layout="llava-hf", config=config)
    assert written(tmp_path) == ["chat_template.jinja", "preprocessor_config.json", "processor_config.json"]
    images, whole = (json.loads((tmp_path / name).read_text()) for name in written(tmp_path)[1:])
    assert whole["patch_size"] == config.vision_tower.patch_size and whole["image_token"] == llava.template.image_token
    assert (images["image_processor_type"], images["crop_size"]) == ("CLIPImageProcessor", {"height": 28, "width": 28})
    assert "do_pad" not in images
    save_published(dataclasses.replace(llava, image_mode="pad"), tmp_path, layout="llava-hf", config=config)
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (images["image_processor_type"], images["do_pad"]) == ("LlavaImageProcessor", True)


def test_layouts_that_transformers_has_no_processor_for(llava, golden, tmp_path, caplog):
    for layout, folder in (("llava-original", "llava-original"), ("phantom", "phantom-0.5b"), ("llava-hf", "llava-hf")):
        processor = llava if layout != "phantom" else Processor(byte_level(), TEMPLATES["qwen2"], 28, 6, 4, 4096)
        processor = dataclasses.replace(processor, image_mode="tiles")
        (tmp_path / layout).mkdir()
        with caplog.at_level("WARNING", logger="absl"):
            save_published(processor, tmp_path / layout, layout=layout, config=hf.load(golden / folder).config)
        assert written(tmp_path / layout) == ["chat_template.jinja"]
        assert ("cuts images into tiles" in caplog.text) == (layout == "llava-hf")
