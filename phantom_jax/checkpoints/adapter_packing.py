"""One of PEFT's modules out of our kernels: some published linear maps are several of ours, one below the other."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from phantom_jax.checkpoints import names
from phantom_jax.checkpoints.adapter import Adapter, LowRank, in_layers
from phantom_jax.checkpoints.adapter_names import LinearMap
from phantom_jax.checkpoints.hf import BLOCK
from phantom_jax.checkpoints.peft_config import Module
from phantom_jax.checkpoints.tensor_writer import Tensor
from phantom_jax.errors import InputError


def pack(
    adapter: Adapter, linear: LinearMap, layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Module, list[Tensor]]:
    """The adapter of a linear map of one layer; without tensors where it has none.

    Where all kernels in it have the same A, as after import, that is its A. Else it gets the A of each, one below the
    other, and a block-diagonal B: its rank is the sum, and alpha grows so that the scale stays.

    Args:
      adapter: the adapter.
      linear: the map.
      layer: which of its layers.
      shapes: of all kernels of the model by path.

    Raises:
      InputError: the kernels in it are scaled differently.
    """
    name = linear.modules()[layer]
    stacked = in_layers(linear.row.paths[0])
    changes = [adapter.low_rank.get(path) for path in linear.row.paths]
    changes = [change if change and change.ranks[layer] else None for change in changes]
    there = [change for change in changes if change]
    if not there:
        return Module(name), []
    first = there[0]
    scalings = sorted({adapter.scaling(change.ranks[layer], change.alphas[layer]) for change in there})
    if len(scalings) > 1:
        raise InputError(f"{name} packs low-rank changes with the scales {scalings}: PEFT has one scale for all of it")

    def of_layer(array: Any) -> np.ndarray:
        return np.asarray(array[layer] if stacked else array[...])

    def a_of(change: LowRank) -> np.ndarray:
        return of_layer(change.a)[..., : change.ranks[layer]]

    shared = all(change.a is first.a or np.array_equal(a_of(change), a_of(first)) for change in there[1:])
    rank = first.ranks[layer] if shared else sum(change.ranks[layer] for change in there)
    alpha = first.alphas[layer] if shared else scalings[0] / adapter.scaling(rank, 1.0)
    outputs = [shapes[path][stacked + linear.inputs :] for path in linear.row.paths]

    def a_factor() -> list[np.ndarray]:
        return [np.concatenate([a_of(change) for change in there[: 1 if shared else len(there)]], axis=-1)]

    def b_factor() -> list[np.ndarray]:
        found, start = [], 0
        for change, output in zip(changes, outputs, strict=True):
            b = np.zeros((rank, *output), first.b.dtype)
            if change:
                own = change.ranks[layer]
                b[start : start + own] = of_layer(change.b)[:own]
                start += 0 if shared else own
            found.append(b)
        return found

    inputs = shapes[linear.row.paths[0]][stacked:][: linear.inputs]
    a_layout = linear.a.layout([(*inputs, rank)])
    b_layout = linear.b.layout([(rank, *output) for output in outputs])
    return Module(name, rank, alpha), [
        _tensor(f"{name}.lora_A.weight", a_layout, a_factor, first.a.dtype),
        _tensor(f"{name}.lora_B.weight", b_layout, b_factor, first.b.dtype),
    ]


def _tensor(name: str, layout: names.Layout, arrays: Any, dtype: Any) -> Tensor:
    return Tensor(name, layout.shape, np.dtype(dtype), lambda: layout.blocks(arrays(), BLOCK, dtype))
