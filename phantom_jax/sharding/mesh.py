"""The mesh: devices in a grid whose axes have names."""

import difflib
import math
from collections.abc import Callable, Mapping

import jax
from jax.experimental import mesh_utils

from phantom_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "seq")
"""`data` splits rows, `fsdp` parameters and rows, `tensor` heads and widths, `seq` tokens of a row."""


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
    # In the order of the wires of a TPU's torus, so that neighbours of an axis are neighbours.
    grid = mesh_utils.create_device_mesh(sizes, devices[:count], allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES)


def training_mesh(sizes: Mapping[str, int], say: Callable[[str], None]) -> jax.sharding.Mesh:
    """The mesh of a run: over all devices there are, or over one.

    Args:
      sizes: of all `AXES`; one may be -1, which takes the devices that the others leave.
      say: told where devices stay idle.

    Raises:
      InputError: the sizes do not take all devices.
    """
    count = len(jax.devices())
    sizes = {name: sizes[name] for name in AXES}
    product = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    rest = next((name for name, size in sizes.items() if size == -1), None)
    if rest is not None:
        if count % product:
            raise InputError(
                f"The mesh is {shown}: its other axes take {product} devices, which does not divide the {count} that"
                f" there are. Set them so that their product does, or mesh.{rest} to 1 and the rest to 1 for one"
                " device."
            )
        sizes[rest] = count // product
    elif product == 1 and count > 1:
        if jax.process_count() > 1:
            raise InputError(
                f"The mesh is {shown}, which is one device, and {jax.process_count()} processes have {count}. Set"
                " mesh.fsdp to -1 to train on all of them."
            )
        say(f"the mesh is 1 of {count} devices: set mesh.fsdp to -1 to train on all of them")
    elif product != count:
        raise InputError(
            f"The mesh is {shown}, which takes {product} devices, and there are {count}. Set one axis to -1, or all so"
            f" that their product is {count}."
        )
    return make_mesh(sizes)
