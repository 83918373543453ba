"""Our own model folder: `phantom_jax.json` (what the model is) and `params/` (Orbax, shardable)."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from phantom_jax.checkpoints.hf import Checkpoint, read_json, shapes
from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.errors import InputError
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.rope import RopeConfig
from phantom_jax.trees import flatten, unflatten

CONFIG = "phantom_jax.json"
_ARRAYS = "params"
_SCHEMA = 1


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


def save(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> None:
    """Writes a checkpoint into an existing directory."""
    directory = pathlib.Path(directory).absolute()
    content = {
        "schema_version": _SCHEMA,
        "model": dataclasses.asdict(checkpoint.config),
        "published": dataclasses.asdict(checkpoint.published),
        "tokens": dataclasses.asdict(checkpoint.tokens),
    }
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    trees = {"params": checkpoint.params} | ({"unused": checkpoint.unused} if checkpoint.unused else {})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _ARRAYS, trees)


def load(
    directory: str | os.PathLike[str], *, place: Callable[[VisionLanguageConfig], Any] | None = None
) -> Checkpoint:
    """Reads what `save` wrote; arrays come as jax arrays.

    Args:
      directory: the folder.
      place: gives for a model the sharding of each parameter; None puts all on the default device.

    Raises:
      InputError: the folder is not complete, or arrays are missing, extra or misshapen: all of them are listed.
    """
    directory = pathlib.Path(directory).absolute()
    content = read_json(directory / CONFIG)
    if content.get("schema_version") != _SCHEMA:
        raise InputError(
            f"{directory / CONFIG} has schema_version={content.get('schema_version')!r}, this version reads {_SCHEMA}: "
            "use the version of phantom_jax that wrote it"
        )
    try:
        config = _model_config(content["model"])
        tokens = TokenIds(**{**content["tokens"], "eos": tuple(content["tokens"]["eos"])})
        published = Published(**content["published"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / CONFIG} does not describe a model: {error}. Save the model again") from error
    if not (directory / _ARRAYS).is_dir():
        raise InputError(f"{directory} has no {_ARRAYS}/ beside {CONFIG}: the folder is not complete, save it again")
    try:
        trees = _restore(directory, config, {} if place is None else flatten({"params": place(config)}))
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        # Too little memory says nothing about the files.
        raise
    # Orbax raises bare `Exception` where an array cannot be read.
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{directory / _ARRAYS} cannot be read, it may be damaged ({said[0][:200]}): if so, save the model again"
        ) from error
    return Checkpoint(config, trees["params"], trees.get("unused", {}), published, tokens)


def _restore(directory: pathlib.Path, config: VisionLanguageConfig, shardings: Mapping[str, Any]) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        stored = flatten(checkpointer.metadata(directory / _ARRAYS).item_metadata.tree)
        _check({path: tuple(leaf.shape) for path, leaf in stored.items()}, shapes(config), directory)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings.get(path, device))
            for path, leaf in stored.items()
        }
        return checkpointer.restore(directory / _ARRAYS, unflatten(wanted))


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
        raise InputError(f"{directory} does not fit its {CONFIG}:\n  " + "\n  ".join(lines))
