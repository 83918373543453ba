"""Processors of model folders: ours, published ones, and folders that do not go together."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from phantom_jax import pretrained
from phantom_jax.checkpoints import hf_config
from phantom_jax.checkpoints.hf_processor import load_processor, with_template
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.errors import InputError
from phantom_jax.processor import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Processor
from tests.sentencepiece_files import train
from tests.tiny_tokenizers import byte_level, llama

FAMILIES = {"phantom-0.5b": "qwen2", "phantom-1.8b": "internlm2", "phantom-3.8b": "phi3", "phantom-7b": "internlm2"}
IMAGE_SETTINGS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "image_processor_type": "Some"}


def read(golden, folder, tokenizer, **changes):
    """A golden model whose image token is the tokenizer's."""
    config = json.loads((golden / folder / "config.json").read_text())
    name = "<IMG_CONTEXT>" if folder in FAMILIES else "<image>"
    token = tokenizer.token_to_id(name)
    beside = golden / folder / "vision_config.json"
    vision = json.loads(beside.read_text()) if beside.is_file() else None
    return hf_config.read({**config, "image_token_index": token, **changes}, vision)


@pytest.mark.parametrize("folder", FAMILIES)
def test_a_published_phantom(golden, folder, tmp_path):
    tokenizer = byte_level(special=("<|user|>", "<|assistant|>", "<|end|>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config, published, tokens = read(golden, folder, tokenizer)
    processor = load_processor(tmp_path, config, published, tokens)
    assert processor.template == TEMPLATES[FAMILIES[folder]]
    assert processor.tile_size == config.vision_tower.image_size and processor.max_tiles == 6
    assert processor.tokens_per_tile == config.tokens_per_tile
    assert processor.max_length == config.language_model.rope.max_length
    assert (processor.mean, processor.std, processor.image_mode) == (IMAGENET_MEAN, IMAGENET_STD, "tiles")


@pytest.mark.parametrize("layout", ["llava-hf", "llava-original"])
def test_a_published_llava(golden, layout, tmp_path):
    tokenizer = llama("prepend", special=("<image>",) if layout == "llava-hf" else ())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = read(golden, layout, tokenizer)
    processor = load_processor(tmp_path, *model)
    image_token = "<image>" if layout == "llava-hf" else "<unk>"  # noqa: S105
    assert processor.template.image_token == image_token
    assert processor.template.system == TEMPLATES["vicuna_v1"].system
    assert (processor.mean, processor.std, processor.image_mode) == (CLIP_MEAN, CLIP_STD, "crop")
    assert processor.tile_count(1000, 100) == 1
    prompt = processor.encode_prompt("What is <unk>?", [Image.new("RGB", (9, 7))])
    assert (prompt.token_ids == processor.image_token_id).sum() == model[0].tokens_per_tile
    other = load_processor(tmp_path, *model, template="llava_llama_2")
    assert other.template.stop == TEMPLATES["llava_llama_2"].stop and other.template.image_token == image_token


def test_settings_of_published_images(golden, tmp_path):
    tokenizer = llama("first")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = read(golden, "llava-hf", tokenizer)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS))
    processor = load_processor(tmp_path, *model)
    assert (processor.mean, processor.std, processor.image_mode) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop")
    # Newer versions write all into one file.
    nested = {"processor_class": "LlavaProcessor", "image_processor": {**IMAGE_SETTINGS, "do_pad": True}}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = load_processor(tmp_path, *model)
    assert (processor.mean, processor.image_mode) == ((0.1, 0.2, 0.3), "pad")
    wrong = {"image_processor": {"image_mean": [0.5, "half", 0.5]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="image_mean of the image processor is .*'half'.* three numbers"):
        load_processor(tmp_path, *model)


@pytest.mark.parametrize("ratio, mode", [("square", "crop"), ("pad", "pad"), (None, "crop")])
def test_the_aspect_ratio_of_an_original_llava(golden, ratio, mode, tmp_path):
    tokenizer = llama("first", special=())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = read(golden, "llava-original", tokenizer, image_aspect_ratio=ratio)
    assert load_processor(tmp_path, *model).image_mode == mode
    model = read(golden, "llava-original", tokenizer, image_aspect_ratio="anyres")
    with pytest.raises(InputError, match="image_aspect_ratio='anyres': only square and pad"):
        load_processor(tmp_path, *model)


def test_a_model_keeps_the_processor_that_was_saved_with_it(golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "llava-original", source)
    llama("prepend", special=()).save(str(source / "tokenizer.json"))
    handle = pretrained.load(source, template="llava_v1")
    assert handle.processor.template.system == TEMPLATES["llava_v1"].system
    for layout in ("ours", "llava-original"):
        pretrained.save(handle, tmp_path / layout, format=layout)
        again = pretrained.load(tmp_path / layout)
        assert again.processor.template == handle.processor.template
        assert again.processor.image_mode == "crop"
        image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
        one, other = (item.processor.encode_prompt("What?", [image]) for item in (handle, again))
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.tiles, other.tiles)
        assert pretrained.load(tmp_path / layout, template="llava_v1").processor.template == again.processor.template
        message = "saved with the template llava_v1, and vicuna_v1 is asked for: leave template out, or .*convert"
        with pytest.raises(InputError, match=message):
            pretrained.load(tmp_path / layout, template="vicuna_v1")
        changed = with_template(again.processor, "vicuna_v1")
        assert changed.template.system == TEMPLATES["vicuna_v1"].system
        assert changed.template.image_token == handle.processor.template.image_token
    with pytest.raises(InputError, match="no template 'vicuna_v2': the nearest names are vicuna_v1"):
        pretrained.load(source, template="vicuna_v2")


def test_folders_without_a_tokenizer_have_no_processor(golden, tmp_path):
    model = read(golden, "llava-hf", llama("first"))
    assert load_processor(tmp_path, *model) is None


def test_a_folder_with_a_sentencepiece_model_alone(golden, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train())
    model = read(golden, "llava-original", llama("prepend", special=()))
    processor = load_processor(tmp_path, *model)
    assert processor.template.image_token == "<unk>"  # noqa: S105
    processor.save(tmp_path / "saved")
    again = Processor.load(tmp_path / "saved")
    turns = [("<image>\nWhat is  it? 猫", "A  cat.\n"), ("Why?", None)]
    one, other = (item.encode_conversation(turns, [1]) for item in (processor, again))
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert [processor.decode(processor.tokenizer.encode(text).ids[1:]) for text in ("482 猫", "a  b")] == [
        "482 猫",
        "a  b",
    ]


def test_a_template_of_the_users_own_is_remembered_too(golden, tmp_path):
    config, published, tokens = read(golden, "phantom-0.5b", byte_level())
    template = dataclasses.replace(TEMPLATES["qwen2"], system="Be brief.")
    Processor(byte_level(), template, 28, 6, 4, 100).save(tmp_path)
    assert load_processor(tmp_path, config, published, tokens).template == template
    with pytest.raises(InputError, match="saved with the template one of its own, and qwen2 is asked for"):
        load_processor(tmp_path, config, published, tokens, template="qwen2")
    # These two are one and the same.
    Processor(byte_level(), TEMPLATES["qwen2"], 28, 6, 4, 100).save(tmp_path)
    load_processor(tmp_path, config, published, tokens, template="internlm2")
    with pytest.raises(InputError, match="with the template qwen2 or internlm2, and phi3 is asked for"):
        load_processor(tmp_path, config, published, tokens, template="phi3")


def test_tokens_without_an_embedding_are_told(golden, tmp_path, caplog):
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = read(golden, "phantom-0.5b", tokenizer)
    with caplog.at_level("WARNING", logger="absl"):
        load_processor(tmp_path, *model)
    beyond = tokenizer.get_vocab_size() - model[0].language_model.vocab_size
    assert beyond > 0 and f"has {beyond} tokens" in caplog.text


def test_tokenizers_of_other_models_are_refused(golden, tmp_path):
    tokenizer = llama("first")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="does not have the image token that config.json names"):
        load_processor(tmp_path, *read(golden, "llava-hf", tokenizer, image_token_index=100_000))
    with pytest.raises(InputError, match="does not have the template's token '<s>'"):
        load_processor(tmp_path, *read(golden, "llava-hf", tokenizer))
