"""Our decoder and towers against transformers' own models: tiny random weights, written to disk by transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from phantom_jax import pretrained
from phantom_jax.checkpoints import hf, names
from phantom_jax.checkpoints.tensor_files import TensorFiles
from phantom_jax.models.decoder import Decoder, DecoderConfig
from phantom_jax.models.vision_tower import VisionTower
from phantom_jax.models.zoo import clip_large
from phantom_jax.ops.image import resize_grid
from phantom_jax.ops.rope import RopeConfig
from phantom_jax.ops.structure import Structure
from phantom_jax.trees import unflatten
from tests.parity.language_models import LONGROPE, language_model, llama_config, stir


def decoder_config(rope=None, **fields) -> DecoderConfig:
    return DecoderConfig(97, 48, 3, 6, 2, 8, 64, 1e-6, rope=rope or RopeConfig(theta=1e4, max_length=64), **fields)


DECODERS = {
    "llama": (decoder_config(), "llama"),
    "llama-linear": (decoder_config(RopeConfig(theta=1e4, kind="linear", factor=4.0, max_length=64)), "llama"),
    "qwen2-tied": (decoder_config(qkv_bias=True, tie_embeddings=True), "llama"),
    "phi3": (
        decoder_config(
            RopeConfig(1e4, "su", 1.0, 64, 24, tuple(LONGROPE["short_factor"]), tuple(LONGROPE["long_factor"]))
        ),
        "phi3",
    ),
}
"""By kind our configuration, and the layout of the published names."""


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_logits(kind, length, tmp_path):
    torch.manual_seed(0)
    theirs, (config, layout) = stir(language_model(kind)), DECODERS[kind]
    theirs.save_pretrained(tmp_path)
    model = Decoder(config)
    ids = np.random.default_rng(0).integers(3, 97, (2, length))
    zeros = jnp.zeros((2, length), jnp.int32)
    structure = Structure(zeros + jnp.arange(length)[None], zeros + 1, zeros)

    def logits(decoder, ids):
        return decoder.logits(decoder(decoder.embed(ids), structure, rope_length=length).hidden)

    shapes = small_shapes(model, jnp.asarray(ids), logits)
    rows, files = names.decoder_rows(config, layout, ""), TensorFiles.of_folder(tmp_path)
    hf.check_rows(rows, shapes, files, kind)
    flat = {path: np.asarray(array) for path, array in hf.read_rows(rows, shapes, files).items()}
    params = unflatten(flat)["params"]["language_model"]
    with torch.no_grad():
        expected = theirs(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, ids, method=logits), expected, atol=2e-4)


def small_shapes(model, ids, method):
    import jax
    from flax.linen import meta

    from phantom_jax.trees import flatten

    tree = meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), ids, method=method)))["params"]
    return {f"params/language_model/{path}": leaf.shape for path, leaf in flatten(tree).items()}


def test_llava_made_and_read_by_transformers(tmp_path):
    """A LLaVA that transformers writes gives equal logits here; what we write gives equal logits there."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.2,
    )
    text = llama_config(vocab_size=211)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=208, image_seq_length=16
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    renamed = {  # Version 5.23 leaves `vision_model.` out of a model made from scratch; published files have it.
        name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model" not in name else name: tensor
        for name, tensor in tensors.items()
    }
    from safetensors.numpy import save_file

    save_file(renamed, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    handle = pretrained.load(tmp_path / "theirs")
    pretrained.save(handle, tmp_path / "ours", format="llava-hf")
    reread = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    rng = np.random.default_rng(0)
    ids = np.concatenate([[[1]], np.full((1, 16), 208), rng.integers(3, 200, (1, 9))], axis=1)
    pixels = rng.normal(size=(1, 3, 56, 56)).astype(np.float32)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.as_tensor(ids), pixel_values=torch.as_tensor(pixels)).logits.numpy()
            for model in (theirs, reread)
        ]
    np.testing.assert_array_equal(*expected)
    is_image = ids == 208
    batch = {
        "token_ids": ids,
        "positions": np.arange(ids.shape[1])[None],
        "segment_ids": np.ones_like(ids),
        "image_slots": np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1),
        "pixels": pixels.transpose(0, 2, 3, 1)[:, None],
    }
    ours = handle.model.apply({"params": handle.params}, batch, rope_length=ids.shape[1])
    np.testing.assert_allclose(ours, expected[0], atol=2e-4)


def test_clip_skips_its_last_layer():
    assert VisionTower(clip_large()).config.num_layers == 23


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (16, 16)])
def test_position_resize_is_torch_bicubic(size):
    grid = np.random.default_rng(0).normal(size=(6, 6, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.as_tensor(grid).permute(2, 0, 1)[None], size=size, mode="bicubic", align_corners=False
    )
    np.testing.assert_allclose(resize_grid(jnp.asarray(grid), *size), expected[0].permute(1, 2, 0).numpy(), atol=1e-5)
