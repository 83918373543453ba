"""Small models and batches for the tests of this folder and of generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig, VisionLanguageModel
from phantom_jax.ops.rope import RopeConfig

DECODER = DecoderConfig(
    vocab_size=61,
    embed_dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    qkv_bias=True,
    rope=RopeConfig(max_length=64),
    # Large, so that nothing about the phantom branch can hide below a tolerance.
    phantom=PhantomConfig(eta=0.5),
)
TOWER = VisionTowerConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, patch_size=4, image_size=16)
CONFIG = VisionLanguageConfig(TOWER, ProjectorConfig("pixel_shuffle", 16, 32, shuffle=2), DECODER)


def with_decoder(**fields) -> VisionLanguageConfig:
    return dataclasses.replace(CONFIG, language_model=dataclasses.replace(DECODER, **fields))


def text_batch(token_ids, lengths=None, left=False):
    """A batch of text rows [B, L], padded left or right where `lengths` are shorter."""
    token_ids = np.asarray(token_ids)
    rows, length = token_ids.shape
    lengths = np.full(rows, length) if lengths is None else np.asarray(lengths)
    index = np.arange(length)[None]
    real = index >= length - lengths[:, None] if left else index < lengths[:, None]
    return {
        "token_ids": jnp.asarray(token_ids, jnp.int32),
        "positions": jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0), jnp.int32),
        "segment_ids": jnp.asarray(real, jnp.int32),
    }


def random_ids(rows, length, seed=0, vocab=61):
    return np.random.default_rng(seed).integers(3, vocab, (rows, length))


@functools.partial(jax.jit, static_argnames=("model", "rope_length"))
def logits(model, params, batch, rope_length=32):
    """Of every token; compiled once for each shape."""
    return model.apply({"params": params}, batch, rope_length=rope_length)


def init(config: VisionLanguageConfig, seed=0, **attributes):
    """A module and its unboxed parameters, phantom linears made large."""
    model = VisionLanguageModel(config, **attributes)
    size = config.vision_tower.image_size
    batch = text_batch(random_ids(1, 4)) | {
        "pixels": jnp.zeros((1, 1, size, size, 3)),
        "image_slots": jnp.full((1, 4), -1, jnp.int32),
        "targets": jnp.zeros((1, 4), jnp.int32),
    }
    initialise = jax.jit(lambda key: model.init(key, batch, rope_length=8, method="score")["params"])
    params = meta.unbox(initialise(jax.random.key(seed)))

    def enlarge(path, leaf):
        return leaf * 20 if any(getattr(key, "key", None) == "phantom" for key in path) else leaf

    return model, jax.tree_util.tree_map_with_path(enlarge, params)
