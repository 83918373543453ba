"""Folders that hold an adapter: PEFT's, LLaVA's, and our own, `phantom_jax_adapter.json` with `params/` (Orbax).

Our own holds the factors as training has them, layers stacked.
"""

import os
import pathlib

from phantom_jax.checkpoints import hf, hf_config, native, orbax_stream, peft_config, peft_reader, peft_writer, pickled
from phantom_jax.checkpoints.adapter import Adapter, LowRank
from phantom_jax.checkpoints.tensor_files import TensorFiles
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json, write_json
from phantom_jax.layouts import ADAPTER_LAYOUTS, check_name
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.trees import unflatten

Model = tuple[VisionLanguageConfig, hf_config.Published, hf_config.TokenIds]

CONFIG = "phantom_jax_adapter.json"

_ARRAYS = "params"
_SCHEMA = 1
_PLAIN = ("dropout", "rank_stabilized", "base", "template", "naming", "settings")
# What LLaVA's code keeps beside the factors, and those themselves, by stem.
_STEMS = ("adapter_model", "non_lora_trainables")


def is_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return any((pathlib.Path(directory) / name).is_file() for name in (CONFIG, peft_config.CONFIG))


def read(
    directory: str | os.PathLike[str],
    model: Model | None = None,
    *,
    scratch: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Opens an adapter; its arrays are read when they are asked for.

    Args:
      directory: the folder, ours, PEFT's or LLaVA's; an intermediate `checkpoint-N` of LLaVA's code holds the factors
        alone, and is one of PEFT's.
      model: what it adapts, `Checkpoint.description` or `model_folder.describe`; None takes what ours and LLaVA's
        folders carry.
      scratch: an existing folder for what pickled tensors (`.bin`) are turned into, to be kept as long as the adapter
        is in use; None refuses them.

    Raises:
      InputError: there is no adapter, it is damaged or not supported, or it is for another model.
    """
    directory = pathlib.Path(directory)
    if (directory / CONFIG).is_file():
        return _read_ours(directory, model)
    if not (directory / peft_config.CONFIG).is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())) if directory.is_dir() else "no folder"
        raise InputError(f"{directory} holds neither {CONFIG} nor {peft_config.CONFIG} (it holds {found})")
    settings = read_json(directory / peft_config.CONFIG)
    if model is None and (directory / "config.json").is_file():
        model = hf.read_config(directory)
    if model is None:
        raise InputError(
            f"{directory} has no config.json, as most adapters: give --base, the model that it was trained on"
            + (f", {settings['base_model_name_or_path']}" if settings.get("base_model_name_or_path") else "")
        )
    return peft_reader.read(settings, TensorFiles(_tensor_files(directory, scratch)), model, str(directory))


def _tensor_files(directory: pathlib.Path, scratch: str | os.PathLike[str] | None) -> list[pathlib.Path]:
    found = []
    for stem in _STEMS:
        whole, pickle = directory / f"{stem}.safetensors", directory / f"{stem}.bin"
        if whole.is_file():
            found.append(whole)
        elif pickle.is_file() and scratch is None:
            raise InputError(f"{directory}: {pickled.NOT_ALLOWED}")
        elif pickle.is_file():
            found += pickled.to_safetensors([pickle], scratch)
        elif stem == _STEMS[0]:
            raise InputError(f"{directory} holds neither {whole.name} nor {pickle.name}: the adapter is not complete")
    return found


def write(adapter: Adapter, directory: str | os.PathLike[str], *, format: str) -> None:
    """Writes an adapter into an existing directory.

    Args:
      adapter: what to write.
      directory: the folder.
      format: one of `layouts.ADAPTER_LAYOUTS`.

    Raises:
      InputError: there is no such format, or it cannot express the adapter.
    """
    directory = pathlib.Path(directory)
    check_name("adapter format", format, ADAPTER_LAYOUTS)
    if format == "peft":
        peft_writer.write(adapter, directory)
        return
    content = {
        "schema_version": _SCHEMA,
        **native.description(adapter.config, adapter.published, adapter.tokens),
        "low_rank": {path: {"ranks": each.ranks, "alphas": each.alphas} for path, each in adapter.low_rank.items()},
        **{name: getattr(adapter, name) for name in _PLAIN},
        "base_numbers": adapter.base_numbers,
    }
    write_json(directory / CONFIG, content)
    flat = {f"others/{path}": array for path, array in adapter.others.items()}
    for path, change in adapter.low_rank.items():
        flat |= {f"low_rank/{path}/a": change.a, f"low_rank/{path}/b": change.b}
    orbax_stream.save(directory.absolute() / _ARRAYS, unflatten(flat))


def _read_ours(directory: pathlib.Path, model: Model | None) -> Adapter:
    where, content = directory / CONFIG, read_json(directory / CONFIG)
    if content.get("schema_version") != _SCHEMA:
        raise InputError(
            f"{where} has schema_version={content.get('schema_version')!r}, this version reads {_SCHEMA}: use the "
            "version of phantom_jax that wrote it"
        )
    if not (directory / _ARRAYS).is_dir():
        raise InputError(f"{directory} has no {_ARRAYS}/ beside {CONFIG}: the folder is not complete, save it again")
    if model is None:
        model = native.described(content, where)
    flat = orbax_stream.load(directory.absolute() / _ARRAYS)
    try:
        low_rank = {
            path: LowRank(
                flat[f"low_rank/{path}/a"], flat[f"low_rank/{path}/b"], tuple(each["ranks"]), tuple(each["alphas"])
            )
            for path, each in content["low_rank"].items()
        }
        plain = {name: content[name] for name in _PLAIN} | {"base_numbers": content.get("base_numbers", {})}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{where} does not fit {_ARRAYS}/ beside it ({error}): save the adapter again") from error
    others = {path.removeprefix("others/"): array for path, array in flat.items() if path.startswith("others/")}
    adapter = Adapter(*model, low_rank, others, **plain)
    adapter.check(str(directory))
    return adapter
