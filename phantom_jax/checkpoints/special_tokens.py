"""The tokens that a layout's tokenizer has beyond its language model's."""

import dataclasses
import json
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken

from phantom_jax.errors import InputError
from phantom_jax.processor import Processor

PHANTOM = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""In the order of their ids, after those of the language model."""
LLAVA_HF = ("<image>", "<pad>")
UNKNOWN = "<unk>"
"""Stands for an image's features in an original LLaVA. Its vocabulary has no token for that, features are put in by
place: any token will do that no text comes to."""


def phantom_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A language model's tokenizer with Phantom's tokens at the next free ids; those that it has keep theirs."""
    return with_tokens(tokenizer, PHANTOM)


def for_format(processor: Processor, layout: str) -> Processor:
    """The processor as a layout needs it.

    `llava-hf` has a token for an image and one for padding, which come last in the vocabulary; `llava-original` has
    neither, so they go where they are the last ones. The model's embeddings must follow: the vocabulary has
    `processor.tokenizer.get_vocab_size()` tokens, an image's is `processor.image_token_id`.

    Args:
      processor: of any layout.
      layout: one of `layouts.MODEL_LAYOUTS`. All but the two are left as they are.

    Raises:
      InputError: the tokenizer has no `<unk>`, which an original LLaVA needs.
    """
    if layout == "llava-hf":
        return _with(processor, with_tokens(processor.tokenizer, LLAVA_HF), LLAVA_HF[0])
    if layout == "llava-original" and processor.template.image_token != UNKNOWN:
        tokenizer = _without_last(processor.tokenizer, LLAVA_HF)
        if tokenizer.token_to_id(UNKNOWN) is None:
            raise InputError(f"the tokenizer has no {UNKNOWN!r}, so it is no original LLaVA's: choose another format")
        return _with(processor, tokenizer, UNKNOWN)
    return processor


def _with(processor: Processor, tokenizer: tokenizers.Tokenizer, image_token: str) -> Processor:
    template = dataclasses.replace(processor.template, image_token=image_token)
    return dataclasses.replace(processor, tokenizer=tokenizer, template=template)


def with_tokens(tokenizer: tokenizers.Tokenizer, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """A copy with those special tokens that it lacks, at the next free ids.

    Raises:
      InputError: the next ids are in use.
    """
    before = tokenizer.get_vocab()
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    after = copy.get_vocab()
    taken = set(before.values())
    for token in tokens:
        if token not in before and after[token] in taken:
            raise InputError(f"the ids of the vocabulary have gaps, and {token!r} got {after[token]}, which is in use")
    return copy


def _without_last(tokenizer: tokenizers.Tokenizer, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Without those of the tokens that have the last ids."""
    content = json.loads(tokenizer.to_str())
    added = sorted(content["added_tokens"], key=lambda token: token["id"])
    vocab = content["model"]["vocab"]
    last = max(vocab.values(), default=-1)
    while added and added[-1]["content"] in tokens and added[-1]["id"] > last:
        added.pop()
    content["added_tokens"] = added
    return tokenizers.Tokenizer.from_str(json.dumps(content))
