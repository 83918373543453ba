"""Who sees whom in a row: structure, never a mask array."""

import dataclasses
import functools

import jax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["positions", "segment_ids", "branch_ids"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Structure:
    """Where tokens stand. A query sees a key of its own segment at no later position, in branch 0 or its own branch.

    Attributes:
      positions: [B, L] int32 within one conversation.
      segment_ids: [B, L] int32, 0 is padding and sees and is seen by nothing.
      branch_ids: [B, L] int32, 0 is the prefix shared by the segment's branches.
    """

    positions: jax.Array
    segment_ids: jax.Array
    branch_ids: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.positions.shape


def visible(query: Structure, key: Structure) -> jax.Array:
    """bool [B, L, S]: which query sees which key."""
    same_segment = (query.segment_ids[:, :, None] == key.segment_ids[:, None, :]) & (key.segment_ids > 0)[:, None, :]
    not_later = key.positions[:, None, :] <= query.positions[:, :, None]
    branch = key.branch_ids[:, None, :]
    return same_segment & not_later & ((branch == 0) | (branch == query.branch_ids[:, :, None]))
