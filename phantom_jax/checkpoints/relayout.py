"""From one published layout to another: names, vocabulary and processor change, the numbers stay."""

import dataclasses
from typing import Any

from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.checkpoints.hf_config import TokenIds, check_expressible, publish
from phantom_jax.checkpoints.special_tokens import LLAVA_HF, for_format
from phantom_jax.checkpoints.tensor_report import changed
from phantom_jax.checkpoints.vocabulary import resize_rows
from phantom_jax.processor import Processor

# As in the converter of the llava-hf models: rows that a matrix unit likes.
_ROWS = 64
_EMBEDDING, _HEAD = "params/language_model/embedding", "params/language_model/head/kernel"


def in_layout(checkpoint: Checkpoint, processor: Processor | None, layout: str) -> tuple[Checkpoint, Processor | None]:
    """A model under the names of a layout; what another layout's config said besides is left behind.

    `llava-hf` has tokens for an image and for padding, with rows in embedding and head, filled up to a multiple of 64;
    the original LLaVA has none of these. So they come and go, last in the vocabulary.

    Args:
      checkpoint: a model of any layout.
      processor: its processor.
      layout: one of `layouts.PUBLISHED_LAYOUTS`.

    Raises:
      InputError: the layout cannot express the model, or its weights are quantised.
    """
    checkpoint.check_float(layout)
    if checkpoint.published.format == layout:
        return checkpoint, processor
    published = publish(checkpoint.config, layout)
    published = dataclasses.replace(published, generation_config=checkpoint.published.generation_config)
    check_expressible(checkpoint.config, published)
    if layout == "llava-original" and processor is not None and processor.image_mode == "pad":
        published = dataclasses.replace(published, config={"image_aspect_ratio": "pad"})
    size = checkpoint.config.language_model.vocab_size
    if layout == "llava-hf":
        processor = None if processor is None else for_format(processor, layout)
        ids = [size, size + 1] if processor is None else list(map(processor.tokenizer.token_to_id, LLAVA_HF))
        tokens = TokenIds(ids[0], checkpoint.tokens.eos, ids[1])
        rows = max(size, -(-(max(ids) + 1) // _ROWS) * _ROWS)
        return _with_vocabulary(checkpoint, rows, published, tokens), processor
    if layout == "llava-original" and processor is not None:
        image = processor.image_token_id
        processor = for_format(processor, layout)
        # Where the image's token went, so do its row and all behind it.
        rows = image if image >= processor.tokenizer.get_vocab_size() else size
        tokens = TokenIds(rows - 3, checkpoint.tokens.eos, 0)
        return _with_vocabulary(checkpoint, min(rows, size), published, tokens), processor
    return dataclasses.replace(checkpoint, published=published), processor


def _with_vocabulary(checkpoint: Checkpoint, size: int, published: Any, tokens: TokenIds) -> Checkpoint:
    decoder = checkpoint.config.language_model
    grown = size - decoder.vocab_size
    config = dataclasses.replace(checkpoint.config, language_model=dataclasses.replace(decoder, vocab_size=size))
    flat, entries = checkpoint.flat(), checkpoint.entries
    paths = [path for path in (_EMBEDDING, _HEAD) if path in flat]
    for path in paths:
        flat[path] = resize_rows(flat[path], size, seed=0, axis=0 if path == _EMBEDDING else 1)
    if grown:
        said = f"{grown} rows of new tokens added" if grown > 0 else f"{-grown} rows of tokens that went"
        entries = changed(entries, paths, said)
    return dataclasses.replace(
        checkpoint.with_flat(flat), config=config, published=published, tokens=tokens, entries=entries
    )
