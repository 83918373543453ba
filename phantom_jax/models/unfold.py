"""Branches for attention that knows none: every conversation gets a copy of what it shares with others.

Only the decoder sees copies. Its input, image features in place, is gathered into rows of their own or into one longer
row of segments, and its output is gathered back, so that labels, objectives and metrics stay those of the shared row.
"""

import jax
import jax.numpy as jnp

from phantom_jax.ops.structure import Structure


def unfold(x_BLD: jax.Array, structure: Structure, index_BCU: jax.Array) -> tuple[jax.Array, Structure]:
    """Embeddings [B * C, U, D] and structure of the copies, without branches.

    Args:
      x_BLD: embeddings of the shared rows.
      structure: [B, L] of the shared rows.
      index_BCU: int32, which of the L tokens stands at a place, -1 for padding; see `phantom_jax.batch.Batch.unfolded`.
    """
    batch, copies, length = index_BCU.shape
    flat = index_BCU.reshape(batch, -1)
    real = flat >= 0
    source = jnp.maximum(flat, 0)
    x = jnp.take_along_axis(x_BLD, source[:, :, None], axis=1)
    positions = jnp.where(real, jnp.take_along_axis(structure.positions, source, axis=1), 0)
    real, positions = (array.reshape(batch * copies, length) for array in (real, positions))
    # Positions count from 0 in each conversation, so every 0 begins one.
    segment_ids = jnp.where(real, jnp.cumsum(real & (positions == 0), axis=1), 0).astype(jnp.int32)
    unfolded = Structure(positions, segment_ids, jnp.zeros_like(positions))
    return x.reshape(batch * copies, length, x.shape[-1]), unfolded


def fold(y_RUD: jax.Array, index_BCU: jax.Array, length: int) -> jax.Array:
    """[B, L, D], what `unfold` copied gathered back; what stands at padding means nothing.

    Of a token's copies the first is taken: they are equal, so gradients are those of the shared row as well.

    Args:
      y_RUD: [B * C, U, D], the decoder's output.
      index_BCU: as in `unfold`.
      length: L.
    """
    batch = index_BCU.shape[0]
    flat = index_BCU.reshape(batch, -1)
    places = flat.shape[1]

    def first_place(index):
        found = jnp.full(length, places - 1, jnp.int32)
        return found.at[jnp.where(index >= 0, index, length)].min(jnp.arange(places, dtype=jnp.int32), mode="drop")

    return jnp.take_along_axis(y_RUD.reshape(batch, places, -1), jax.vmap(first_place)(flat)[:, :, None], axis=1)
