"""Every published size by name, and the quickstart's.

Sizes: Phantom's models and their language models from their public configurations; LLaVA's from the base models of
the scaling study (arXiv 2309.09958).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from phantom_jax.errors import InputError
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.rope import RopeConfig

INTERNVIT_300M = VisionTowerConfig()

# The short and long factors of the 128k Phi-3 come with its checkpoint; ones are the plain rotation.
_PHI3_ROPE = RopeConfig(
    theta=1e4,
    kind="su",
    max_length=131_072,
    original_max_length=4096,
    short_factor=(1.0,) * 48,
    long_factor=(1.0,) * 48,
)
_INTERNLM2_ROPE = RopeConfig(theta=1e6, kind="dynamic", factor=2.0, max_length=32_768)
_QWEN2_ROPE = RopeConfig(theta=1e6, max_length=32_768)


def clip_large(image_size: int = 224) -> VisionTowerConfig:
    """CLIP ViT-L/14 at 224 or 336 pixels, read after layer 23 of 24."""
    return VisionTowerConfig(
        num_layers=23,
        image_size=image_size,
        norm_epsilon=1e-5,
        activation="quick_gelu",
        patch_bias=False,
        layer_scale=False,
        pre_norm=True,
        unused_layers=1,
    )


def _phantom(decoder: DecoderConfig, vision: VisionTowerConfig = INTERNVIT_300M) -> VisionLanguageConfig:
    decoder = dataclasses.replace(decoder, phantom=PhantomConfig())
    return VisionLanguageConfig(
        vision, ProjectorConfig("pixel_shuffle", vision.embed_dim, decoder.embed_dim, shuffle=2), decoder
    )


def _llava(embed_dim: int, mlp_dim: int, layers: int, heads: int, kv_heads: int, epsilon: float, max_length: int):
    rope = RopeConfig(theta=1e4, max_length=max_length)
    decoder = DecoderConfig(32_000, embed_dim, layers, heads, kv_heads, 128, mlp_dim, epsilon, rope=rope)
    return VisionLanguageConfig(clip_large(), ProjectorConfig("linear", 1024, embed_dim), decoder)


MODELS: dict[str, VisionLanguageConfig] = {
    "phantom-0.5b": _phantom(DecoderConfig(151_655, 896, 24, 14, 2, 64, 4864, 1e-6, qkv_bias=True, rope=_QWEN2_ROPE)),
    "phantom-1.8b": _phantom(DecoderConfig(92_553, 2048, 24, 16, 8, 128, 8192, rope=_INTERNLM2_ROPE)),
    "phantom-3.8b": _phantom(DecoderConfig(32_020, 3072, 32, 32, 32, 96, 8192, rope=_PHI3_ROPE)),
    "phantom-7b": _phantom(DecoderConfig(92_553, 4096, 32, 32, 8, 128, 14_336, rope=_INTERNLM2_ROPE)),
    "llava-7b": _llava(4096, 11_008, 32, 32, 32, 1e-6, 2048),
    "llava-13b": _llava(5120, 13_824, 40, 40, 40, 1e-6, 2048),
    "llava-33b": _llava(6656, 17_920, 60, 52, 52, 1e-6, 2048),
    "llava-65b": _llava(8192, 22_016, 80, 64, 64, 1e-5, 2048),
    "llava-70b": _llava(8192, 28_672, 80, 64, 8, 1e-5, 4096),
    # A Phantom small enough to train on a laptop: 32 px tiles, 4 image tokens each.
    "phantom-quickstart": _phantom(
        DecoderConfig(384, 128, 3, 4, 2, 32, 384, 1e-6, qkv_bias=True, rope=RopeConfig(max_length=512)),
        VisionTowerConfig(embed_dim=128, num_layers=4, num_heads=4, mlp_dim=512, patch_size=8, image_size=32),
    ),
    # A LLaVA to try recipes with: images of 32 px, 16 tokens each.
    "llava-tiny": VisionLanguageConfig(
        dataclasses.replace(
            clip_large(), embed_dim=64, num_layers=2, num_heads=4, mlp_dim=128, patch_size=8, image_size=32
        ),
        ProjectorConfig("linear", 64, 64),
        DecoderConfig(384, 64, 2, 4, 4, 16, 128, 1e-6, rope=RopeConfig(theta=1e4, max_length=512)),
    ),
}


def get_config(
    name: str, image_size: int | None = None, projector: str | None = None, **decoder
) -> VisionLanguageConfig:
    """A model by name, with the few things that variants change.

    Args:
      name: a key of `MODELS`.
      image_size: pixels of a tile (LLaVA: 224 or 336).
      projector: another `ProjectorConfig.kind` (`mlp2x_gelu` for LLaVA v1.5).
      **decoder: fields of `DecoderConfig`; `phantom=None` gives the plain language model, `phantom={"eta": 1.0}` and
        `rope={...}` change fields of what is there.

    Raises:
      InputError: the name or a field does not exist, or a value does not fit.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no model is called {name!r}: {hint}The models are {', '.join(MODELS)}")
    config = MODELS[name]
    try:
        if image_size is not None:
            tower = dataclasses.replace(config.vision_tower, image_size=image_size)
            config = dataclasses.replace(config, vision_tower=tower)
        if projector is not None:
            config = dataclasses.replace(config, projector=dataclasses.replace(config.projector, kind=projector))
        for field, default in (("phantom", PhantomConfig()), ("rope", RopeConfig())):
            if isinstance(decoder.get(field), Mapping):
                present = getattr(config.language_model, field) or default
                decoder[field] = _replace(present, f"{field}.", decoder[field])
        return dataclasses.replace(config, language_model=_replace(config.language_model, "", decoder))
    except (TypeError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be built so: {error}") from error


def _replace(config, prefix: str, values: Mapping[str, Any]):
    """`dataclasses.replace` that checks names and types."""
    for field, value in values.items():
        known = [entry.name for entry in dataclasses.fields(config)]
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": the fields are {', '.join(known)}"
            raise InputError(f"a decoder has no field {prefix + field!r}{hint}")
        present = getattr(config, field)
        fits = isinstance(value, type(present)) or (isinstance(present, float) and isinstance(value, int))
        if isinstance(present, bool | int | float | str) and not fits:
            raise TypeError(f"{prefix}{field} is {value!r}, it must be of type {type(present).__name__}")
    return dataclasses.replace(config, **values)
