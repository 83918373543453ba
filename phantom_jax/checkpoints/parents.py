"""The models that a vision-language model is made of, as published: language models, vision towers and projectors.

Whole models serve as parents too: InternVL2 for each of its three parts, a full CLIP for its tower. Their other tensors
are dropped, with a reason. Only headers are read here; tensors are when they are asked for.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from phantom_jax.checkpoints import hf, hf_config, names
from phantom_jax.checkpoints.tensor_files import TensorFiles
from phantom_jax.checkpoints.tensor_report import Entry
from phantom_jax.checkpoints.weights import OpenTensors, open_tensors
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig

_LANGUAGE_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "InternLM2ForCausalLM": "internlm2",
    "Phi3ForCausalLM": "phi3",
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
}
_INTERNVL = "internvl_chat"
# What transformers leaves out of a CLIP's vision_config, because these are its own defaults.
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
# LLaVA reads CLIP in front of its last layer.
_CLIP_FEATURE_LAYER = -2
_DERIVED = "follows from the config"


@dataclasses.dataclass(frozen=True)
class VisionParent:
    """A vision tower.

    Attributes:
      config: its sizes.
      arrays: flat, by path: `params/vision_tower/...` and, of a CLIP, `unused/vision_tower/...`.
      entries: what became of the tensors of its folder.
    """

    config: VisionTowerConfig
    arrays: Mapping[str, Any]
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class ProjectorParent:
    """A projector; the attributes are as those of `VisionParent`, the paths `params/projector/...`."""

    config: ProjectorConfig
    arrays: Mapping[str, Any]
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class LanguageParent:
    """A language model.

    Attributes:
      config: its sizes, without phantom dimension.
      arrays: flat, by path: `params/language_model/...`.
      entries: what became of the tensors of its folder.
      kind: `qwen2`, `internlm2`, `phi3` or `llama`.
      eos: ids that end a text, by its config.
      pad: id that fills rows, by its config.
      sees_images: whether it comes from a model that does, and so has rows for the tokens of images.
    """

    config: DecoderConfig
    arrays: Mapping[str, Any]
    entries: tuple[Entry, ...]
    kind: str
    eos: tuple[int, ...]
    pad: int
    sees_images: bool


def read_language_model(folder: str | os.PathLike[str], *, open_files: OpenTensors = open_tensors) -> LanguageParent:
    """Reads Qwen2, InternLM2, Phi-3 or LLaMA, or the language model of a whole InternVL2.

    Raises:
      InputError: the folder holds something else, or tensors are missing, extra or misshapen.
    """
    folder = pathlib.Path(folder)
    config, where = _config(folder)
    sees_images = config.get("model_type") == _INTERNVL
    if sees_images:
        config, where = hf_config.need(config, "llm_config", where), f"llm_config of {where}"
    architecture = hf_config.architectures(config)[0]
    kind = _LANGUAGE_MODELS.get(architecture, config.get("model_type"))
    if kind not in _LANGUAGE_MODELS.values():
        raise InputError(
            f"{where} has model_type={config.get('model_type')!r}: a language model is a folder of Qwen2, InternLM2, "
            "Phi-3, LLaMA or Vicuna, or a whole InternVL2"
        )
    decoder = _checked(where, lambda: hf_config.read_decoder(_within_window(config, where), kind, None, where))
    shapes = _checked(where, lambda: _shapes(language_model=decoder))
    prefix = "language_model." if sees_images else ""
    rows = names.decoder_rows(decoder, "llama" if kind == "qwen2" else kind, prefix)
    dropped = {"is not of the language model": lambda name: not name.startswith(prefix)}
    if decoder.tie_embeddings:
        dropped["the embedding is the head"] = lambda name: name == f"{prefix}lm_head.weight"
    arrays, entries = _read(rows, shapes, open_files(folder), folder, dropped)
    pad = config.get("pad_token_id")
    eos = hf_config.eos_ids(config.get("eos_token_id"), 2)
    # Some old LLaMA say -1: none.
    return LanguageParent(decoder, arrays, entries, kind, eos, pad if pad and pad > 0 else 0, sees_images)


def _within_window(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A decoder that attends over a window is a plain one for texts that fit into the window."""
    window, length = config.get("sliding_window"), config.get("max_position_embeddings")
    if not window or not length or window >= length or not config.get("use_sliding_window", True):
        return config
    logging.warning("%s has sliding_window=%d: the model takes texts up to that, not %d tokens", where, window, length)
    return {**config, "sliding_window": None, "max_position_embeddings": window}


def read_vision_tower(folder: str | os.PathLike[str], *, open_files: OpenTensors = open_tensors) -> VisionParent:
    """Reads InternViT or CLIP, alone or as the tower of a whole InternVL2 or CLIP.

    A CLIP is read in front of its last layer; that layer and the norm behind it go to `unused/`.

    Raises:
      InputError: the folder holds something else, or tensors are missing, extra or misshapen.
    """
    folder = pathlib.Path(folder)
    config, where = _config(folder)
    kind = config.get("model_type")
    if kind in (_INTERNVL, "clip"):
        config, where = hf_config.need(config, "vision_config", where), f"vision_config of {where}"
    internvit = kind == _INTERNVL or "InternVisionModel" in hf_config.architectures(config)
    if not internvit and kind not in ("clip", "clip_vision_model", "intern_vit_6b", "intern_vit_300m"):
        raise InputError(
            f"{where} has model_type={kind!r}: a vision tower is a folder of InternViT or CLIP, or a whole InternVL2"
        )
    if internvit or kind.startswith("intern_vit"):
        tower, rows_of = _checked(where, lambda: hf_config.read_internvit(config)), names.internvit_rows
    else:
        full = {**_CLIP_DEFAULTS, **config}
        tower, rows_of = _checked(where, lambda: hf_config.read_clip(full, _CLIP_FEATURE_LAYER)), names.clip_rows
    files = open_files(folder)
    prefixes = [name.removesuffix(_CLASS) for name in files.names() if name.endswith(_CLASS)]
    if len(prefixes) != 1:
        raise InputError(f"{folder} holds {len(prefixes)} tensors called {_CLASS}: a vision tower has one")
    prefix = prefixes[0]
    dropped = {
        "is not of the vision tower": lambda name: (
            not name.startswith((f"{prefix}embeddings.", f"{prefix}encoder."))
            and name.removeprefix(prefix).split(".")[0] not in ("pre_layrnorm", "post_layernorm")
        ),
        _DERIVED: lambda name: name == f"{prefix}embeddings.position_ids",
    }
    arrays, entries = _read(rows_of(tower, prefix), _shapes(vision_tower=tower), files, folder, dropped)
    return VisionParent(tower, arrays, entries)


_CLASS = "embeddings.class_embedding"

# By what the tensors of a projector are called, behind the module's own name: our modules.
_PROJECTORS = {
    ("",): ("linear", {"linear_1": ""}),
    (".0", ".2"): ("mlp2x_gelu", {"linear_1": ".0", "linear_2": ".2"}),
    (".0", ".1", ".3"): ("pixel_shuffle", {"norm": ".0", "linear_1": ".1", "linear_2": ".3"}),
}
_PROJECTOR_NAME = re.compile(r"(.*\bmm_projector|mlp1|vision_proj)(\.\d+)?\.(weight|bias)")
# Phantom and InternVL2 join squares of this side.
_SHUFFLE = 2


def read_projector(path: str | os.PathLike[str], *, open_files: OpenTensors = open_tensors) -> ProjectorParent:
    """Reads a projector of LLaVA (`mm_projector`), InternVL2 (`mlp1`) or Phantom (`vision_proj`).

    Args:
      path: a file of its tensors, or a folder of a whole model.
      open_files: opens it.

    Raises:
      InputError: there is no such projector, or its tensors do not fit each other.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"there is no {path}")
    files = open_files(path)
    found = {name: match for name in files.names() if (match := _PROJECTOR_NAME.fullmatch(name))}
    modules = {match[1] for match in found.values()}
    if len(modules) != 1:
        said = f"several projectors: {', '.join(sorted(modules))}" if modules else "no projector"
        raise InputError(f"{path} holds {said}; one is looked for, called mm_projector, mlp1 or vision_proj")
    (module,) = modules
    numbers = tuple(sorted({match[2] or "" for match in found.values()}))
    if numbers not in _PROJECTORS:
        raise InputError(
            f"{path} holds a projector of the layers {', '.join(number or 'weight' for number in numbers)}: a linear "
            "map (weight), two of them (0, 2), and norm and two of them (0, 1, 3) are supported"
        )
    kind, parts = _PROJECTORS[numbers]
    first = f"{module}{parts['linear_1']}.weight"
    if first not in found or len(files.shape(first)) != 2:
        raise InputError(f"{path} has no matrix {first}: the projector is not complete")
    width, fan_in = files.shape(first)
    shuffle = _SHUFFLE if kind == "pixel_shuffle" else 1
    if fan_in % shuffle**2:
        raise InputError(f"{first} of {path} reads {fan_in} channels: they do not divide by {shuffle**2} patches")
    config = ProjectorConfig(kind, fan_in // shuffle**2, width, shuffle)
    rows = names.projector_rows(config, {name: module + number for name, number in parts.items()})
    dropped = {"is not of the projector": lambda name: name not in found}
    arrays, entries = _read(rows, _shapes(projector=config), files, path, dropped)
    return ProjectorParent(config, arrays, entries)


def _config(folder: pathlib.Path) -> tuple[Mapping[str, Any], str]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    return read_json(folder / "config.json"), str(folder / "config.json")


def _checked(where: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{where} does not describe a model that is supported: {error}") from error


def _shapes(**part: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of one part's arrays by path, the others as small as they can be."""
    projector = part.get("projector")
    vision = part.get("vision_tower") or VisionTowerConfig(
        embed_dim=projector.vision_dim if projector else 1,
        num_layers=1,
        num_heads=1,
        mlp_dim=1,
        patch_size=1,
        image_size=projector.shuffle if projector else 1,
    )
    decoder = part.get("language_model") or DecoderConfig(
        vocab_size=1,
        embed_dim=projector.embed_dim if projector else 1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        mlp_dim=1,
    )
    projector = projector or ProjectorConfig("linear", vision.embed_dim, decoder.embed_dim)
    return hf.shapes(VisionLanguageConfig(vision, projector, decoder))


def _read(
    rows: Sequence[names.Row],
    shapes: Mapping[str, tuple[int, ...]],
    files: TensorFiles,
    path: pathlib.Path,
    dropped: Mapping[str, Callable[[str], bool]],
) -> tuple[dict[str, Any], tuple[Entry, ...]]:
    """Arrays of a table, from files that also hold what is dropped: reasons, each with the names that it is true of."""
    entries, rest = [], []
    for name in files.names():
        reason = next((reason for reason, holds in dropped.items() if holds(name)), None)
        if reason is None:
            rest.append(name)
        else:
            entries.append(Entry(name, (), "dropped", reason))
    part = files.only(rest)
    derived = hf.check_rows(rows, shapes, part, str(path))
    entries += [Entry(name, (), "dropped", _DERIVED) for name in derived]
    kept = [Entry(name, row.paths, "kept") for row in rows for name in row.names()]
    return hf.read_rows(rows, shapes, part), (*kept, *entries)
