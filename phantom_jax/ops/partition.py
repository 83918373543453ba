"""How an operation that the compiler cannot split by itself is split over the mesh that is set.

Whoever calls it says how, by a `PartitionSpec` of mesh axes; `models.partitioning.split_of` gives it.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Target = str | tuple[str, ...] | None
"""What splits one axis of an array: a mesh axis, several, or none."""
WHOLE = PartitionSpec(None, None, None)
"""Rows, tokens and heads that nothing splits."""


def mesh_axes(target: Target) -> tuple[str, ...]:
    """The mesh axes of a target."""
    return (target,) if isinstance(target, str) else target or ()


def parts(target: Target) -> int:
    """Into how many parts a target splits."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(target))


def free_axes() -> set[str]:
    """The axes of the mesh over which this code is not split by hand already; empty where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return set() if mesh.empty or mesh.size == 1 else set(mesh.axis_names) - set(mesh.manual_axes)


def repeat_heads(x_BSKH: jax.Array, count: int) -> jax.Array:
    """Keys or values, repeated until so many parts divide their heads: each goes to all whose queries see it."""
    repeats = math.lcm(x_BSKH.shape[2], count) // x_BSKH.shape[2]
    return x_BSKH if repeats == 1 else jnp.repeat(x_BSKH, repeats, axis=2)
