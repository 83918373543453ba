"""Parents that transformers wrote, and what is put together of them: text and features as in PyTorch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from phantom_jax.checkpoints.assemble import assemble
from phantom_jax.models.decoder import Decoder
from phantom_jax.models.vision_tower import VisionTower
from phantom_jax.ops.structure import Structure
from phantom_jax.trees import flatten, unflatten
from tests.checkpoints import parent_folders as folders
from tests.parity.language_models import language_model, stir

VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.2,
}


def read(tree):
    return unflatten({path: np.asarray(leaf) for path, leaf in flatten(tree).items()})


def text_logits(checkpoint, ids):
    """Of the language model alone, as it was before it became part of the other."""
    config = dataclasses.replace(checkpoint.config.language_model, phantom=None)
    params = read(checkpoint.params["language_model"])
    params["layers"]["attention"].pop("phantom", None)
    zeros = jnp.zeros(ids.shape, jnp.int32)
    structure = Structure(zeros + jnp.arange(ids.shape[1])[None], zeros + 1, zeros)
    model = Decoder(config)

    def run(module, ids):
        return module.logits(module(module.embed(ids), structure, rope_length=ids.shape[1]).hidden)

    return model.apply({"params": params}, jnp.asarray(ids), method=run)


def check_text(checkpoint, theirs, length):
    ids = np.random.default_rng(0).integers(3, 97, (2, length))
    with torch.no_grad():
        expected = theirs(torch.asarray(ids)).logits.numpy()
    ours = np.asarray(text_logits(checkpoint, ids))
    np.testing.assert_allclose(ours[..., :97], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2", "phi3"])
def test_phantom(kind, length, tmp_path):
    torch.manual_seed(0)
    theirs = stir(language_model(kind))
    theirs.save_pretrained(tmp_path / "llm")
    config = folders.INTERNVIT_300M | folders.TINY_VISION
    vision = folders.write(tmp_path / "vision", config, folders.random_weights(folders.internvit(config)))
    checkpoint, _, _ = assemble(vision, tmp_path / "llm")
    assert checkpoint.config.language_model.vocab_size == 106
    check_text(checkpoint, theirs, length)


@pytest.mark.parametrize("whole", [True, False], ids=["full CLIP", "its tower"])
def test_llava(whole, tmp_path):
    torch.manual_seed(0)
    theirs = stir(language_model("llama"))
    theirs.save_pretrained(tmp_path / "llm")
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        clip = stir(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION)))
        tower = clip.vision_model
    else:
        clip = tower = stir(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    clip.save_pretrained(tmp_path / "vision")
    checkpoint, _, entries = assemble(tmp_path / "vision", tmp_path / "llm")
    assert any(entry.action == "dropped" for entry in entries) == whole
    check_text(checkpoint, theirs, 20)
    pixels = np.random.default_rng(1).normal(size=(2, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        expected = tower(torch.asarray(pixels), output_hidden_states=True).hidden_states[-2].numpy()
    params = read(checkpoint.params["vision_tower"])
    ours = VisionTower(checkpoint.config.vision_tower).apply({"params": params}, pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=2e-4, atol=2e-4)
