"""Adapters in the form that PEFT, LLaVA's own code and vLLM read."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from phantom_jax.checkpoints import hf, hf_config, names, peft_config
from phantom_jax.checkpoints.adapter import Adapter
from phantom_jax.checkpoints.adapter_names import NAMINGS, PREFIX, linears, rows
from phantom_jax.checkpoints.adapter_packing import pack
from phantom_jax.checkpoints.tensor_writer import Tensor, write_file
from phantom_jax.errors import InputError
from phantom_jax.json_files import write_json

WEIGHTS = "adapter_model.safetensors"
OTHERS = "non_lora_trainables.safetensors"
"""What LLaVA's code calls `non_lora_trainables.bin`: parameters trained in full. Pickles are never written."""

# PEFT's name of a weight that it adapts, where it keeps that too: it does so for a head.
_UNDER = ".base_layer.weight"
_DEFAULTS = {
    "auto_mapping": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
}


def write(adapter: Adapter, directory: pathlib.Path) -> None:
    """Writes `adapter_config.json` and safetensors into an existing directory.

    Names and settings are those that the adapter came with, if they belong to the layout of its model, else those of
    that layout. Parameters trained in full go where PEFT looks for them; for an original LLaVA they go into a file of
    their own with `config.json` beside it, as its code has them.

    Raises:
      InputError: PEFT has no form for the adapter.
    """
    if not adapter.low_rank:
        raise InputError("the adapter has whole parameters alone: PEFT wants low-rank factors, merge it instead")
    layout = adapter.published.format
    known = adapter.naming is not None and NAMINGS[adapter.naming][0] == layout
    table = rows(adapter.config, adapter.published.language_model, adapter.naming if known else layout)
    shapes = hf.shapes(adapter.config)
    packed = [
        pack(adapter, linear, layer, shapes) for linear in linears(table) for layer in range(len(linear.modules()))
    ]
    modules = [module for module, _ in packed]
    settings = _DEFAULTS | (dict(adapter.settings) if known else {})
    if "r" not in settings or not peft_config.describes(settings, modules):
        settings |= {key: _DEFAULTS[key] for key in ("exclude_modules", "layers_pattern", "layers_to_transform")}
        settings |= peft_config.settings_for(modules)
    others = list(_others(adapter, table))
    under = [tensor for tensor in others if tensor.name.endswith(_UNDER)]
    whole = [tensor for tensor in others if tensor not in under]
    if layout != "llava-original":
        # Without their weights they are what PEFT's setting `bias` has trained, and keeps by itself.
        weights = {_module(tensor.name) for tensor in whole if not tensor.name.endswith(".bias")}
        biases = [tensor for tensor in whole if _module(tensor.name) not in weights]
        whole = [tensor for tensor in whole if tensor not in biases]
        others = [tensor for tensor in others if tensor not in biases]
        adapted = {module.name for module in modules if module.rank}
        others += [_under_adapter(tensor) if _module(tensor.name) in adapted else tensor for tensor in biases]
        if biases and settings["bias"] == "none":
            settings["bias"] = "all"
    if layout != "llava-original" and not all(peft_config.saved_whole(settings, tensor.name) for tensor in whole):
        settings["modules_to_save"] = _modules_to_save(table, {tensor.name for tensor in whole})
    settings |= {
        "base_model_name_or_path": adapter.base or None,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
    }
    beside = [tensor for tensor in whole if not peft_config.saved_whole(settings, tensor.name)]
    inside = [tensor for tensor in others if tensor not in beside]
    write_json(directory / peft_config.CONFIG, settings)
    write_file(directory / WEIGHTS, _prefixed([tensor for _, tensors in packed for tensor in tensors] + inside))
    if beside:
        write_file(directory / OTHERS, _prefixed(beside))
    if layout == "llava-original":
        dtype = str(next(iter(adapter.low_rank.values())).a.dtype)
        config, vision = hf_config.write(adapter.config, adapter.published, adapter.tokens, dtype)
        write_json(directory / "config.json", config)
        if vision is not None:
            write_json(directory / "vision_config.json", vision)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _under_adapter(bias: Tensor) -> Tensor:
    return dataclasses.replace(bias, name=f"{_module(bias.name)}.base_layer.bias")


def _prefixed(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [dataclasses.replace(tensor, name=PREFIX + tensor.name) for tensor in tensors]


def _others(adapter: Adapter, table: Sequence[names.Row]) -> Iterator[Tensor]:
    """Parameters trained in full, under their published names."""
    for row in table:
        there = [path for path in row.paths if path in adapter.others]
        if not there:
            continue
        if len(there) < len(row.paths):
            raise InputError(f"{row.name} packs {', '.join(row.paths)}, only {', '.join(there)} was trained in full")
        for tensor in hf.row_tensors(row, [adapter.others[path] for path in row.paths]):
            under = any(path in adapter.low_rank for path in row.paths)
            yield dataclasses.replace(tensor, name=tensor.name.removesuffix(".weight") + _UNDER) if under else tensor


def _modules_to_save(table: Sequence[names.Row], trained: set[str]) -> list[str]:
    """The modules of parameters that were trained: PEFT keeps modules, not parameters."""
    modules = {_module(name) for name in trained}
    absent = {name for row in table for name in row.names() if _module(name) in modules} - trained
    if absent:
        raise InputError(f"{', '.join(sorted(absent))} would have to be trained in full too: PEFT keeps whole modules")
    return sorted(modules)
