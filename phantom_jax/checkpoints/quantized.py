"""Quantised kernels on disk: the arrays of a `QuantizedTensor` one by one; float kernels quantised layer by layer."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from phantom_jax.checkpoints.arrays import Box, StoredArray, boxes, contiguous, once, stack
from phantom_jax.errors import InputError
from phantom_jax.models.quantization import kernel_inputs
from phantom_jax.ops.quantize import QuantizedTensor, quantize

_FIELDS = ("codes", "scales", "block_codes", "block_mean")


def quantized(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Flat parameters with stacked layers, the kernels of the layers quantised when they are read.

    Two quantised layers are kept. Read in the order of `blocks`, no layer is quantised twice.

    Args:
      params: arrays by path, `language_model/layers/...` and others.
      kind: `int8` or `nf4`.

    Raises:
      InputError: something is quantised already.
    """
    inputs = {path: kernel_inputs(path.removeprefix("params/")) for path in params}

    def quantize_layer(path: str, index: int) -> QuantizedTensor:
        return jax.device_get(quantize(contiguous(np.asarray(params[path][index])), kind, inputs=inputs[path]))

    layer = once(quantize_layer, 2)
    result = {}
    for path, array in params.items():
        if inputs[path] is not None and isinstance(array, QuantizedTensor):
            raise InputError(f"the weights are quantised to {array.kind} already: leave quantize out")
        result[path] = (
            array if inputs[path] is None else _when_read(array, kind, inputs[path], functools.partial(layer, path))
        )
    return result


def _when_read(kernel: Any, kind: str, inputs: int, layer: Callable[[int], QuantizedTensor]) -> QuantizedTensor:
    first = jax.ShapeDtypeStruct(kernel.shape[1:], kernel.dtype)
    form = jax.eval_shape(functools.partial(quantize, kind=kind, inputs=inputs), first)

    def field(name: str) -> StoredArray | None:
        one = getattr(form, name)
        if one is None:
            return None
        return stack(
            [
                StoredArray(one.shape, one.dtype, lambda box, index=index: np.asarray(getattr(layer(index), name))[box])
                for index in range(kernel.shape[0])
            ]
        )

    return QuantizedTensor(*map(field, _FIELDS), kind, form.input_shape, form.output_shape)


def in_kernel(path: str) -> bool:
    """Whether `split_fields` made this path of an array of a quantised kernel."""
    return path.endswith(tuple(f"/kernel/{name}" for name in _FIELDS))


def blocks(
    flat: Mapping[str, Any], limit: int, chunks: Mapping[str, tuple[int, ...]] | None = None
) -> list[tuple[str, Box]]:
    """All parts of arrays, those of one quantised kernel layer by layer together.

    Args:
      flat: arrays by path, as of `split_fields`.
      limit: about as many bytes are a part.
      chunks: see `arrays.boxes`, by path.
    """
    parts = [
        (path, box)
        for path, array in flat.items()
        for box in boxes(array, limit, chunks and chunks[path], layered=in_kernel(path) or None)
    ]

    def place(part: tuple[str, Box]) -> tuple[str, int]:
        path, box = part
        return (path.rpartition("/")[0], box[0].start) if in_kernel(path) else (path, 0)

    return sorted(parts, key=place)


def split_fields(flat: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Quantised kernels as `.../kernel/codes` and so on, and what they are quantised to; None without any."""
    split, kinds = {}, set()
    for path, leaf in flat.items():
        if isinstance(leaf, QuantizedTensor):
            kinds.add(leaf.kind)
            split |= {f"{path}/{name}": getattr(leaf, name) for name in _FIELDS if getattr(leaf, name) is not None}
        else:
            split[path] = leaf
    if len(kinds) > 1:
        raise InputError(f"kernels are quantised to {' and '.join(sorted(kinds))}: quantise all to one")
    return split, kinds.pop() if kinds else None


def join_fields(
    flat: Mapping[str, Any], kind: str | None, shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """The inverse of `split_fields`.

    Args:
      flat: arrays by path.
      kind: what kernels are quantised to.
      shapes: those of the float kernels by path.
      where: the folder's name, for the error.

    Raises:
      InputError: the arrays of a kernel are not those of that kind.
    """
    joined: dict[str, Any] = {}
    for path, array in flat.items():
        kernel, _, name = path.rpartition("/")
        if kind is None or kernel not in shapes or name not in _FIELDS:
            joined[path] = array
            continue
        fields = joined.setdefault(kernel, dict.fromkeys(_FIELDS))
        fields[name] = array
    for path, fields in joined.items():
        if isinstance(fields, dict):
            inputs = kernel_inputs(path.removeprefix("params/"))
            layers, *shape = shapes[path]
            form = jax.eval_shape(
                functools.partial(quantize, kind=kind, inputs=inputs), jax.ShapeDtypeStruct(shape, np.float32)
            )
            for name, field in fields.items():
                wanted, found = getattr(form, name), None if field is None else tuple(field.shape)
                if found != (None if wanted is None else (layers, *wanted.shape)):
                    raise InputError(
                        f"{where} has {path}/{name} of shape {found}, which is not how {kind} kernels of "
                        f"{list(shapes[path])} are kept: save it again"
                    )
            joined[path] = QuantizedTensor(
                **fields, kind=kind, input_shape=form.input_shape, output_shape=form.output_shape
            )
    return joined
