"""A handle with random weights and a real tokenizer, small enough to answer in a moment."""

import dataclasses
import functools

import numpy as np
from PIL import Image

from phantom_jax.checkpoints.hf_config import TokenIds, publish
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.data.tokenizer import train_tokenizer
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.pretrained import VisionLanguage
from phantom_jax.processor import Processor
from tests.generation.run import unrolled
from tests.models import small

TEXTS = ["user\n", "assistant\n", "What is this?", "How many digits are there?", "Read the number.", "Zwölf 数字 🙂"]


def processor(template=TEMPLATES["qwen2"], max_length=160) -> Processor:
    return Processor(
        train_tokenizer(TEXTS, vocab_size=320),
        template,
        tile_size=16,
        max_tiles=6,
        tokens_per_tile=4,
        max_length=max_length,
    )


def handle(decoder: DecoderConfig = small.DECODER, *, seed=0, **fields) -> VisionLanguage:
    text = processor(**fields)
    # 320 words divide by the devices of a mesh.
    config = dataclasses.replace(
        small.CONFIG, language_model=dataclasses.replace(decoder, vocab_size=320, num_layers=2)
    )
    model, params = _weights(config, seed)
    tokens = TokenIds(image=text.image_token_id, eos=(text.end_id,), pad=text.pad_id)
    return VisionLanguage(model, params, text, publish(config), tokens, {})


@functools.cache
def _weights(config, seed):
    return unrolled(*small.init(config, seed=seed))


def image(width=16, height=16, seed=0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))
