"""Our own model folder: `phantom_jax.json` (what the model is) and `params/` (Orbax, readable part by part)."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from phantom_jax.checkpoints import orbax_stream
from phantom_jax.checkpoints.hf import Checkpoint, Origin, shapes
from phantom_jax.checkpoints.hf_config import LANGUAGE_MODELS, Published, TokenIds
from phantom_jax.checkpoints.quantized import join_fields, split_fields
from phantom_jax.checkpoints.tensor_files import listed
from phantom_jax.checkpoints.tensor_report import Entry
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json, write_json
from phantom_jax.layouts import PUBLISHED_LAYOUTS, QUANTIZATIONS
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.rope import RopeConfig
from phantom_jax.trees import flatten, unflatten

CONFIG = "phantom_jax.json"
_ARRAYS = "params"
_SCHEMA = 2


def _model_config(content: Mapping[str, Any]) -> VisionLanguageConfig:
    extra = sorted(set(content) - {"vision_tower", "projector", "language_model"})
    if extra:
        raise ValueError(f"unknown parts {', '.join(extra)}")
    decoder = dict(content["language_model"])
    rope = {name: tuple(v) if isinstance(v, list) else v for name, v in decoder.pop("rope").items()}
    phantom = decoder.pop("phantom")
    return VisionLanguageConfig(
        VisionTowerConfig(**content["vision_tower"]),
        ProjectorConfig(**content["projector"]),
        DecoderConfig(
            **decoder, rope=RopeConfig(**rope), phantom=None if phantom is None else PhantomConfig(**phantom)
        ),
    )


def description(config: VisionLanguageConfig, published: Published, tokens: TokenIds) -> dict[str, Any]:
    """What a model is, for a JSON file."""
    parts = {"model": config, "published": published, "tokens": tokens}
    return {name: dataclasses.asdict(part) for name, part in parts.items()}


def described(content: Mapping[str, Any], where: pathlib.Path) -> tuple[VisionLanguageConfig, Published, TokenIds]:
    """The inverse of `description`; `where` names the file in errors."""
    try:
        config = _model_config(content["model"])
        tokens = TokenIds(**{**content["tokens"], "eos": tuple(content["tokens"]["eos"])})
        published = Published(**content["published"])
        hash(config)  # a list where a number or a word should be has none
        _check_published(published)
        return config, published, tokens
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} does not describe a model: {error}. Save it again") from error


def _check_published(published: Published) -> None:
    for name, known in (("format", PUBLISHED_LAYOUTS), ("language_model", LANGUAGE_MODELS)):
        if getattr(published, name) not in known:
            raise ValueError(f"published.{name}={getattr(published, name)!r} is none of {', '.join(known)}")
    for name in ("config", "vision_config", "generation_config"):
        if not isinstance(getattr(published, name), dict):
            raise ValueError(f"published.{name} is no object")
    for name in ("llm_config", "text_config", "vision_config"):
        if not isinstance(published.config.get(name, {}), dict):
            raise ValueError(f"published.config.{name} is no object")


def save(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> None:
    """Writes a checkpoint into an existing directory, block by block."""
    directory = pathlib.Path(directory).absolute()
    trees = {"params": checkpoint.params} | ({"unused": checkpoint.unused} if checkpoint.unused else {})
    flat, quantization = split_fields(flatten(trees))
    content = {
        "schema_version": _SCHEMA,
        **description(checkpoint.config, checkpoint.published, checkpoint.tokens),
        "origin": dataclasses.asdict(checkpoint.origin),
        "quantization": quantization,
    }
    write_json(directory / CONFIG, content)
    orbax_stream.save(directory / _ARRAYS, unflatten(flat))


def load(directory: str | os.PathLike[str]) -> Checkpoint:
    """Opens what `save` wrote; arrays are read when they are asked for.

    Raises:
      InputError: the folder is not complete, or arrays are missing, extra or misshapen: all of them are listed.
    """
    directory = pathlib.Path(directory).absolute()
    content = _content(directory)
    config, published, tokens = described(content, directory / CONFIG)
    if not (directory / _ARRAYS).is_dir():
        raise InputError(f"{directory} has no {_ARRAYS}/ beside {CONFIG}: the folder is not complete, save it again")
    origin, quantization = _extras(content, directory / CONFIG)
    expected = shapes(config)
    stored = orbax_stream.load(directory / _ARRAYS)
    flat = join_fields(stored, quantization, expected, str(directory))
    _check({path: tuple(leaf.shape) for path, leaf in flat.items()}, expected, directory)
    trees = unflatten(flat)
    entries = tuple(Entry("", (path,), "kept") for path in flat)
    return Checkpoint(config, trees["params"], trees.get("unused", {}), published, tokens, origin, entries)


def read_description(directory: pathlib.Path) -> tuple[VisionLanguageConfig, Published, TokenIds]:
    """What the model of a folder is; its arrays are not opened.

    Raises:
      InputError: names the file and what is wrong with it.
    """
    return described(_content(directory), directory / CONFIG)


def _content(directory: pathlib.Path) -> dict[str, Any]:
    content = read_json(directory / CONFIG)
    if content.get("schema_version") not in range(1, _SCHEMA + 1):
        raise InputError(
            f"{directory / CONFIG} has schema_version={content.get('schema_version')!r}, this version reads up to "
            f"{_SCHEMA}: use the version of phantom_jax that wrote it"
        )
    unknown = sorted(set(content) - {"schema_version", "model", "published", "tokens", "origin", "quantization"})
    if unknown:
        raise InputError(f"{directory / CONFIG} has unknown fields {', '.join(map(repr, unknown))}: remove them")
    return content


def _extras(content: Mapping[str, Any], where: pathlib.Path) -> tuple[Origin, str | None]:
    origin, quantization = content.get("origin", {}), content.get("quantization")
    names = [field.name for field in dataclasses.fields(Origin)]
    if not isinstance(origin, dict) or not all(
        key in names and isinstance(value, list) and all(isinstance(name, str) for name in value)
        for key, value in origin.items()
    ):
        raise InputError(f"{where} has origin={origin!r:.100}: it must list names under {' and '.join(names)}")
    if quantization not in (None, *QUANTIZATIONS):
        raise InputError(
            f"{where} has quantization={quantization!r:.100}: it must be null, {' or '.join(QUANTIZATIONS)}"
        )
    return Origin(**{key: tuple(value) for key, value in origin.items()}), quantization


def _check(stored, expected, directory) -> None:
    # A model that was made here has none of the layers that only published towers carry.
    needed = {path for path in expected if path.startswith("params/") or any(p.startswith("unused/") for p in stored)}
    lines = [
        *(f"missing: {path}" for path in sorted(needed - set(stored))),
        *(f"not expected: {path}" for path in sorted(set(stored) - set(expected))),
        *(
            f"misshapen: {path} is {stored[path]} instead of {expected[path]}"
            for path in sorted(set(stored) & set(expected))
            if stored[path] != expected[path]
        ),
    ]
    if lines:
        raise InputError(f"{directory} does not fit its {CONFIG}. Take both from one folder.\n    {listed(lines)}")
