"""The parameters of a model, from where they lie to devices, one array after another."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

from phantom_jax.checkpoints.arrays import cast
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.sharding.placement import place, quantized_shardings
from phantom_jax.trees import flatten, unflatten


def place_parameters(
    params: Mapping[str, Any],
    shardings: Mapping[str, Sharding] | None = None,
    *,
    dtype: Callable[[str], Any] | None = None,
    quantize: Callable[[str, Any], Any] | None = None,
) -> dict[str, Any]:
    """Parameters on devices. What is quantised is so as soon as it is there: no other array is held in both forms.

    Args:
      params: nested dictionaries of arrays, `StoredArray` for instance.
      shardings: by path; an array without one goes to the first device.
      dtype: by path, of float arrays; None leaves them as they are.
      quantize: gives the array at a path in its final form, quantised or as it is.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = shardings or {}
    placed: dict[str, Any] = {}
    for path, array in flatten(params).items():
        sharding = shardings.get(path, one)
        if isinstance(array, QuantizedTensor):
            split = isinstance(sharding, NamedSharding)
            fields = quantized_shardings(array, sharding) if split else jax.tree.map(lambda _: one, array)
            placed[path] = jax.tree.map(place, array, fields)
        else:
            placed[path] = place(array if dtype is None else cast(array, dtype(path)), sharding)
        if quantize is not None:
            placed[path] = quantize(path, placed[path])
    return unflatten(placed)
