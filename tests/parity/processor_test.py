"""Token ids and pixels against the processors of transformers."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from phantom_jax.checkpoints import hf_config
from phantom_jax.checkpoints.hf_processor import load_processor
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.processor import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Processor
from tests.tiny_tokenizers import LLAMA_KINDS, byte_level, llama

SIZE, PATCH = 28, 14
TOKENS = (SIZE // PATCH) ** 2
LLAVA = ("vicuna_v1", "llava_v1", "llava_llama_2")
QUESTIONS = ["What is in the picture?", " two  spaces ", "猫はどこ?", "A 😀 café\nof\tlines", "482", "x", ""]


def rendered(template, turns, images):
    """The whole text as a user of transformers writes it: each image one mark, `<s>` left to the tokenizer."""
    text = template.system
    for number, (question, answer) in enumerate(turns):
        text += template.user
        if number == 0 and images and not any("<image>" in question for question, _ in turns):
            text += images * "<image>" + template.after_image
        text += question + template.assistant
        if answer is not None:
            text += template.answer_begin + answer + template.answer_end
            text += template.turn_end if number + 1 < len(turns) else ""
    return text


def picture(width, height):
    # Smooth with some noise: what a scaled image looks like depends on the filter.
    values = np.add.outer(np.linspace(0, 200, height), np.linspace(0, 55, width))[..., None]
    noise = np.random.default_rng(width).integers(-20, 20, (height, width, 3))
    return Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))


def backend(name, tmp_path):
    """A tokenizer as transformers loads it from a folder, and the one it was made of."""
    special = ("<image>", "<s>", "</s>")
    ours = byte_level(special=special) if name == "bytes" else llama(name)
    if name == "bytes":
        ours.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ours.token_to_id("<s>"))])
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours, bos_token="<s>", eos_token="</s>")  # noqa: S106
    theirs.save_pretrained(tmp_path)
    return ours, transformers.AutoTokenizer.from_pretrained(tmp_path)


def processors(name, template, tmp_path, image_processor=None):
    tokenizer, theirs = backend(name, tmp_path)
    ours = Processor(
        tokenizer,
        TEMPLATES[template],
        tile_size=SIZE,
        max_tiles=1,
        tokens_per_tile=TOKENS,
        max_length=4096,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        image_mode="crop",
    )
    image_processor = image_processor or CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    whole = transformers.LlavaProcessor(
        image_processor,
        theirs,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return ours, whole


@pytest.mark.parametrize("template", LLAVA)
@pytest.mark.parametrize("name", [*LLAMA_KINDS, "bytes"])
def test_llava_prompts(name, template, tmp_path):
    ours, theirs = processors(name, template, tmp_path)
    images = [picture(40, 30), picture(30, 50)]
    cases = [([(question, None)], count) for question in QUESTIONS for count in (0, 1, 2)]
    for first in QUESTIONS:
        cases.append(([(first, "It is a cat."), ("And now?", None)], 1))
        cases.append(([(f"<image>\n{first}", " two "), ("Or <image>?", None)], 2))
        cases.append(([("So?", first), (f"{first}<image> <image>", None)], 2))
    for turns, count in cases:
        prompt = ours.encode_prompt(turns[-1][0], images[:count], history=turns[:-1])
        text = rendered(ours.template, turns, count)
        expected = theirs(images=images[:count] or None, text=text, return_tensors="np")
        assert prompt.token_ids.tolist() == expected["input_ids"][0].tolist(), text
        assert (prompt.image_slots >= 0).tolist() == (prompt.token_ids == theirs.image_token_id).tolist()
        if count:
            pixels = (prompt.tiles / 255 - CLIP_MEAN) / CLIP_STD
            np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), expected["pixel_values"], atol=1e-2)


@pytest.mark.parametrize("template", [*LLAVA, "plain"])
@pytest.mark.parametrize("name", [*LLAMA_KINDS, "bytes"])
def test_answered_llava_conversations(name, template, tmp_path):
    ours, theirs = processors(name, template, tmp_path)
    for answer in QUESTIONS:
        turns = [("" if template == "plain" else "What?", answer)]
        encoded = ours.encode_conversation(turns, [1])
        text = rendered(ours.template, turns, 1).replace("<image>", TOKENS * "<image>")
        assert encoded.token_ids.tolist() == theirs.tokenizer(text)["input_ids"]
        decoded = ours.tokenizer.decode(encoded.token_ids[encoded.supervised].tolist(), skip_special_tokens=False)
        assert decoded.strip(" ") == (answer + ours.template.answer_end).strip(" ")
        prompt = ours.encode_conversation([(turns[0][0], None)], [1])
        # The space of an answer may be part of a token of more than one, but no token spans prompt and answer.
        assert encoded.token_ids[: encoded.answer_start].tolist() == prompt.token_ids.tolist()


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("name", LLAMA_KINDS)
def test_a_folder_that_transformers_saved(name, mode, golden, tmp_path):
    config = json.loads((golden / "llava-hf" / "config.json").read_text())
    size, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    images = LlavaImageProcessorPil(size={"shortest_edge": size}, crop_size=size, do_pad=mode == "pad")
    theirs = processors(name, "vicuna_v1", tmp_path / "tokenizer", images)[1]
    theirs.patch_size = patch
    theirs.save_pretrained(tmp_path)
    model = hf_config.read({**config, "image_token_index": theirs.image_token_id})
    ours = load_processor(tmp_path, *model)
    assert ours.image_mode == mode and ours.max_length == config["text_config"]["max_position_embeddings"]
    prompt = ours.encode_prompt("Which?", [picture(50, 30)])
    text = rendered(ours.template, [("Which?", None)], 1)
    expected = theirs(images=[picture(50, 30)], text=text, return_tensors="np")
    assert prompt.token_ids.tolist() == expected["input_ids"][0].tolist()
    pixels = (prompt.tiles / 255 - ours.mean) / ours.std
    np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), expected["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("shape", [(28, 28), (40, 30), (30, 41), (200, 33), (33, 200), (3, 5), (1, 9), (64, 63)])
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("mean, std", [(CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD)])
def test_pixels(shape, mode, mean, std):
    ours = Processor(byte_level(), TEMPLATES["qwen2"], SIZE, 1, TOKENS, 100, mean=mean, std=std, image_mode=mode)
    values = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    theirs = LlavaImageProcessorPil(**values, image_mean=mean, image_std=std, do_pad=mode == "pad")
    image = picture(*shape)
    (tile,) = ours.encode_image(image)
    (raw,) = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(tile.transpose(2, 0, 1), raw)
    (normalised,) = theirs(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(((tile / 255 - mean) / std).transpose(2, 0, 1), normalised, atol=1e-5)


@pytest.mark.parametrize("template", ["qwen2", "internlm2", "phi3"])
@pytest.mark.parametrize("stripping", [(), ("<|user|>", "<|assistant|>", "<|end|>")])
def test_phantom_conversations(template, stripping, tmp_path):
    special = () if stripping else ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = byte_level(special=special, stripping=stripping)
    ours = Processor(tokenizer, TEMPLATES[template], SIZE, 6, 2, 4096)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    image = ours.template.image_begin + 2 * ours.template.image_token + ours.template.image_end
    for question in QUESTIONS:
        for turns in ([(question, None)], [(question, "It is a cat."), ("So?", question)]):
            encoded = ours.encode_conversation(turns, [1])
            text = rendered(ours.template, turns, 1).replace("<image>", image)
            assert encoded.token_ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
