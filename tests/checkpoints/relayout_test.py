"""From one layout of LLaVA to the other: the vocabulary follows the tokens, and the way back gives the same bytes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phantom_jax import conversion, pretrained
from phantom_jax.checkpoints import hf, model_folder
from phantom_jax.checkpoints.vocabulary import resize_rows
from phantom_jax.errors import InputError
from tests.generation import tiny
from tests.tiny_tokenizers import llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tokenizer(source, target):
    """A copy of a LLaVA whose embeddings are those of a small tokenizer's tokens."""
    tokenizer = llama("first", special=())
    size = tokenizer.get_vocab_size()
    checkpoint, _ = model_folder.read(source)
    flat, decoder = checkpoint.flat(), dataclasses.replace(checkpoint.config.language_model, vocab_size=size)
    for path, axis in (("params/language_model/embedding", 0), ("params/language_model/head/kernel", 1)):
        flat[path] = resize_rows(flat[path], size, seed=0, axis=axis)
    config = dataclasses.replace(checkpoint.config, language_model=decoder)
    resized = dataclasses.replace(checkpoint.with_flat(flat), config=config)
    model_folder.write(resized, None, target, format=checkpoint.published.format)
    tokenizer.save(str(target / "tokenizer.json"))
    return target, size


def test_an_original_becomes_llava_hf_and_itself_again(golden, tmp_path):
    source, size = with_tokenizer(golden / "llava-original", tmp_path / "original")
    lines = conversion.convert(str(source), str(tmp_path / "hf"), layout="llava-hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert config["image_token_index"] == added["<image>"] == size and config["pad_token_id"] == added["<pad>"]
    rows = config["text_config"]["vocab_size"]
    assert rows % 64 == 0 and 0 <= rows - size - 2 < 64
    assert config["projector_hidden_act"] == "linear"
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        assert np.array_equal(after[f"language_model.{name}"][:size], before[name])
        fresh = after[f"language_model.{name}"][size:]
        assert len(np.unique(fresh, axis=0)) == len(fresh) and np.isfinite(fresh).all()
    assert np.array_equal(after["multi_modal_projector.linear_2.weight"], np.eye(64, dtype=np.float32))
    assert any(f"{rows - size} rows of new tokens added" in line for line in lines)

    conversion.convert(str(tmp_path / "hf"), str(tmp_path / "again"), layout="llava-original", verify=False)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {
        name: tensor.tobytes() for name, tensor in before.items()
    }
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == size


def test_answers_are_the_same_in_all_layouts(golden, tmp_path):
    source, _ = with_tokenizer(golden / "llava-original", tmp_path / "original")
    conversion.convert(str(source), str(tmp_path / "hf"), layout="llava-hf")
    conversion.convert(str(tmp_path / "hf"), str(tmp_path / "ours"), layout="ours")
    asked = {"max_new_tokens": 6, "images": [tiny.image(40, 40)]}
    answers = [pretrained.load(tmp_path / name).generate("482 and 7?", **asked) for name in ("original", "hf", "ours")]
    assert answers[0] == answers[1] == answers[2]


def test_a_model_without_tokenizer_gets_the_next_ids(golden, tmp_path):
    conversion.convert(str(golden / "llava-original"), str(tmp_path / "hf"), layout="llava-hf")
    checkpoint = hf.load(tmp_path / "hf")
    assert checkpoint.tokens.image == 211 and checkpoint.tokens.pad == 212
    assert checkpoint.config.language_model.vocab_size == 256


def test_a_second_linear_map_that_is_none_is_refused(golden, tmp_path):
    conversion.convert(str(golden / "llava-original"), str(tmp_path / "hf"), layout="llava-hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"][3, 4] = 1e-3
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match="linear_2.weight.*not the identity"):
        hf.load(tmp_path / "hf")


def test_an_original_without_its_tower(golden, tmp_path):
    """Its folder is read with the tower beside it, and written without it again."""
    checkpoint, _ = model_folder.read(golden / "llava-original")
    tensors = load_file(golden / "llava-original" / "model.safetensors")
    source, tower = tmp_path / "original", tmp_path / "clip"
    source.mkdir()
    tower.mkdir()
    prefix = "model.vision_tower.vision_tower."
    save_file({n: t for n, t in tensors.items() if not n.startswith(prefix)}, source / "model.safetensors")
    (source / "config.json").write_text((golden / "llava-original" / "config.json").read_text())
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    save_file(inside, tower / "model.safetensors")
    vision = json.loads((golden / "llava-original" / "vision_config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**vision, "model_type": "clip_vision_model"}))
    with pytest.raises(InputError, match="leaves its vision tower out: give the folder of openai/clip-vit"):
        pretrained.load(source)
    conversion.convert(str(source), str(tmp_path / "ours"), layout="ours", vision=str(tower))
    again, _ = model_folder.read(tmp_path / "ours")
    for path, array in checkpoint.flat().items():
        assert np.array_equal(np.asarray(array), np.asarray(again.flat()[path])), path
    lines = conversion.convert(str(tmp_path / "ours"), str(tmp_path / "back"), layout="llava-original", verify=True)
    assert any("all equal" in line for line in lines) and not any("phantom_jax.load" in line for line in lines)
    assert any(f"--source={tmp_path / 'back'} --vision=CLIP" in line for line in lines)
    assert set(load_file(tmp_path / "back" / "model.safetensors")) == set(tensors) - {
        name for name in tensors if name.startswith(prefix)
    }
    with pytest.raises(InputError, match="holds its vision tower: leave --vision out"):
        conversion.convert(str(golden / "llava-original"), str(tmp_path / "x"), layout="ours", vision=str(tower))


@pytest.mark.parametrize("style", ["made from a config", "in memory"])
def test_newer_names_of_transformers_are_read(golden, tmp_path, style):
    tensors = load_file(golden / "llava-hf" / "model.safetensors")
    renamed = {name.replace("vision_tower.vision_model.", "vision_tower."): tensors[name] for name in tensors}
    if style == "in memory":
        memory = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
        memory |= {part: f"model.{part}" for part in ("vision_tower.", "multi_modal_projector.")}
        renamed = {
            next(new + name.removeprefix(old) for old, new in memory.items() if name.startswith(old)): tensor
            for name, tensor in renamed.items()
        }
    assert not set(renamed) & {name for name in tensors if "vision_tower" in name}
    shutil.copytree(golden / "llava-hf", tmp_path / "newer")
    save_file(renamed, tmp_path / "newer" / "model.safetensors")
    conversion.convert(str(tmp_path / "newer"), str(tmp_path / "back"), layout="llava-hf", verify=True)
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
