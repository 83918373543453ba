"""The parameters of a model, from where they lie to devices, one array after another."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from phantom_jax.checkpoints.arrays import cast
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.sharding.placement import place
from phantom_jax.trees import flatten, unflatten


def place_parameters(
    params: Mapping[str, Any],
    sharding: Callable[[str, Any], Any] | None = None,
    *,
    dtype: Callable[[str], Any] | None = None,
    quantize: Callable[[str, Any], Any] | None = None,
) -> dict[str, Any]:
    """Parameters on devices. What is quantised is so as soon as it is there: no other array is held in both forms.

    Args:
      params: nested dictionaries of arrays, `StoredArray` for instance.
      sharding: of an array by its path, a `QuantizedTensor` of them for one; None is the first device for all.
      dtype: by path, of float arrays; None leaves them as they are.
      quantize: gives the array at a path in its final form, quantised or as it is.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed: dict[str, Any] = {}
    for path, array in flatten(params).items():
        if dtype is not None and not isinstance(array, QuantizedTensor):
            array = cast(array, dtype(path))
        where = jax.tree.map(lambda _: one, array) if sharding is None else sharding(path, array)
        placed[path] = jax.tree.map(place, array, where)
        if quantize is not None:
            placed[path] = quantize(path, placed[path])
    return unflatten(placed)
