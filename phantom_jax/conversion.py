"""From one layout of a model on disk to another, in memory of some blocks."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from phantom_jax import verification
from phantom_jax.checkpoints import adapter_folder, model_folder, tensor_report
from phantom_jax.checkpoints.adapter import Adapter, merge
from phantom_jax.checkpoints.arrays import cast
from phantom_jax.checkpoints.assemble import assemble
from phantom_jax.checkpoints.hf import Checkpoint, Origin
from phantom_jax.checkpoints.hf_processor import with_template
from phantom_jax.checkpoints.load_lines import adapter_lines, load_lines, serve_line
from phantom_jax.checkpoints.model_card import model_card
from phantom_jax.checkpoints.quantized import quantized
from phantom_jax.checkpoints.relayout import in_layout
from phantom_jax.checkpoints.weights import open_tensors
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json
from phantom_jax.layouts import ADAPTER_LAYOUTS, LAYOUTS, MODEL_LAYOUTS, STORED_DTYPES, check_name
from phantom_jax.models.quantization import check_kind, kernel_inputs
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.processor import Processor


@dataclasses.dataclass(frozen=True)
class Parents:
    """Folders that a new model is put together from; see `checkpoints.assemble`.

    Attributes:
      vision: of the vision tower.
      llm: of the language model.
      projector: its file or folder; None for a fresh one.
      projector_kind: of a fresh one.
      seed: of all that is fresh.
    """

    vision: str
    llm: str
    projector: str | None = None
    projector_kind: str | None = None
    seed: int = 0


def convert(
    source: str | Parents,
    target: str,
    *,
    layout: str,
    base: str | None = None,
    vision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    template: str | None = None,
    allow_pickle: bool = False,
    evaluation: str | None = None,
    verify: bool = False,
) -> list[str]:
    """Reads a model or an adapter of any known layout and writes it in another one.

    Args:
      source: folder to read, or the parents of a new model.
      target: folder to write; it must not exist, or be empty.
      layout: one of `layouts.LAYOUTS`.
      base: folder of the model that an adapter was trained on.
      vision: folder of the vision tower of an original LLaVA that leaves it out.
      dtype: one of `layouts.STORED_DTYPES`, of all arrays; None keeps each as it is stored.
      quantize: `int8` or `nf4`, for the linear maps of the language model's layers; `ours` alone holds that.
      template: name of the conversation template to store; None keeps what the source remembers.
      allow_pickle: read `.bin` files, in a process of its own.
      evaluation: folder that `evaluate` wrote, or NAME=FOLDER; its results go into the model card.
      verify: read the target back and compare; see `verification`.

    Returns:
      Lines that say what was done, and how to load the result.

    Raises:
      InputError: the target holds files, the source is damaged, or has no form in that layout. Nothing is overwritten.
      Mismatch: what was written is not what was read; the target does not appear.
    """
    _check(target, layout, dtype, quantize)
    if isinstance(source, str) and not os.path.isdir(source):
        raise InputError(f"there is no folder {source!r}: --source is that of a model or an adapter")
    metrics = {} if evaluation is None else _metrics(evaluation, source)
    name = source if isinstance(source, str) else f"a new model of {source.vision} and {source.llm}"
    with _scratch(target, allow_pickle) as scratch:
        if isinstance(source, str) and adapter_folder.is_adapter(source):
            whole = {"vision": vision, "dtype": dtype, "quantize": quantize, "template": template}
            whole |= {"evaluation": evaluation, "verify": verify or None}
            given = [f"--{flag}" for flag, value in whole.items() if value is not None]
            if given:
                raise InputError(f"{source} is an adapter, and {', '.join(given)} is for whole models: leave it out")
            return _convert_adapter(source, target, layout, base, scratch)
        if layout == "peft":
            raise InputError(f"{name} is a whole model, peft is a layout of adapters: choose another --to")
        if base is not None:
            raise InputError(f"--base is the model of an adapter, and {name} is none: leave it out")
        checkpoint, processor = _read(source, vision, template, scratch)
        if dtype is not None:
            checkpoint = _cast(checkpoint, np.dtype(dtype))
        if layout != "ours":
            checkpoint, processor = in_layout(checkpoint, processor, layout)
        if quantize is not None:
            checkpoint = _quantized(checkpoint, quantize)
        found: list[str] = []

        def check(folder: pathlib.Path) -> None:
            found.extend(verification.verify(checkpoint, folder, source=source if isinstance(source, str) else None))

        lines = [*_write(checkpoint, processor, target, layout, metrics, check if verify else None), *found]
    return [*lines, *_how_to_load(layout, target, checkpoint)]


def merge_adapter(
    model: str, adapter: str, target: str, *, layout: str | None = None, allow_pickle: bool = False
) -> list[str]:
    """Works an adapter into its model and writes the result.

    Args:
      model: folder of the model that the adapter was trained on, of any layout, not quantised.
      adapter: its folder, PEFT's, LLaVA's or ours.
      target: folder to write; it must not exist, or be empty.
      layout: of the result; None is that of the model.
      allow_pickle: read `.bin` files, in a process of its own.

    Returns:
      Lines that say what was done, and how to load the result.

    Raises:
      InputError: the two do not go together, or one of them is damaged.
    """
    if layout is not None:
        check_name("layout", layout, MODEL_LAYOUTS)
    model_folder.check_new(target)
    with _scratch(target, allow_pickle) as scratch:
        checkpoint, processor = model_folder.read(model, scratch=scratch)
        layout = layout or ("ours" if model_folder.is_ours(model) else checkpoint.published.format)
        change = adapter_folder.read(adapter, checkpoint.description, scratch=scratch)
        change.check_template(processor)
        merged = merge(checkpoint, change)
        merged = dataclasses.replace(
            merged,
            entries=tensor_report.changed(merged.entries, [*change.low_rank, *change.others], "the adapter worked in"),
        )
        if layout != "ours":
            merged, processor = in_layout(merged, processor, layout)
        lines = _write(merged, processor, target, layout, {})
    return [*_dropped(change), *lines, *_how_to_load(layout, target, merged)]


def _check(target: str, layout: str, dtype: str | None, quantize: str | None) -> None:
    check_name("layout", layout, LAYOUTS)
    if dtype is not None:
        check_name("dtype", dtype, STORED_DTYPES)
    if quantize is not None:
        check_kind(quantize)
        if layout != "ours":
            raise InputError(
                f"{layout} has no form for {quantize} weights of ours: set --to=ours, or leave quantize out"
            )
    model_folder.check_new(target)


@contextlib.contextmanager
def _scratch(target: str, allow_pickle: bool) -> Iterator[pathlib.Path | None]:
    """A folder on the target's disk for what pickled weights become; None where they are refused."""
    if not allow_pickle:
        yield None
        return
    with model_folder.scratch_folder(pathlib.Path(target), "pickled") as folder:
        yield folder


def _read(
    source: str | Parents, vision: str | None, template: str | None, scratch: pathlib.Path | None
) -> tuple[Checkpoint, Processor | None]:
    if isinstance(source, str):
        checkpoint, processor = model_folder.read(source, scratch=scratch, vision=vision)
        if template is not None and processor is None:
            raise InputError(f"{source} has no tokenizer, so template {template!r} can not go with it: leave it out")
        return checkpoint, processor if template is None else with_template(processor, template)
    checkpoint, processor, entries = assemble(
        source.vision,
        source.llm,
        source.projector,
        projector_kind=source.projector_kind,
        seed=source.seed,
        template=template,
        open_files=functools.partial(open_tensors, scratch=scratch),
    )
    origin = Origin(base=tuple(filter(None, (source.vision, source.llm, source.projector))))
    return dataclasses.replace(checkpoint, origin=origin, entries=tuple(entries)), processor


def _cast(checkpoint: Checkpoint, dtype: np.dtype) -> Checkpoint:
    flat = checkpoint.flat()
    kinds = {array.kind for array in flat.values() if isinstance(array, QuantizedTensor)}
    if kinds:
        raise InputError(f"the weights are quantised to {kinds.pop()}, they have no other dtype: leave dtype out")
    entries = checkpoint.entries
    for stored in sorted({array.dtype for array in flat.values()} - {dtype}, key=str):
        paths = [path for path, array in flat.items() if array.dtype == stored]
        entries = tensor_report.changed(entries, paths, f"{stored} to {dtype}")
    return dataclasses.replace(
        checkpoint.with_flat({path: cast(array, dtype) for path, array in flat.items()}), entries=entries
    )


def _quantized(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    flat = checkpoint.flat()
    kernels = [path for path in flat if kernel_inputs(path.removeprefix("params/")) is not None]
    entries = tensor_report.changed(checkpoint.entries, kernels, f"quantised to {kind}")
    return dataclasses.replace(checkpoint.with_flat(quantized(flat, kind)), entries=entries)


def _write(
    checkpoint: Checkpoint,
    processor: Processor | None,
    target: str,
    layout: str,
    metrics: Mapping[str, float],
    check: Callable[[pathlib.Path], None] | None = None,
) -> list[str]:
    model_folder.write(checkpoint, processor, target, format=layout, metrics=metrics, report=True, check=check)
    arrays, parameters = checkpoint.flat(), checkpoint.size
    lines = [f"wrote {len(arrays)} arrays, {parameters:,} parameters, to {target} ({layout})"]
    if processor is None:
        lines.append("no tokenizer: the source has none, so text can not go in or out")
    return [
        *lines,
        tensor_report.summary(checkpoint.entries),
        f"each tensor: {os.path.join(target, model_folder.REPORT)}",
    ]


def _convert_adapter(
    source: str, target: str, layout: str, base: str | None, scratch: pathlib.Path | None
) -> list[str]:
    if layout not in ADAPTER_LAYOUTS:
        raise InputError(
            f"{source} is an adapter, and {layout} a layout of whole models: set --to to "
            f"{' or '.join(ADAPTER_LAYOUTS)}, or work it into its model with `merge`"
        )
    model = None if base is None else model_folder.describe(base)
    adapter = adapter_folder.read(source, model, scratch=scratch)
    with model_folder.appearing(target) as folder:
        adapter_folder.write(adapter, folder, format=layout)
        if layout == "peft":
            (folder / "README.md").write_text(_adapter_card(adapter, target), encoding="utf-8")
    lines = [f"wrote an adapter of {len(adapter.low_rank)} arrays, {adapter.size:,} parameters, to {target} ({layout})"]
    return [*lines, *_dropped(adapter), *_how_to_load(layout, target, adapter)]


def _dropped(adapter: Adapter) -> list[str]:
    count = len(adapter.dropped)
    return [f"adapter: {count} tensors dropped: of the vision tower, they change nothing"] if count else []


def _adapter_card(adapter: Adapter, target: str) -> str:
    return model_card(
        adapter.config,
        adapter.published,
        "peft",
        name=pathlib.Path(target).name,
        dtype=str(next(iter(adapter.low_rank.values())).a.dtype),
        base=[adapter.base] if adapter.base else [],
        rank=max(max(change.ranks) for change in adapter.low_rank.values()),
    )


def _how_to_load(layout: str, target: str, written: Checkpoint | Adapter) -> list[str]:
    served = None
    if isinstance(written, Adapter):
        # Of a folder in our own layout PEFT knows nothing, whatever it is trained over.
        over = written.published.format
        over = "ours" if layout == "ours" and over == "llava-hf" else over
        lines = adapter_lines(over, target, base=written.base or None)
    elif layout != "ours" and not written.published.tower_inside:
        command = f"phantom-jax convert --source={shlex.quote(target)} --vision=CLIP --target=NEW --to=ours"
        lines = ["# it leaves its vision tower out, as its source does; with CLIP's folder, first", f"# {command}"]
    else:
        lines, served = load_lines(layout, target), serve_line(layout, target)
    return ["", "load it with", *(f"    {line}" for line in lines), *([f"    {served}"] if served else [])]


def _metrics(folder: str, source: str | Parents) -> dict[str, float]:
    """The exact match that `evaluate --output` found.

    Args:
      folder: what it wrote. Of several models NAME=FOLDER takes one; else it is that of the source's name.
      source: the folder that is read.
    """
    name, named, folder = folder.rpartition("=")
    path = pathlib.Path(folder) / "results.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no results.json: give the folder that `evaluate --output` wrote")
    results = read_json(path)
    try:
        models = results["models"]
        if not named:
            name = next(iter(models)) if len(models) == 1 else pathlib.Path(str(source)).name
        if name not in models:
            raise InputError(f"{path} has results of {', '.join(models)}, none of {name!r}: give one as NAME=FOLDER")
        right, count = models[name]["all"]["all"]
        return {f"exact match, {results['source']} {results['split']}, {count} questions": right / count}
    except (ArithmeticError, AttributeError, KeyError, StopIteration, TypeError) as error:
        raise InputError(f"{path} is not what `evaluate --output` writes ({error!r})") from error
