"""Adapters that PEFT or LLaVA's own code wrote: names sorted out, checked against the model, factors taken lazily."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from phantom_jax.checkpoints import hf, names, peft_config
from phantom_jax.checkpoints.adapter import Adapter, LowRank, in_layers
from phantom_jax.checkpoints.adapter_names import Key, LinearMap, fitting, linears, parse, rows
from phantom_jax.checkpoints.arrays import Box, StoredArray
from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.checkpoints.tensor_files import DTYPES, TensorFiles
from phantom_jax.errors import InputError
from phantom_jax.models.vlm import VisionLanguageConfig

Pairs = dict[str, dict[str, str]]
"""Names of the tensors of both factors by module."""


def read(
    settings: Mapping[str, Any],
    files: TensorFiles,
    model: tuple[VisionLanguageConfig, Published, TokenIds],
    where: str,
) -> Adapter:
    """An adapter from its settings and tensors.

    Args:
      settings: content of `adapter_config.json`.
      files: all tensors that belong to it.
      model: what it adapts.
      where: the folder's name, for errors.

    Raises:
      InputError: the settings are not supported, or the tensors do not fit them or the model; names are listed.
    """
    peft_config.check(settings, where)
    config, published, _ = model
    keys = [parse(name) for name in files.names()]
    _refuse_other_kinds(files, where)
    naming, table = _naming(keys, config, published)
    shapes = hf.shapes(config)
    pairs, whole = _sort_out(keys, files, where)
    dropped = _leaked(pairs, files)
    maps = linears(table)
    _check_names(pairs, whole, maps, table, where)
    _check_complete(settings, pairs, dropped, maps, where)
    low_rank = {}
    for linear in maps:
        low_rank |= _factors(linear, pairs, settings, shapes, files, where)
    trained = [row for row in table if any(name in whole for name in row.names())]
    return Adapter(
        *model,
        low_rank,
        others=_others(trained, whole, shapes, files, where),
        dropout=float(settings.get("lora_dropout") or 0.0),
        rank_stabilized=bool(settings.get("use_rslora")),
        base=settings.get("base_model_name_or_path") or "",
        naming=naming,
        settings=settings,
        dropped=tuple(dropped),
    )


def _refuse_other_kinds(files: TensorFiles, where: str) -> None:
    kinds = {
        "lora_embedding_": "LoRA on the embedding",
        "lora_magnitude_vector": "DoRA",
        ".lora_B.bias": "LoRA with a bias",
        ".lora_bias": "LoRA with a bias",
        ".lora_E": "AdaLoRA",
        "trainable_tokens": "trained tokens",
    }
    for name in files.names():
        for part, kind in kinds.items():
            if part in name:
                raise InputError(f"{where} holds {name}: {kind} is not supported, only LoRA on linear maps")
        if files.dtype_name(name) not in DTYPES:
            raise InputError(f"{where} holds {name} as {files.dtype_name(name)}: use {', '.join(DTYPES)}")


def _naming(keys: list[Key], config: VisionLanguageConfig, published: Published) -> tuple[str, list[names.Row]]:
    """The naming under which most of the names are known, with its table."""
    tables = {naming: rows(config, published.language_model, naming) for naming in fitting(published)}

    def known(naming: str) -> int:
        modules = {name for row in tables[naming] for name in row.names()}
        return sum((f"{key.module}.weight" if key.factor else key.module) in modules for key in keys)

    naming = max(tables, key=known)
    return naming, tables[naming]


def _sort_out(keys: list[Key], files: TensorFiles, where: str) -> tuple[Pairs, dict[str, str]]:
    """Factors by module, and names of tensors by the parameter that they replace."""
    pairs: Pairs = collections.defaultdict(dict)
    whole: dict[str, str] = {}
    for key in keys:
        place, slot = (pairs[key.module], key.factor) if key.factor else (whole, key.module)
        if slot in place:
            raise InputError(f"{where} holds {place[slot]} and {key.name}: keep one adapter")
        place[slot] = key.name
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise InputError(f"{where} holds {next(iter(pair.values()))} without the other factor of {module}")
        a, b = files.shape(pair["A"]), files.shape(pair["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(f"{where} holds for {module} factors of shapes {a} and {b}, which have no common rank")
    return pairs, whole


def _leaked(pairs: Pairs, files: TensorFiles) -> list[str]:
    """Takes out factors of the vision tower that were never trained: PEFT makes them where its targets are meant for
    the decoder."""
    leaked = []
    for module in [module for module in pairs if Key("", module).in_tower]:
        if not all(np.any(files.read(name)) for name in pairs[module].values()):
            leaked += pairs.pop(module).values()
    return leaked


def _check_names(
    pairs: Pairs, whole: Mapping[str, str], maps: list[LinearMap], table: list[names.Row], where: str
) -> None:
    modules = {name for linear in maps for name in linear.modules()}
    parameters = {name for row in table for name in row.names()}
    unknown = [name for module, pair in pairs.items() if module not in modules for name in pair.values()]
    unknown += [name for parameter, name in whole.items() if parameter not in parameters]
    if unknown:
        raise InputError(
            f"{where} holds {len(unknown)} tensors that the model has no place for: {_listed(unknown)}. Give the model "
            "that it was trained on"
        )


def _check_complete(
    settings: Mapping[str, Any], pairs: Pairs, dropped: Iterable[str], maps: list[LinearMap], where: str
) -> None:
    if not pairs:
        raise InputError(f"{where} holds no tensor lora_A or lora_B that changes anything")
    # The same targets mean the decoder alone where it was adapted without its tower.
    with_tower = any(Key("", module).in_tower for module in pairs)
    there = {*pairs, *(parse(name).module for name in dropped)}
    missing = [
        name
        for linear in maps
        for name in linear.modules()
        if name not in there and (with_tower or not Key("", name).in_tower) and peft_config.targeted(settings, name)
    ]
    if missing:
        raise InputError(
            f"{where} has target_modules={settings.get('target_modules')!r}, but no tensors for {len(missing)} of "
            f"them: {_listed(missing)}"
        )


def _listed(found: Iterable[str]) -> str:
    first = sorted(found)
    return ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")


def _factors(
    linear: LinearMap,
    pairs: Pairs,
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    files: TensorFiles,
    where: str,
) -> dict[str, LowRank]:
    """The changes of the kernels of one row; kernels that are packed outside share A."""
    modules = linear.modules()
    if not any(module in pairs for module in modules):
        return {}
    stacked = in_layers(linear.row.paths[0])
    kernels = [shapes[path][stacked:] for path in linear.row.paths]
    inputs = kernels[0][: linear.inputs]
    ranks, alphas, a_parts, b_parts = [], [], [], []
    for module in modules:
        pair = pairs.get(module)
        rank = files.shape(pair["A"])[0] if pair else 0
        ranks.append(rank)
        alphas.append(0.0)
        a_parts.append(None)
        b_parts.append([None] * len(kernels))
        if pair is None:
            continue
        expected, alphas[-1] = peft_config.rank_and_alpha(settings, module)
        if rank != expected:
            raise InputError(f"{where} holds rank {rank} for {module}, its {peft_config.CONFIG} says {expected}")
        a_shape = (*inputs, rank)
        b_shapes = [(rank, *kernel[linear.inputs :]) for kernel in kernels]
        (a_parts[-1],) = _take(linear.a, pair["A"], [a_shape], files, where)
        b_parts[-1] = _take(linear.b, pair["B"], b_shapes, files, where)
    widest = max(ranks)
    a = _stack(a_parts, (*inputs, widest), stacked, linear.name)
    changes = {}
    for place, (path, kernel) in enumerate(zip(linear.row.paths, kernels, strict=True)):
        shape = (widest, *kernel[linear.inputs :])
        b = _stack([parts[place] for parts in b_parts], shape, stacked, linear.name)
        changes[path] = LowRank(a, b, tuple(ranks), tuple(alphas))
    return changes


def _take(
    transform: names.Transform, name: str, wanted: list[tuple[int, ...]], files: TensorFiles, where: str
) -> list[StoredArray]:
    layout = transform.layout(wanted)
    if files.shape(name) != layout.shape:
        raise InputError(
            f"{where} holds {name} as {files.shape(name)}, the model wants {layout.shape}: give the model that it was "
            "trained on"
        )
    paths = tuple(str(place) for place in range(len(wanted)))
    taken = hf.read_rows([names.Row(name, paths, transform)], dict(zip(paths, wanted, strict=True)), files)
    return [taken[path] for path in paths]


def _stack(parts: list[Any], shape: tuple[int, ...], stacked: bool, name: str) -> StoredArray:
    """Layers as one array; what a layer lacks, or has of lower rank, is zero."""
    dtypes = {part.dtype for part in parts if part is not None}
    if len(dtypes) > 1:
        raise InputError(f"the layers of {name} have dtypes {', '.join(sorted(map(str, dtypes)))}: cast them to one")
    if not stacked:
        return parts[0]

    def read(box: Box) -> np.ndarray:
        whole = np.zeros([part.stop - part.start for part in box], next(iter(dtypes)))
        for place, part in enumerate(parts[box[0]]):
            if part is not None:
                taken = part[box[1:]]
                whole[(place, *map(slice, taken.shape))] = taken
        return whole

    return StoredArray((len(parts), *shape), next(iter(dtypes)), read)


def _others(
    trained: list[names.Row],
    whole: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    files: TensorFiles,
    where: str,
) -> dict[str, StoredArray]:
    found: dict[str, StoredArray] = {}
    for row in trained:
        absent = [name for name in row.names() if name not in whole]
        if absent:
            raise InputError(f"{where} has {row.name} trained in full, but not in all layers: {_listed(absent)} lacks")
        skip = 0 if row.layers is None else 1
        wanted = [shapes[path][skip:] for path in row.paths]
        layers = [_take(row.transform, whole[name], wanted, files, where) for name in row.names()]
        for place, path in enumerate(row.paths):
            found[path] = _stack([parts[place] for parts in layers], wanted[place], bool(skip), row.name)
    return found
