"""Models put together from parents: sizes of the published ones, bytes of the parents, and what is fresh."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from phantom_jax.checkpoints import hf
from phantom_jax.checkpoints.assemble import assemble
from phantom_jax.checkpoints.special_tokens import UNKNOWN
from phantom_jax.data.conversation import template_names
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from phantom_jax.trees import flatten
from tests.checkpoints import parent_folders as folders
from tests.tiny_tokenizers import language_model, llama

SMALL = folders.TINY | {"vocab_size": 40}
QWEN2 = folders.QWEN2_05B | SMALL | {"num_key_value_heads": 2}
INTERNLM2 = folders.INTERNLM2_18B | SMALL | {"num_key_value_heads": 2}
PHI3 = folders.PHI3_MINI_128K | SMALL | {"num_key_value_heads": 4}
PHI3 |= {"rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}}
VICUNA = folders.VICUNA_7B | SMALL
INTERNVIT = folders.INTERNVIT_300M | folders.TINY_VISION
CLIP = folders.CLIP_LARGE | folders.TINY_VISION


@pytest.mark.parametrize(
    "name, llm, millions, image, eos",
    [
        ("phantom-0.5b", folders.QWEN2_05B, 803.5, 151648, (151645, 151643)),
        ("phantom-1.8b", folders.INTERNLM2_18B, 2210.5, 92546, (92542, 2)),
        ("phantom-3.8b", folders.PHI3_MINI_128K, 4150.4, 32013, (32007, 32000)),
        ("phantom-7b", folders.INTERNLM25_7B, 8081.7, 92546, (92542, 2)),
    ],
)
def test_published_parents_make_the_published_phantoms(name, llm, millions, image, eos, tmp_path):
    vision = folders.write_empty(tmp_path / "vision", folders.INTERNVIT_300M, folders.internvit(folders.INTERNVIT_300M))
    checkpoint, _, _ = assemble(vision, folders.write_empty(tmp_path / "llm", llm, folders.language_model(llm)))
    # The smallest Qwen2 ties its head to its embedding, and so does what is made of it.
    assert checkpoint.config == zoo.get_config(name, tie_embeddings=llm["tie_word_embeddings"])
    arrays = flatten({"params": checkpoint.params})
    assert {path: array.shape for path, array in arrays.items()} == hf.shapes(checkpoint.config)
    assert sum(array.size for array in arrays.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert checkpoint.published == hf.hf_config.Published("phantom", llm["model_type"])
    assert (checkpoint.tokens.image, checkpoint.tokens.eos) == (image, eos)


@pytest.mark.parametrize(
    "name, llm",
    [
        ("llava-7b", folders.VICUNA_7B),
        ("llava-65b", folders.LLAMA_65B),
        ("llava-70b", folders.LLAMA2_70B),
    ],
)
def test_published_parents_make_the_llavas_of_the_study(name, llm, tmp_path):
    vision = folders.write_empty(tmp_path / "vision", folders.CLIP_LARGE_336, folders.clip_vision(folders.CLIP_LARGE))
    with pytest.raises(InputError, match="misshapen"):
        assemble(vision, folders.write_empty(tmp_path / "llm", llm, folders.language_model(llm)))
    vision = folders.write_empty(tmp_path / "clip", folders.CLIP_LARGE, folders.clip_vision(folders.CLIP_LARGE))
    checkpoint, _, entries = assemble(vision, tmp_path / "llm")
    assert checkpoint.config == zoo.get_config(name)
    shapes = {p: a.shape for p, a in flatten({"params": checkpoint.params, "unused": checkpoint.unused}).items()}
    assert shapes == hf.shapes(checkpoint.config)
    assert checkpoint.published.format == "llava-original"
    assert {entry.action for entry in entries} == {"kept", "fresh"}


def parent(folder, config, dtype=np.float32, seed=0):
    shapes = {
        "intern_vit_6b": folders.internvit,
        "clip_vision_model": folders.clip_vision,
    }.get(config["model_type"], folders.language_model)(config)
    weights = folders.random_weights(shapes, dtype, seed)
    return folders.write(folder, config, weights), weights


def saved(checkpoint, folder):
    folder.mkdir()
    hf.save(checkpoint, folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("llm", [QWEN2, INTERNLM2, PHI3], ids=lambda config: config["model_type"])
def test_phantom_keeps_the_bytes_of_its_parents(llm, tmp_path):
    vision, vision_weights = parent(tmp_path / "vision", INTERNVIT, ml_dtypes.bfloat16)
    text, text_weights = parent(tmp_path / "llm", llm, ml_dtypes.bfloat16)
    checkpoint, _, entries = assemble(vision, text)
    tensors = saved(checkpoint, tmp_path / "phantom")
    table = {"model.embed_tokens.weight", "model.tok_embeddings.weight", "lm_head.weight", "output.weight"}
    for name, array in vision_weights.items():
        assert tensors["vision_model." + name].tobytes() == array.tobytes(), name
    for name, array in text_weights.items():
        new = tensors["language_model." + name]
        assert new.dtype == ml_dtypes.bfloat16
        assert new[: len(array)].tobytes() == array.tobytes(), name
        assert len(new) == len(array) + 9 * (name in table)
    old = len(vision_weights) + len(text_weights)
    assert sum(entry.action in ("kept", "transformed") for entry in entries) == old
    transformed = {entry.name: entry.reason for entry in entries if entry.action == "transformed"}
    assert transformed == {name: "9 rows of new tokens added" for name in table & set(text_weights)}
    fresh = {path for entry in entries if entry.action == "fresh" for path in entry.paths}
    assert fresh == {path for path in hf.shapes(checkpoint.config) if "/phantom/" in path or "/projector/" in path}
    assert not any(entry.action == "dropped" for entry in entries)
    # The folder is a Phantom's, and says so.
    again = hf.load(tmp_path / "phantom")
    assert again.config == checkpoint.config
    assert again.tokens == dataclasses.replace(checkpoint.tokens, pad=again.tokens.pad)
    assert checkpoint.tokens.image == 42


def test_llava_keeps_the_bytes_of_its_parents(tmp_path):
    vision, vision_weights = parent(tmp_path / "vision", CLIP, np.float16)
    text, text_weights = parent(tmp_path / "llm", VICUNA, np.float16)
    checkpoint, _, _ = assemble(vision, text)
    assert checkpoint.config.projector.kind == "linear"
    assert checkpoint.config.language_model.vocab_size == 40
    tensors = saved(checkpoint, tmp_path / "llava")
    for name, array in vision_weights.items():
        assert tensors.pop("model.vision_tower.vision_tower." + name).tobytes() == array.tobytes(), name
    for name, array in text_weights.items():
        assert tensors.pop(name).tobytes() == array.tobytes(), name
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "model.mm_projector.weight": (16, 8),
        "model.mm_projector.bias": (16,),
    }
    checkpoint, _, _ = assemble(vision, text, projector_kind="mlp2x_gelu")
    assert set(saved(checkpoint, tmp_path / "mlp")) - set(vision_weights) >= {"model.mm_projector.2.weight"}


def test_more_rows_than_tokens(tmp_path, monkeypatch):
    """Qwen2 and Phi-3 have more rows than their tokenizers have tokens: those behind the last one go."""
    monkeypatch.setattr("phantom_jax.checkpoints.assemble._USED", {"qwen2": 30})
    vision, _ = parent(tmp_path / "vision", INTERNVIT)
    text, weights = parent(tmp_path / "llm", QWEN2)
    checkpoint, _, entries = assemble(vision, text)
    embedding = np.asarray(checkpoint.params["language_model"]["embedding"])
    old = weights["model.embed_tokens.weight"]
    assert embedding.shape == (39, 16)
    assert embedding[:30].tobytes() == old[:30].tobytes()
    assert not np.any(embedding[30:] == old[30:39])
    np.testing.assert_allclose(embedding[30:], np.tile(old[:30].mean(0), (9, 1)), atol=0.02)
    (changed,) = [entry for entry in entries if entry.action == "transformed"]
    assert changed.reason == "rows 30 to 39 of no token dropped and 9 rows of new tokens added"


def test_whole_internvl2(tmp_path, monkeypatch):
    """It knows the tokens of images: its rows stay. Its projector is taken where it is asked for."""
    monkeypatch.setattr("phantom_jax.checkpoints.assemble._USED", {"internlm2": 31})
    config = {
        "model_type": "internvl_chat",
        "llm_config": INTERNLM2,
        "vision_config": INTERNVIT,
    }
    shapes = folders.language_model(INTERNLM2, "language_model.") | folders.internvit(INTERNVIT, "vision_model.")
    shapes |= {"mlp1.0.weight": (32,), "mlp1.0.bias": (32,)}
    shapes |= {"mlp1.1.weight": (16, 32), "mlp1.1.bias": (16,), "mlp1.3.weight": (16, 16), "mlp1.3.bias": (16,)}
    weights = folders.random_weights(shapes)
    whole = folders.write(tmp_path / "internvl2", config, weights)
    checkpoint, _, entries = assemble(whole, whole, whole)
    tensors = saved(checkpoint, tmp_path / "phantom")
    for name, array in weights.items():
        assert tensors[name.replace("mlp1", "vision_proj")].tobytes() == array.tobytes(), name
    assert all("phantom" in name for name in set(tensors) - {name.replace("mlp1", "vision_proj") for name in weights})
    assert {entry.reason for entry in entries if entry.action == "fresh"} == {"no parent has a phantom dimension"}
    # Each tensor is kept once; the two other times that the folder is read do not count as losses.
    assert not any(entry.action == "dropped" for entry in entries)
    alone, _, entries = assemble(whole, whole)
    assert not np.array_equal(alone.params["projector"]["linear_1"]["kernel"], weights["mlp1.1.weight"].T)
    assert {entry.name for entry in entries if entry.action == "dropped"} == {n for n in weights if "mlp1" in n}


def test_phantom_with_a_tokenizer(tmp_path):
    """Ids and rows are those of the tokenizer, which gets the tokens of images behind its own."""
    vision, _ = parent(tmp_path / "vision", INTERNVIT)
    tokenizer = language_model()
    count = tokenizer.get_vocab_size()
    text, weights = parent(tmp_path / "llm", QWEN2 | {"vocab_size": count + 20, "eos_token_id": 0})
    tokenizer.save(str(text / "tokenizer.json"))
    checkpoint, processor, entries = assemble(vision, text)
    tokens = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
    assert [processor.tokenizer.token_to_id(token) for token in tokens] == list(range(count, count + 9))
    assert checkpoint.config.language_model.vocab_size == count + 9
    assert checkpoint.tokens.image == processor.image_token_id == count + 2
    assert checkpoint.tokens.eos == (tokenizer.token_to_id("<|im_end|>"), 0)
    assert processor.tokens_per_tile == 4
    (changed,) = [entry for entry in entries if entry.action == "transformed"]
    assert changed.reason == f"rows {count} to {count + 19} of no token dropped and 9 rows of new tokens added"
    embedding = np.asarray(checkpoint.params["language_model"]["embedding"])
    assert embedding[:count].tobytes() == weights["model.embed_tokens.weight"][:count].tobytes()
    prompt = processor.encode_prompt("what is it", [PIL.Image.new("RGB", (28, 28))])
    assert np.sum(prompt.token_ids == count + 2) == 4
    assert prompt.token_ids.max() < count + 9
    text, _ = parent(tmp_path / "other", QWEN2)
    tokenizer.save(str(text / "tokenizer.json"))
    with pytest.raises(InputError, match=f"tokenizer of {count} tokens and a model of 40"):
        assemble(vision, text)


def test_llava_with_a_tokenizer(tmp_path):
    vision, _ = parent(tmp_path / "vision", CLIP)
    (vision / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    tokenizer = llama("prepend", special=())
    text, _ = parent(tmp_path / "llm", VICUNA | {"vocab_size": tokenizer.get_vocab_size()})
    tokenizer.save(str(text / "tokenizer.json"))
    checkpoint, processor, _ = assemble(vision, text)
    assert checkpoint.config.language_model.vocab_size == processor.tokenizer.get_vocab_size()
    assert processor.template.image_token == UNKNOWN
    assert template_names(processor.template) == ["vicuna_v1"]
    assert (processor.image_mode, processor.mean, processor.tokens_per_tile) == ("crop", (0.1, 0.2, 0.3), 16)
    _, processor, _ = assemble(vision, text, template="llava_llama_2")
    assert template_names(processor.template) == ["llava_llama_2"]
    with pytest.raises(InputError, match="there is no template 'vicuna_v9'"):
        assemble(vision, text, template="vicuna_v9")


def test_what_is_fresh(tmp_path):
    vision, _ = parent(tmp_path / "vision", INTERNVIT)
    text, _ = parent(tmp_path / "llm", INTERNLM2)
    first, again, other = (assemble(vision, text, seed=seed)[0] for seed in (0, 0, 1))
    trees = [flatten({"params": checkpoint.params}) for checkpoint in (first, again, other)]
    for path, array in trees[0].items():
        one, two, three = (np.asarray(tree[path]) for tree in trees)
        assert one.tobytes() == two.tobytes(), path
        drawn = path.endswith(("/embedding", "head/kernel")) or (
            ("/phantom/" in path or "/projector/" in path) and one.ndim > 1 and not path.endswith("bias")
        )
        assert (one.tobytes() != three.tobytes()) == drawn, path
        if "/phantom/" not in path:
            continue
        assert array.dtype == np.float32
        if path.endswith("bias"):
            assert not np.any(one)
            continue
        assert np.any(one[0] != one[1]), "layers differ"
        # Deviation 0.02, as released; of 2 x 4 numbers or 2 x 16.
        assert 0.5 < np.sqrt(np.mean(one**2)) / 0.02 < 2.0, path


def test_given_projector(tmp_path):
    vision, _ = parent(tmp_path / "vision", CLIP)
    text, _ = parent(tmp_path / "llm", VICUNA)
    weights = folders.random_weights({"model.mm_projector.0.weight": (16, 8), "model.mm_projector.0.bias": (16,)})
    weights |= folders.random_weights({"model.mm_projector.2.weight": (16, 16), "model.mm_projector.2.bias": (16,)})
    safetensors.numpy.save_file(weights, tmp_path / "projector.safetensors")
    checkpoint, _, entries = assemble(vision, text, tmp_path / "projector.safetensors")
    assert checkpoint.config.projector.kind == "mlp2x_gelu"
    assert {entry.action for entry in entries} == {"kept"}
    tensors = saved(checkpoint, tmp_path / "llava")
    assert all(tensors[name].tobytes() == array.tobytes() for name, array in weights.items())
    with pytest.raises(InputError, match="is a projector 'mlp2x_gelu', this model has linear"):
        assemble(vision, text, tmp_path / "projector.safetensors", projector_kind="linear")


@pytest.mark.parametrize("size, kind", [((12, 8), "maps 8 to 12 channels"), ((16, 6), "maps 6 to 16 channels")])
def test_projector_of_another_width(size, kind, tmp_path):
    vision, _ = parent(tmp_path / "vision", CLIP)
    text, _ = parent(tmp_path / "llm", VICUNA)
    weights = folders.random_weights({"mm_projector.weight": size, "mm_projector.bias": size[:1]})
    safetensors.numpy.save_file(weights, tmp_path / "projector.safetensors")
    with pytest.raises(InputError, match=f"{kind}.* tower is 8 and the language model 16 wide"):
        assemble(vision, text, tmp_path / "projector.safetensors")


def test_parents_that_do_not_go_together(tmp_path):
    clip, _ = parent(tmp_path / "clip", CLIP)
    internvit, _ = parent(tmp_path / "internvit", INTERNVIT)
    vicuna, _ = parent(tmp_path / "vicuna", VICUNA)
    qwen2, _ = parent(tmp_path / "qwen2", QWEN2)
    with pytest.raises(InputError, match=r"clip is CLIP and .*qwen2 is qwen2: LLaVA is made of CLIP and LLaMA"):
        assemble(clip, qwen2)
    with pytest.raises(InputError, match=r"internvit is InternViT and .*vicuna is llama"):
        assemble(internvit, vicuna)
    with pytest.raises(InputError, match="projector_kind='linear': Phantom with qwen2 has pixel_shuffle"):
        assemble(internvit, qwen2, projector_kind="linear")
    weights = folders.random_weights({"mm_projector.weight": (16, 8), "mm_projector.bias": (16,)})
    safetensors.numpy.save_file(weights, tmp_path / "projector.safetensors")
    with pytest.raises(InputError, match="is a projector 'linear', this model has pixel_shuffle"):
        assemble(internvit, qwen2, tmp_path / "projector.safetensors")
    with pytest.raises(InputError, match="a vision tower is a folder of"):
        assemble(qwen2, qwen2)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    """The largest that memory and disk of a laptop could not hold: 137 GB that take no room."""
    vision = folders.write_empty(tmp_path / "clip", folders.CLIP_LARGE, folders.clip_vision(folders.CLIP_LARGE))
    shapes = folders.language_model(folders.LLAMA2_70B)
    text = folders.write_empty(tmp_path / "llm", folders.LLAMA2_70B, shapes)
    assert (text / "model.safetensors").stat().st_size > 2 * sum(math.prod(shape) for shape in shapes.values())
    checkpoint, _, _ = assemble(vision, text)
    np.testing.assert_array_equal(checkpoint.params["language_model"]["embedding"][31_999, :3], np.zeros(3))
