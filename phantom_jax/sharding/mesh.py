"""The mesh: devices in a grid whose axes have names."""

import difflib
import math
from collections.abc import Mapping

import jax
import numpy as np

from phantom_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "seq")
"""`data` splits rows, `fsdp` parameters, `tensor` heads and widths, `seq` tokens of a row."""


def make_mesh(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh over the first devices, with all of `AXES`.

    Args:
      shape: sizes of axes by name; an axis that is not named has size 1.

    Raises:
      InputError: an axis does not exist, or there are fewer devices.
    """
    for name, size in shape.items():
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the axes are {', '.join(AXES)}"
            raise InputError(f"a mesh has no axis {name!r}: {hint}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"mesh axis {name} is {size!r}: set it to a whole number, 1 or more")
    sizes = [shape.get(name, 1) for name in AXES]
    count, devices = math.prod(sizes), jax.devices()
    if count > len(devices):
        wanted = ", ".join(f"{name}:{size}" for name, size in shape.items())
        raise InputError(f"a mesh of {wanted} takes {count} devices, there are {len(devices)}: make it smaller")
    return jax.sharding.Mesh(np.array(devices[:count]).reshape(sizes), AXES)
