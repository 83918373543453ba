"""Reading and writing Hugging Face directories: config.json and safetensors, never a pickle."""

import dataclasses
import functools
import math
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from phantom_jax.accounting import parameter_shapes
from phantom_jax.checkpoints import hf_config, names
from phantom_jax.checkpoints.arrays import Box, StoredArray, cast, layer_of, stack
from phantom_jax.checkpoints.tensor_files import DTYPES, TensorFiles, listed
from phantom_jax.checkpoints.tensor_report import Entry
from phantom_jax.checkpoints.tensor_writer import SHARD_BYTES, Tensor, write_folder
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json, write_json
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.trees import flatten, unflatten

# What old files of LLaMA and CLIP carry, and follows from the config.
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
BLOCK = 1 << 24
"""Elements of a block that is moved at once. Memory holds a few of them, whatever the size of the model."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model was made from.

    Attributes:
      base: models, names on the Hub or folders.
      data: data sets that it was trained on.
    """

    base: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


@dataclasses.dataclass
class Checkpoint:
    """A model at rest.

    Attributes:
      config: its shape.
      params: nested dict of arrays (numpy's, jax's or `StoredArray`), layers stacked on the first axis.
      unused: tensors that the published file holds and no computation uses; same form.
      published: the outside layout it came from or goes to.
      tokens: special ids.
      origin: what it was made from, as far as known.
      entries: what became of every tensor of the files that it was read from.
    """

    config: VisionLanguageConfig
    params: Any
    unused: Any
    published: hf_config.Published
    tokens: hf_config.TokenIds
    origin: Origin = Origin()
    entries: tuple[Entry, ...] = ()

    @property
    def description(self) -> tuple[VisionLanguageConfig, hf_config.Published, hf_config.TokenIds]:
        """What an adapter has to know of it."""
        return self.config, self.published, self.tokens

    def flat(self) -> dict[str, Any]:
        """All arrays by path, `params/...` and `unused/...`."""
        return flatten({"params": self.params, "unused": self.unused})

    def with_flat(self, flat: Mapping[str, Any]) -> "Checkpoint":
        """The same with other arrays."""
        trees = unflatten(flat)
        return dataclasses.replace(self, params=trees["params"], unused=trees.get("unused", {}))

    def check_float(self, layout: str) -> None:
        """Raises an `InputError` where weights are quantised, for which the layout has no form."""
        kind = next((leaf.kind for leaf in self.flat().values() if isinstance(leaf, QuantizedTensor)), None)
        if kind is not None:
            raise InputError(
                f"the model is quantised to {kind}, and {layout} has no form for that: save it as 'ours', or convert "
                "the model that it was made from"
            )

    @property
    def dtype(self) -> str:
        """That of the largest array, by PyTorch's name; of quantised kernels their kind."""
        largest = max(self.flat().values(), key=lambda array: math.prod(array.shape))
        return largest.kind if isinstance(largest, QuantizedTensor) else str(np.dtype(largest.dtype))

    @property
    def size(self) -> int:
        """Number of parameters, the unused ones included."""
        return sum(math.prod(array.shape) for array in self.flat().values())

    @property
    def nbytes(self) -> int:
        """Of all arrays as they are stored."""
        leaves = jax.tree.leaves(self.flat())
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def table(config: VisionLanguageConfig, published: hf_config.Published) -> list[names.Row]:
    """The rows of a model in a layout."""
    if published.format == "phantom":
        layout = "llama" if published.language_model == "qwen2" else published.language_model
        return names.phantom_table(config, layout)
    if published.format == "llava-hf":
        return names.llava_hf_table(config)
    return names.llava_original_table(config, tower=published.tower_inside)


@functools.cache
def shapes(config: VisionLanguageConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of all parameters by path, the unused ones of a CLIP tower included."""
    used = {path: leaf.shape for path, leaf in flatten({"params": parameter_shapes(config)}).items()}
    if not config.vision_tower.pre_norm:
        return types.MappingProxyType(used)
    prefix, unused = "params/vision_tower/layers/", {}
    for path, shape in used.items():
        if path.startswith(prefix) and config.vision_tower.unused_layers:
            unused["unused" + path.removeprefix("params")] = (config.vision_tower.unused_layers, *shape[1:])
    for name in ("scale", "bias"):
        unused[f"unused/vision_tower/final_norm/{name}"] = (config.vision_tower.embed_dim,)
    return types.MappingProxyType(used | unused)


def read_config(
    directory: pathlib.Path, tower: VisionTowerConfig | None = None
) -> tuple[VisionLanguageConfig, hf_config.Published, hf_config.TokenIds]:
    """What the `config.json` of a folder describes; see `hf_config.read`.

    Raises:
      InputError: names the folder.
    """
    beside = directory / "vision_config.json"
    contents = read_json(directory / "config.json"), read_json(beside) if beside.is_file() else None
    try:
        return hf_config.read(*contents, tower)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def load(
    directory: str | os.PathLike[str],
    *,
    open_files: Callable[[pathlib.Path], TensorFiles] = TensorFiles.of_folder,
    tower: tuple[VisionTowerConfig, Mapping[str, Any]] | None = None,
) -> Checkpoint:
    """Opens a published checkpoint: headers are read and checked, tensors when they are asked for.

    Args:
      directory: with `config.json`.
      open_files: opens its weights.
      tower: config and arrays by path of the vision tower of an original LLaVA that leaves it out.

    Raises:
      InputError: the layout is not known, or tensors are missing, extra or misshapen: see `check_rows`.
    """
    directory = pathlib.Path(directory)
    config, published, tokens = read_config(directory, None if tower is None else tower[0])
    content = published.config
    files = open_files(directory)
    if published.format == "llava-hf":
        held = {names.published_llava_hf(name): name for name in files.names()}
        if len(held) < len(files.names()):
            twice = sorted(set(files.names()) - set(held.values()))
            raise InputError(f"{directory} holds tensors under two names:\n    {listed(twice)}")
        files = files.called(held)
    generation = directory / "generation_config.json"
    inside = published.format != "llava-original" or any(names.TOWER in name for name in files.names())
    published = dataclasses.replace(
        published, tower_inside=inside, generation_config=read_json(generation) if generation.is_file() else {}
    )
    if inside == (tower is not None):
        raise InputError(
            f"{directory} holds its vision tower: leave --vision out"
            if inside
            else f"{directory} leaves its vision tower out: give the folder of {content.get('mm_vision_tower')} as "
            "--vision to convert, and load what that writes"
        )
    rows, ours = table(config, published), shapes(config)
    constants = _constants(config, published)
    derived = check_rows(rows, ours, files, str(directory), constants=constants)
    for name, constant in constants.items():
        if files.read(name).tobytes() != np.asarray(constant[...], files.dtype(name)).tobytes():
            raise InputError(
                f"{files.path(name)} holds a projector of two linear maps without activation, the second ({name}) not "
                "the identity: fold it into the first"
            )
    arrays = read_rows(rows, ours, files) | ({} if tower is None else dict(tower[1]))
    trees = unflatten(arrays)
    entries = [
        *(entry(row, name, files, arrays) for row in rows for name in row.names()),
        *(Entry(name, (), "dropped", "follows from the config") for name in derived),
        *(Entry(name, (), "dropped", "the identity behind a linear projector") for name in constants),
    ]
    origin = Origin(base=(str(content.get("_name_or_path") or directory.resolve().name),))
    return Checkpoint(config, trees["params"], trees.get("unused", {}), published, tokens, origin, tuple(entries))


def entry(row: names.Row, name: str, files: TensorFiles, arrays: Mapping[str, StoredArray]) -> Entry:
    """What became of a tensor that a table has."""
    stored, dtype = files.dtype(name), arrays[row.paths[0]].dtype
    if stored == dtype:
        return Entry(name, row.paths, "kept")
    return Entry(name, row.paths, "transformed", f"{stored} to {dtype}, as other layers are")


def read_rows(
    rows: Sequence[names.Row], shapes: Mapping[str, tuple[int, ...]], files: TensorFiles
) -> dict[str, StoredArray]:
    """Our arrays by path as they lie in published tensors, in their dtype; nothing is read yet.

    Args:
      rows: of a table; their tensors must be there, see `check_rows`.
      shapes: of our arrays by path.
      files: the tensors. Where layers of one array differ in their dtype, all take the one that holds them.
    """
    flat = {}
    for row in rows:
        layout = row.transform.layout(_row_shapes(row, shapes))
        stored = {files.dtype(name) for name in row.names()}
        dtype = stored.pop() if len(stored) == 1 else np.result_type(np.float32, *stored)
        for path, view in zip(row.paths, layout.views, strict=True):
            flat[path] = _array(row, view, shapes[path], files, dtype)
    return flat


def _array(row: names.Row, view: Any, shape: tuple[int, ...], files: TensorFiles, dtype: np.dtype) -> StoredArray:
    def part(name: str, shape: tuple[int, ...]) -> StoredArray:
        fetch = files.fetch(name)
        return StoredArray(shape, dtype, lambda box: view.read(box, fetch).astype(dtype, copy=False), view.outermost[0])

    if row.layers is None:
        return part(row.name, shape)
    return stack([part(name, shape[1:]) for name in row.names()])


def _row_shapes(row: names.Row, ours: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    skip = 0 if row.layers is None else 1
    return [ours[path][skip:] for path in row.paths]


def _constants(config: VisionLanguageConfig, published: hf_config.Published) -> dict[str, StoredArray]:
    """Tensors that a layout wants and that say nothing: `llava-hf` puts an identity behind a linear projector."""
    if published.format != "llava-hf" or config.projector.kind != "linear":
        return {}
    width = config.projector.embed_dim

    def identity(box: Box) -> np.ndarray:
        rows, columns = box
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return np.eye(*shape, k=rows.start - columns.start, dtype=np.float32)

    prefix = "multi_modal_projector.linear_2."
    return {
        prefix + "weight": StoredArray((width, width), np.float32, identity),
        prefix + "bias": StoredArray((width,), np.float32, lambda box: np.zeros(box[0].stop - box[0].start)),
    }


def check_rows(
    rows: Sequence[names.Row],
    ours: Mapping[str, tuple[int, ...]],
    files: TensorFiles,
    where: str,
    *,
    constants: Mapping[str, StoredArray] = {},  # noqa: B006 - never changed
) -> list[str]:
    """Compares a table with the tensors of a folder.

    Args:
      rows: the table.
      ours: shapes of our arrays by path.
      files: the tensors.
      where: the folder's name, for the error.
      constants: tensors that the layout has beside those of the table, by name.

    Returns:
      Names of tensors that may be left out: tables of angles, which follow from the config.

    Raises:
      InputError: tensors are missing, extra, misshapen or no floating point numbers; of each kind the first are listed.
    """
    expected = {name: row.transform.layout(_row_shapes(row, ours)).shape for row in rows for name in row.names()}
    expected |= {name: constant.shape for name, constant in constants.items()}
    derived = [name for name in files.names() if name.endswith(_DERIVED)]
    present = set(files.names()) - set(derived)
    problems = {
        "missing": sorted(set(expected) - present),
        "not expected": sorted(present - set(expected)),
        "misshapen": [
            f"{name} is {files.shape(name)} instead of {expected[name]}"
            for name in sorted(present & set(expected))
            if files.shape(name) != expected[name]
        ],
    }
    problems["not floating point"] = [
        f"{name} is {files.dtype_name(name)}"
        for name in sorted(present & set(expected))
        if files.dtype_name(name) not in DTYPES
    ]
    lines = [f"{len(found)} {what}:\n    {listed(found)}" for what, found in problems.items() if found]
    if lines:
        raise InputError(
            f"{where} does not fit its config.json. Take config and weights from one checkpoint.\n  "
            + "\n  ".join(lines)
        )
    return derived


def save(checkpoint: Checkpoint, directory: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `config.json` and safetensors in the checkpoint's published layout into an existing directory.

    Raises:
      InputError: the layout cannot express the model.
    """
    directory = pathlib.Path(directory)
    hf_config.check_expressible(checkpoint.config, checkpoint.published)
    tensors = list(published_tensors(checkpoint))
    largest = max(tensors, key=lambda tensor: tensor.nbytes)
    config, beside = hf_config.write(checkpoint.config, checkpoint.published, checkpoint.tokens, str(largest.dtype))
    write_json(directory / "config.json", config)
    if beside is not None:
        write_json(directory / "vision_config.json", beside)
    write_folder(directory, tensors, shard_bytes)


def published_tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """The tensors of a checkpoint in its published layout; each is read from the model when its blocks are.

    Raises:
      InputError: the model lacks parameters that the layout has, or is quantised.
    """
    checkpoint.check_float(checkpoint.published.format)
    flat = checkpoint.flat()
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
        yield from row_tensors(row, [flat[path] for path in row.paths])
    dtype = np.dtype(flat["params/projector/linear_1/kernel"].dtype)
    for name, constant in _constants(checkpoint.config, checkpoint.published).items():
        flat_layout = names.Transform().layout([constant.shape])
        yield Tensor(name, constant.shape, dtype, _blocks(flat_layout, [cast(constant, dtype)], None))


def row_tensors(row: names.Row, arrays: Sequence[Any]) -> Iterator[Tensor]:
    """The published tensors of one row, made of our arrays for its paths.

    Raises:
      InputError: the arrays have several dtypes.
    """
    dtypes = {str(array.dtype) for array in arrays}
    if len(dtypes) > 1:
        raise InputError(f"{row.name} packs {', '.join(row.paths)} of dtypes {', '.join(sorted(dtypes))}: cast them")
    skip = 0 if row.layers is None else 1
    layout = row.transform.layout([tuple(array.shape[skip:]) for array in arrays])
    for layer, name in enumerate(row.names()):
        yield Tensor(name, layout.shape, np.dtype(arrays[0].dtype), _blocks(layout, arrays, layer if skip else None))


def _blocks(layout: names.Layout, arrays: Sequence[Any], layer: int | None) -> Any:
    def blocks() -> Iterator[np.ndarray]:
        parts = [array if layer is None else layer_of(array, layer) for array in arrays]
        return layout.blocks(parts, BLOCK, arrays[0].dtype)

    return blocks
