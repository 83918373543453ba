"""Quantised kernels on disk: the arrays of a `QuantizedTensor` one by one; float kernels quantised layer by layer."""

import functools
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from phantom_jax.checkpoints.arrays import Box, StoredArray, contiguous
from phantom_jax.errors import InputError
from phantom_jax.models.quantization import kernel_inputs
from phantom_jax.ops.quantize import QuantizedTensor, quantize

_FIELDS = ("codes", "scales", "block_codes", "block_mean")


def quantized(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Flat parameters with stacked layers, the kernels that `quantize_params` takes quantised when they are read.

    Args:
      params: arrays by path, `language_model/layers/...` and others.
      kind: `int8` or `nf4`.

    Raises:
      InputError: something is quantised already.
    """
    result = {}
    for path, array in params.items():
        inputs = kernel_inputs(path.removeprefix("params/"))
        if inputs is not None and isinstance(array, QuantizedTensor):
            raise InputError(f"the weights are quantised to {array.kind} already: leave quantize out")
        result[path] = array if inputs is None else _quantized(array, kind, inputs)
    return result


def _quantized(kernel: Any, kind: str, inputs: int) -> QuantizedTensor:
    lock = threading.Lock()

    @functools.lru_cache(maxsize=2)
    def quantized_layer(index: int) -> QuantizedTensor:
        return jax.device_get(quantize(contiguous(np.asarray(kernel[index])), kind, inputs=inputs))

    def layer(index: int) -> QuantizedTensor:
        # Several arrays of a layer are asked for at a time.
        with lock:
            return quantized_layer(index)

    first = jax.ShapeDtypeStruct(kernel.shape[1:], kernel.dtype)
    form = jax.eval_shape(functools.partial(quantize, kind=kind, inputs=inputs), first)

    def field(name: str) -> StoredArray | None:
        if getattr(form, name) is None:
            return None
        shape = (kernel.shape[0], *getattr(form, name).shape)

        def read(box: Box) -> np.ndarray:
            layers = range(box[0].start, box[0].stop)
            parts = [np.asarray(getattr(layer(index), name))[box[1:]] for index in layers]
            return np.stack(parts) if parts else np.empty([part.stop - part.start for part in box])

        return StoredArray(shape, getattr(form, name).dtype, read)

    return QuantizedTensor(*map(field, _FIELDS), kind, form.input_shape, form.output_shape)


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
