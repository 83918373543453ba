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
from phantom_jax.ops.attention import Structure
from phantom_jax.trees import flatten, unflatten
from tests.checkpoints import parent_folders as folders

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.2,
}
SU = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
}


def language_model(kind):
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    if kind.startswith("qwen2"):
        config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=kind == "qwen2-tied")
        return transformers.Qwen2ForCausalLM(config)
    config = transformers.Phi3Config(
        **SIZES, num_key_value_heads=6, original_max_position_embeddings=24, rope_parameters=SU, eos_token_id=2
    )
    return transformers.Phi3ForCausalLM(config)


def stir(model):
    """Biases and norms start constant, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


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
