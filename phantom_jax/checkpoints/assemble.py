"""A vision-language model put together from published parents: Phantom or LLaVA, ready to be trained.

    InternViT + Qwen2, InternLM2 or Phi-3 -> Phantom, with a fresh phantom dimension in every layer
    CLIP      + LLaMA or Vicuna           -> LLaVA

What the parents hold stays as it is, byte for byte. The projector is fresh where none is given, and tokens of images,
which a language model does not know, get rows of their own in its embedding and head.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from phantom_jax.checkpoints import fresh
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.checkpoints.hf_processor import make_processor, read_image_settings
from phantom_jax.checkpoints.hf_tokenizer import read_tokenizer
from phantom_jax.checkpoints.parents import (
    LanguageParent,
    ProjectorParent,
    VisionParent,
    read_language_model,
    read_projector,
    read_vision_tower,
)
from phantom_jax.checkpoints.special_tokens import PHANTOM, UNKNOWN, phantom_tokenizer
from phantom_jax.checkpoints.tensor_report import Entry
from phantom_jax.checkpoints.vocabulary import resize_rows
from phantom_jax.checkpoints.weights import OpenTensors, open_tensors
from phantom_jax.data.conversation import Template, get_template
from phantom_jax.errors import InputError
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.processor import Processor
from phantom_jax.trees import unflatten

# What the published tokenizers say, for a folder that has none: how many tokens there are, where the embedding may have
# more rows, and which of them ends an answer.
_USED = {"qwen2": 151_646, "internlm2": 92_544, "phi3": 32_011}
_END_OF_ANSWER = {"qwen2": 151_645, "internlm2": 92_542, "phi3": 32_007}

_IMAGE = "<IMG_CONTEXT>"
_EMBEDDING, _HEAD = "params/language_model/embedding", "params/language_model/head/kernel"


def assemble(
    vision: str | os.PathLike[str],
    llm: str | os.PathLike[str],
    projector: str | os.PathLike[str] | None = None,
    *,
    projector_kind: str | None = None,
    seed: int = 0,
    template: str | None = None,
    open_files: OpenTensors = open_tensors,
) -> tuple[Checkpoint, Processor | None, list[Entry]]:
    """Puts a model together; the parents' tensors are read when they are asked for.

    Args:
      vision: folder of the vision tower, see `parents.read_vision_tower`.
      llm: folder of the language model, see `parents.read_language_model`.
      projector: its file or folder, see `parents.read_projector`; None makes a fresh one.
      projector_kind: of a fresh projector of a LLaVA, `linear` (default) or `mlp2x_gelu`.
      seed: of all that is fresh.
      template: name of the conversation template; by default that of the language model, `vicuna_v1` for LLaVA.
      open_files: opens the parents' weights.

    Returns:
      The model, what is fresh in float32 and the rest as it is stored; its processor, None where the language model's
      folder has no tokenizer; and what became of every tensor.

    Raises:
      InputError: the parents do not make a model, or one of them is damaged.
    """
    tower = read_vision_tower(vision, open_files=open_files)
    language = read_language_model(llm, open_files=open_files)
    clip, llama = tower.config.pre_norm, language.kind == "llama"
    if clip != llama:
        raise InputError(
            f"{vision} is {'CLIP' if clip else 'InternViT'} and {llm} is {language.kind}: LLaVA is made of CLIP and "
            "LLaMA, Phantom of InternViT and Qwen2, InternLM2 or Phi-3"
        )
    given = None if projector is None else read_projector(projector, open_files=open_files)
    projector_config = _projector_config(tower, language, given, projector, projector_kind)
    chosen = get_template(template or ("vicuna_v1" if llama else language.kind))
    tokenizer = read_tokenizer(pathlib.Path(llm))
    made: list[Entry] = []
    if llama:
        parts, brought = language.arrays, language.entries
        decoder, published = language.config, Published("llava-original", "llama")
        # Its vocabulary has no token for images; any of the vocabulary holds their place.
        tokens = TokenIds(decoder.vocab_size - 3, language.eos, language.pad)
        chosen = dataclasses.replace(chosen, image_token=UNKNOWN)
    else:
        chosen = dataclasses.replace(chosen, image_token=_IMAGE)
        size, kept, tokens = _vocabulary(language, tokenizer, chosen, llm)
        tokenizer = None if tokenizer is None else phantom_tokenizer(tokenizer)
        decoder = dataclasses.replace(language.config, vocab_size=size, phantom=PhantomConfig())
        published = Published("phantom", language.kind)
        dimension = fresh.phantom_dimension(decoder, seed)
        parts = {**_resized(language, size, kept, seed), **dimension}
        brought = _resized_entries(language, size, kept)
        made += [Entry("", (path,), "fresh", "no parent has a phantom dimension") for path in dimension]
    if given is None:
        bridge = fresh.projector(projector_config, seed)
        made += [Entry("", (path,), "fresh", "no projector was given") for path in bridge]
    else:
        bridge = given.arrays
    entries = _merged([(vision, tower.entries), (llm, brought), (projector, given.entries if given else ())])
    config = VisionLanguageConfig(tower.config, projector_config, decoder)
    trees = unflatten({**tower.arrays, **bridge, **parts})
    checkpoint = Checkpoint(config, trees["params"], trees.get("unused", {}), published, tokens)
    processor = None
    if tokenizer is not None:
        images = read_image_settings(pathlib.Path(vision))
        processor = make_processor(tokenizer, chosen, config, published, images)
    return checkpoint, processor, [*entries, *made]


def _projector_config(
    tower: VisionParent,
    language: LanguageParent,
    given: ProjectorParent | None,
    path: Any,
    kind: str | None,
) -> ProjectorConfig:
    llava = language.kind == "llama"
    kinds = ("linear", "mlp2x_gelu") if llava else ("pixel_shuffle",)
    if kind is not None and kind not in kinds:
        raise InputError(
            f"projector_kind={kind!r}: {'LLaVA' if llava else 'Phantom'} with {language.kind} has {' or '.join(kinds)}"
        )
    widths = tower.config.embed_dim, language.config.embed_dim
    if given is None:
        return ProjectorConfig(kind or kinds[0], *widths, shuffle=1 if llava else 2)
    found = given.config
    if found.kind not in kinds or found.kind != (kind or found.kind):
        raise InputError(f"{path} is a projector {found.kind!r}, this model has {kind or ' or '.join(kinds)}")
    if (found.vision_dim, found.embed_dim) != widths:
        raise InputError(
            f"{path} maps {found.vision_dim} to {found.embed_dim} channels, but the vision tower is {widths[0]} and "
            f"the language model {widths[1]} wide: take the projector that was trained with both"
        )
    return found


def _vocabulary(
    language: LanguageParent, tokenizer: tokenizers.Tokenizer | None, template: Template, folder: Any
) -> tuple[int, int, TokenIds]:
    """Rows of a Phantom's vocabulary, how many of them the language model brings, and its special ids.

    Args:
      language: the language model.
      tokenizer: its own; None where the folder has none.
      template: of conversations.
      folder: where the language model comes from, for the error.
    """
    rows = language.config.vocab_size
    if tokenizer is None:
        known = min(rows - len(PHANTOM) * language.sees_images, _USED[language.kind])
        size, image = known + len(PHANTOM), known + PHANTOM.index(_IMAGE)
        ends = [_END_OF_ANSWER[language.kind]] if known == _USED[language.kind] else []
        known = size if language.sees_images else known
    else:
        known = 1 + max(tokenizer.get_vocab().values())
        if known > rows:
            raise InputError(
                f"{folder} has a tokenizer of {known} tokens and a model of {rows}: take both from one folder"
            )
        ours = phantom_tokenizer(tokenizer)
        size, image = 1 + max(ours.get_vocab().values()), ours.token_to_id(_IMAGE)
        end = ours.token_to_id(template.end_token)
        # Without it there is no processor, which says so.
        ends = [] if end is None else [end]
    return size, min(known, rows), TokenIds(image, tuple(dict.fromkeys([*ends, *language.eos])), language.pad)


def _resized(language: LanguageParent, size: int, kept: int, seed: int) -> dict[str, Any]:
    arrays = dict(language.arrays)
    arrays[_EMBEDDING] = resize_rows(arrays[_EMBEDDING], size, seed=seed, kept=kept)
    if _HEAD in arrays:
        arrays[_HEAD] = resize_rows(arrays[_HEAD], size, seed=seed, kept=kept, axis=1)
    return arrays


def _resized_entries(language: LanguageParent, size: int, kept: int) -> list[Entry]:
    rows = language.config.vocab_size
    changes = [f"rows {kept} to {rows - 1} of no token dropped"] * (rows > kept)
    changes += [f"{size - kept} rows of new tokens added"] * (size > kept)
    if not changes:
        return list(language.entries)
    return [
        dataclasses.replace(entry, action="transformed", reason=" and ".join(changes))
        if entry.paths in ((_EMBEDDING,), (_HEAD,))
        else entry
        for entry in language.entries
    ]


def _merged(found: Sequence[tuple[str | os.PathLike[str] | None, Sequence[Entry]]]) -> list[Entry]:
    """Entries of parents, of which several may be one folder: what one of them keeps of it, another does not drop."""
    said: dict[tuple[pathlib.Path, str], Entry] = {}
    for path, entries in found:
        for entry in entries:
            key = (pathlib.Path(path).resolve(), entry.name)
            if key not in said or said[key].action == "dropped":
                said[key] = entry
    return list(said.values())
