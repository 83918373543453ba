"""What is exported as `llava-hf` gives transformers the logits that the reference had, whatever it was made from."""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from phantom_jax import conversion


@pytest.mark.parametrize("source", ["llava-original", "llava-hf"])
@pytest.mark.parametrize("through", ["ours", None])
def test_logits_are_the_references(golden, tmp_path, source, through):
    """A linear projector goes out with an identity behind it; the vocabulary has grown by the image's token."""
    folder = golden / source
    if through is not None:
        conversion.convert(str(folder), str(tmp_path / through), layout=through)
        folder = tmp_path / through
    lines = conversion.convert(str(folder), str(tmp_path / "hf"), layout="llava-hf", verify=True)
    assert any("against transformers: largest difference" in line and "24 likeliest equal" in line for line in lines)
    model, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    with np.load(golden / source / "golden.npz") as data:
        ids, mask = data["image_input_ids"], data["image_attention_mask"]
        pixels, expected = data["image_pixel_values"], data["image_logits"]
    placeholder = 208 if source == "llava-original" else model.config.image_token_index
    ids = np.where(ids == placeholder, model.config.image_token_index, ids)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels)
        )
    present = mask.astype(bool)
    ours = output.logits.numpy()[present][:, : expected.shape[-1]]
    assert np.abs(ours - expected[present]).max() < 2e-4
