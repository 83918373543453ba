"""Which axes of the mesh split an array, for code that the compiler cannot split by itself."""

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
    """The free axes over which so many rows are split: those whose product divides them, in the mesh's order."""
    axes, parts = [], 1
    for name, count in free_axes().items():
        if name in ROWS and rows % (parts * count) == 0:
            axes.append(name)
            parts *= count
    return tuple(axes)


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
    kv_heads, parts = x_BSKH.shape[2], size(HEADS)
    repeats = next(r for r in range(1, heads + 1) if kv_heads * r % parts == 0 and heads % (kv_heads * r) == 0)
    return x_BSKH if repeats == 1 else jnp.repeat(x_BSKH, repeats, axis=2)
