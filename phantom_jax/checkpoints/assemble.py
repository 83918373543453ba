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

from phantom_jax.checkpoints import fresh
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.checkpoints.parents import (
    LanguageParent,
    OpenTensors,
    ProjectorParent,
    VisionParent,
    open_tensors,
    read_language_model,
    read_projector,
    read_vision_tower,
)
from phantom_jax.checkpoints.tensor_report import Entry
from phantom_jax.checkpoints.vocabulary import resize_rows
from phantom_jax.errors import InputError
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.trees import unflatten

ADDED_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""What Phantom adds to its language model's vocabulary, in the order of their ids."""

IMAGE_TOKEN = "<IMG_CONTEXT>"

# Ids that the published tokenizers use; a table of embeddings may have more rows. And the id of the token that ends an
# answer in a chat, which the config of a model that does not chat does not name.
_USED = {"qwen2": 151_646, "internlm2": 92_544, "phi3": 32_011}
_END_OF_ANSWER = {"qwen2": 151_645, "internlm2": 92_542, "phi3": 32_007}

_EMBEDDING, _HEAD = "params/language_model/embedding", "params/language_model/head/kernel"


def assemble(
    vision: str | os.PathLike[str],
    llm: str | os.PathLike[str],
    projector: str | os.PathLike[str] | None = None,
    *,
    projector_kind: str | None = None,
    seed: int = 0,
    open_files: OpenTensors = open_tensors,
) -> tuple[Checkpoint, list[Entry]]:
    """Puts a model together; the parents' tensors are read when they are asked for.

    Args:
      vision: folder of the vision tower, see `parents.read_vision_tower`.
      llm: folder of the language model, see `parents.read_language_model`.
      projector: its file or folder, see `parents.read_projector`; None makes a fresh one.
      projector_kind: of a fresh projector of a LLaVA, `linear` (default) or `mlp2x_gelu`.
      seed: of all that is fresh.
      open_files: opens the parents' weights.

    Returns:
      The model, what is fresh in float32 and the rest as it is stored, and what became of every tensor.

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
    made: list[Entry] = []
    if llama:
        parts = language.arrays
        decoder, published = language.config, Published("llava-original", "llama")
        # Its vocabulary has no token for images; any of the vocabulary holds their place.
        tokens = TokenIds(decoder.vocab_size - 3, language.eos, language.pad)
        brought = language.entries
    else:
        size, kept = _vocabulary(language)
        decoder = dataclasses.replace(language.config, vocab_size=size, phantom=PhantomConfig())
        published = Published("phantom", language.kind)
        tokens = _phantom_tokens(language, size)
        dimension = fresh.phantom_dimension(decoder, seed)
        parts = {**_resized(language, size, kept, seed), **dimension}
        brought = _resized_entries(language, size, kept)
        made += [Entry("", (path,), "fresh", "of the phantom dimension, which no parent has") for path in dimension]
    if given is None:
        bridge = fresh.projector(projector_config, seed)
        made += [Entry("", (path,), "fresh", "of the projector, which was not given") for path in bridge]
    else:
        bridge = given.arrays
    entries = _merged([(vision, tower.entries), (llm, brought), (projector, given.entries if given else ())])
    config = VisionLanguageConfig(tower.config, projector_config, decoder)
    trees = unflatten({**tower.arrays, **bridge, **parts})
    return Checkpoint(config, trees["params"], trees.get("unused", {}), published, tokens), [*entries, *made]


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


def _vocabulary(language: LanguageParent) -> tuple[int, int]:
    """Rows of the model's vocabulary, and how many of them the language model brings."""
    rows = language.config.vocab_size
    used = min(rows, _USED[language.kind])
    size = used + len(ADDED_TOKENS)
    return size, min(rows, size) if language.sees_images else used


def _phantom_tokens(language: LanguageParent, size: int) -> TokenIds:
    first = size - len(ADDED_TOKENS)
    ends = [_END_OF_ANSWER[language.kind]] if first == _USED[language.kind] else []
    eos = tuple(dict.fromkeys([*ends, *language.eos]))
    return TokenIds(first + ADDED_TOKENS.index(IMAGE_TOKEN), eos, language.pad)


def _resized(language: LanguageParent, size: int, kept: int, seed: int) -> dict[str, Any]:
    arrays = dict(language.arrays)
    arrays[_EMBEDDING] = resize_rows(arrays[_EMBEDDING], size, seed=seed, kept=kept)
    if _HEAD in arrays:
        arrays[_HEAD] = resize_rows(arrays[_HEAD], size, seed=seed, kept=kept, axis=1)
    return arrays


def _resized_entries(language: LanguageParent, size: int, kept: int) -> list[Entry]:
    rows = language.config.vocab_size
    changes = [f"rows {kept} to {rows - 1} dropped, they are of no token"] * (rows > kept)
    changes += [f"{size - kept} rows of new tokens added"] * (size > kept)
    if not changes:
        return list(language.entries)
    return [
        dataclasses.replace(entry, action="transformed", reason="; ".join(changes))
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
