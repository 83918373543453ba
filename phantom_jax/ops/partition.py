"""Which axes of the mesh split an array, for code that the compiler cannot split by itself."""

import math

import jax
import jax.numpy as jnp

ROWS = ("data", "fsdp")
HEADS = "tensor"
TOKENS = "seq"


def free_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that is set, without those over which this code is split by hand already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.axis_names if name not in mesh.manual_axes}


def size(name: str) -> int:
    """Of a free axis; 1 where there is none."""
    return free_axes().get(name, 1)


def row_axes(rows: int) -> tuple[str, ...]:
    """The free axes over which so many rows are split: all of `ROWS` whose product divides them, or the first alone."""
    free = free_axes()
    for names in (ROWS, ROWS[:1]):
        names = tuple(name for name in names if name in free)
        if rows % math.prod(free[name] for name in names) == 0:
            return names
    return ()


def head_axis(heads: int) -> str | None:
    """The free axis over which so many query heads are split."""
    return HEADS if size(HEADS) > 1 and heads % size(HEADS) == 0 else None


def divisible_heads(x_BSKH: jax.Array, heads: int) -> jax.Array:
    """Keys or values, repeated until their heads divide over `HEADS`; each is beside the query heads it serves.

    Args:
      x_BSKH: keys or values.
      heads: number of query heads.
    """
    if head_axis(heads) is None:
        return x_BSKH
    kv_heads = x_BSKH.shape[2]
    repeats = math.lcm(kv_heads, size(HEADS)) // kv_heads
    return x_BSKH if repeats == 1 else jnp.repeat(x_BSKH, repeats, axis=2)
