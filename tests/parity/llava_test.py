"""LLaVA checkpoints that `transformers` writes, read here: the same logits and the same answers as in PyTorch.

The stored golden numbers fix a few shapes; these models are made on the spot, so that widths, head counts and kinds of
RoPE vary freely.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from phantom_jax.checkpoints import hf
from phantom_jax.generation.settings import Settings
from phantom_jax.models.vlm import VisionLanguageModel
from tests.generation.run import run, unrolled

IMAGE, PATCHES, VOCABULARY, NEW_TOKENS = 99, 16, 100, 8

TEXTS = {
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one kv head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 32},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-5},
}


@pytest.fixture(params=TEXTS.values(), ids=TEXTS.keys())
def models(request, tmp_path):
    """A model in PyTorch, and the checkpoint that it saved as it is read here."""
    torch.manual_seed(0)
    text = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6} | request.param
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        initializer_range=0.2,
    )
    text = LlamaConfig(
        intermediate_size=96, num_hidden_layers=2, vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=0, **text
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2, image_seq_length=16
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(tmp_path)
    return theirs, hf.load(tmp_path)


def _inputs():
    """Two left-padded rows with one image each."""
    rng = np.random.default_rng(0)
    rows = [[5, 6, *[IMAGE] * PATCHES, *rng.integers(3, IMAGE, 9)], [7, *[IMAGE] * PATCHES, *rng.integers(3, IMAGE, 4)]]
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    pixels = rng.normal(size=(2, 3, 28, 28)).astype(np.float32)
    return ids, mask, pixels


def _batch(ids, mask, pixels):
    is_image = (ids == IMAGE) & (mask > 0)
    return {
        "token_ids": jnp.asarray(ids),
        "positions": jnp.asarray(np.maximum(mask.cumsum(1) - 1, 0), jnp.int32),
        "segment_ids": jnp.asarray(mask),
        "image_slots": jnp.asarray(np.where(is_image, is_image.cumsum(1) - 1, -1), jnp.int32),
        "pixels": jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None]),
    }


def test_logits_and_answers(models):
    theirs, ours = models
    ids, mask, pixels = _inputs()
    inputs = {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.tensor(pixels),
    }
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(**inputs, position_ids=positions).logits.numpy()
        answers = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, ids.shape[1] :].numpy()

    model = VisionLanguageModel(ours.config)
    params = jax.tree.map(jnp.asarray, ours.params)
    batch = _batch(ids, mask, pixels)
    longest = int(mask.sum(1).max())
    logits = np.asarray(model.apply({"params": params}, batch, rope_length=longest))
    assert np.abs(expected[mask > 0]).max() > 1, "logits near zero would equal anything"
    np.testing.assert_allclose(logits[mask > 0], expected[mask > 0], rtol=0, atol=2e-4)

    settings = Settings(max_new_tokens=NEW_TOKENS)
    tokens, _ = run(*unrolled(model, params), batch, settings, rope_length=longest + NEW_TOKENS)
    np.testing.assert_array_equal(tokens[:, 0], answers)
