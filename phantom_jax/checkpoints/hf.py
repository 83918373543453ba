"""Reading and writing Hugging Face directories: config.json and safetensors, never a pickle."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy its bfloat16
import numpy as np
import safetensors
import safetensors.numpy
from flax.linen import meta

from phantom_jax.checkpoints import hf_config, names
from phantom_jax.errors import InputError
from phantom_jax.models.vlm import VisionLanguageConfig, VisionLanguageModel, abstract_parameters
from phantom_jax.trees import flatten, unflatten

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Tables of angles that old LLaMA files carry; they follow from the config.
_DERIVED = "rotary_emb.inv_freq"


@dataclasses.dataclass
class Checkpoint:
    """A model at rest.

    Attributes:
      config: its shape.
      params: nested dict of numpy or jax arrays, layers stacked on the first axis.
      unused: tensors that the published file holds and no computation uses; same form.
      published: the outside layout it came from or goes to.
      tokens: special ids.
    """

    config: VisionLanguageConfig
    params: Any
    unused: Any
    published: hf_config.Published
    tokens: hf_config.TokenIds


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, or an `InputError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def parameter_shapes(config: VisionLanguageConfig) -> Any:
    """Parameter tree of `jax.ShapeDtypeStruct` (float32), nothing allocated."""
    return meta.unbox(abstract_parameters(VisionLanguageModel(config)))


def table(config: VisionLanguageConfig, published: hf_config.Published) -> list[names.Row]:
    """The rows of a model in a layout."""
    if published.format == "phantom":
        layout = "llama" if published.language_model == "qwen2" else published.language_model
        return names.phantom_table(config, layout)
    if published.format == "llava-hf":
        return names.llava_hf_table(config)
    return names.llava_original_table(config)


def shapes(config: VisionLanguageConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path, the unused ones of a CLIP tower included."""
    used = {path: leaf.shape for path, leaf in flatten({"params": parameter_shapes(config)}).items()}
    if not config.vision_tower.pre_norm:
        return used
    prefix, unused = "params/vision_tower/layers/", {}
    for path, shape in used.items():
        if path.startswith(prefix) and config.vision_tower.unused_layers:
            unused["unused" + path.removeprefix("params")] = (config.vision_tower.unused_layers, *shape[1:])
    for name in ("scale", "bias"):
        unused[f"unused/vision_tower/final_norm/{name}"] = (config.vision_tower.embed_dim,)
    return used | unused


class _Tensors:
    """Lazily read tensors of a directory of safetensors, whole or in shards with an index."""

    def __init__(self, directory: pathlib.Path):
        self._files: dict[str, Any] = {}
        self._where: dict[str, pathlib.Path] = {}
        if (directory / _INDEX).is_file():
            index = read_json(directory / _INDEX).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
                raise InputError(f"{directory / _INDEX} has no 'weight_map' of tensor names to file names")
            files = {self._inside(directory, name) for name in index.values()}
        elif (directory / _WEIGHTS).is_file():
            index, files = None, {directory / _WEIGHTS}
        else:
            found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
            raise InputError(
                f"{directory} holds neither {_WEIGHTS} nor {_INDEX} (it holds {found}). Pickled weights (.bin, .pt) "
                "are not read: convert them to safetensors first"
            )
        for path in sorted(files):
            try:
                self._files[str(path)] = safetensors.safe_open(path, framework="np")
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(f"{path} is no readable safetensors file: {error}") from error
            for name in self._files[str(path)].keys():  # noqa: SIM118 - not a dict
                if name in self._where:
                    raise InputError(f"tensor {name!r} stands in {self._where[name].name} and in {path.name}")
                self._where[name] = path
        missing = sorted(set(index or {}) - set(self._where))
        if missing:
            raise InputError(f"{_INDEX} lists tensors that no shard holds: {', '.join(missing)}")

    @staticmethod
    def _inside(directory: pathlib.Path, name: str) -> pathlib.Path:
        path = directory / name
        if pathlib.PurePath(name).name != name or not path.is_file():
            raise InputError(f"{_INDEX} names the shard {name!r}: not a file of {directory}")
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[str(self._where[name])].get_tensor(name)

    def dtype(self, name: str) -> str:
        return self._files[str(self._where[name])].get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[str(self._where[name])].get_slice(name).get_shape())


def load(directory: str | os.PathLike[str]) -> Checkpoint:
    """Loads a published checkpoint; every tensor keeps its dtype.

    Args:
      directory: with `config.json` and safetensors.

    Raises:
      InputError: the layout is not known, or tensors are missing, extra or misshapen: all of them are listed.
    """
    directory = pathlib.Path(directory)
    vision_path = directory / "vision_config.json"
    vision_config = read_json(vision_path) if vision_path.is_file() else None
    config, published, tokens = hf_config.read(read_json(directory / "config.json"), vision_config)
    rows, ours, tensors = table(config, published), shapes(config), _Tensors(directory)
    _check(rows, ours, tensors, directory)
    flat: dict[str, np.ndarray] = {}
    for row in rows:
        row_shapes = _row_shapes(row, ours)
        for layer, name in enumerate(row.names()):
            for path, array in zip(row.paths, row.transform.load(tensors[name], row_shapes), strict=True):
                if row.layers is None:
                    flat[path] = np.ascontiguousarray(array)
                    continue
                if path not in flat:
                    flat[path] = np.empty((row.layers, *array.shape), array.dtype)
                flat[path][layer] = array
    trees = unflatten(flat)
    return Checkpoint(config, trees["params"], trees.get("unused", {}), published, tokens)


def _row_shapes(row: names.Row, ours: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    skip = 0 if row.layers is None else 1
    return [ours[path][skip:] for path in row.paths]


def _check(rows, ours, tensors, directory) -> None:
    expected = {name: row.transform.shape(_row_shapes(row, ours)) for row in rows for name in row.names()}
    present = {name for name in tensors if not name.endswith(_DERIVED)}
    problems = {
        "missing": sorted(set(expected) - present),
        "not expected": sorted(present - set(expected)),
        "misshapen": [
            f"{name} is {tensors.shape(name)} instead of {expected[name]}"
            for name in sorted(present & set(expected))
            if tensors.shape(name) != expected[name]
        ],
    }
    problems["not floating point"] = [
        f"{name} is {tensors.dtype(name)}"
        for name in sorted(present & set(expected))
        if tensors.dtype(name) not in ("F16", "BF16", "F32", "F64")
    ]
    lines = [f"{len(found)} {what}:\n    " + "\n    ".join(found) for what, found in problems.items() if found]
    if lines:
        raise InputError(
            f"{directory} does not fit its config.json. Take config and weights from one checkpoint.\n  "
            + "\n  ".join(lines)
        )


def save(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors` in the checkpoint's published layout into an existing directory.

    Raises:
      InputError: the layout cannot express the model.
    """
    directory = pathlib.Path(directory)
    hf_config.check_expressible(checkpoint.config, checkpoint.published)
    flat = flatten({"params": checkpoint.params, "unused": checkpoint.unused})
    tensors: dict[str, np.ndarray] = {}
    # A tower made here has none of the layers that only published ones carry.
    rows = [
        row
        for row in table(checkpoint.config, checkpoint.published)
        if checkpoint.unused or not row.paths[0].startswith("unused/")
    ]
    missing = sorted({path for row in rows for path in row.paths} - set(flat))
    if missing:
        raise InputError(f"the model lacks parameters, nothing was written: {', '.join(missing)}")
    for row in rows:
        for layer, name in enumerate(row.names()):
            arrays = [flat[path] if row.layers is None else flat[path][layer] for path in row.paths]
            tensors[name] = np.ascontiguousarray(row.transform.save(tuple(np.asarray(array) for array in arrays)))
    largest = max(tensors.values(), key=lambda tensor: math.prod(tensor.shape))
    config, beside = hf_config.write(checkpoint.config, checkpoint.published, checkpoint.tokens, str(largest.dtype))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if beside is not None:
        (directory / "vision_config.json").write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")
    safetensors.numpy.save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    # The library makes a file that its owner alone may read.
    (directory / _WEIGHTS).chmod((directory / "config.json").stat().st_mode)
