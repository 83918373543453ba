"""The batch: the one structure that data, models, objectives and the training step agree on."""

from typing import Any, TypedDict

IGNORE = -100
"""Target of a token that predicts nothing."""


class Batch(TypedDict, total=False):
    """A batch of rows. Arrays are numpy in the pipeline and jax on the device.

    A row holds one or more segments (conversations on one set of images). A segment is a shared prefix (branch 0)
    followed by branches that each continue the prefix and do not see one another: several questions about one image,
    or the chosen and the rejected answer. A token attends to keys of its own segment whose position is not larger
    than its own and whose branch is 0 or its own; there is never a mask array.

    Attributes:
      token_ids: [B, L] int32.
      positions: [B, L] int32, counted within one conversation; each branch goes on from the end of the prefix.
      segment_ids: [B, L] int32, 0 is padding.
      branch_ids: [B, L] int32, 0 is the shared prefix.
      image_slots: [B, L] int32, -1 for text, else an index into the row's flattened image features [I * P].
      targets: [B, L] int32, the token that this token must predict, `IGNORE` where none. The last prompt token opens
        every branch (the prefix ends before it), so that a target is always the next token of the same row.
      sft_mask: [B, L] bool, targets that count for supervised fine-tuning (never those of a rejected answer).
      answer_slots: [B, L] int32, which scored answer a target belongs to: 0 none, 2k + 1 the chosen and 2k + 2 the
        rejected answer of the row's pair k. Of several turns the last is scored.
      pixels: [B, I, H, W, 3], uint8 tiles in the pipeline, normalised float32 at the model.
      row_ids: [B] int32, which example of the source each row came from.
      pair_ids: [B, pairs, 2] int32, for each pair of answer slots the record of the source and the question in it, -1
        where there is none. Where reference log-probabilities are stored.
      reference_logps: [B, 2 * pairs] float32, sequence log-probabilities under the reference (DPO alone).
      unfolded: [B, C, U] int32, for attention that knows no branches: C rows of U places that hold every conversation
        with a copy of what it shares, as indices into the row's L tokens, -1 for padding. The decoder runs over these,
        and all other fields stay as they are.
    """

    token_ids: Any
    positions: Any
    segment_ids: Any
    branch_ids: Any
    image_slots: Any
    targets: Any
    sft_mask: Any
    answer_slots: Any
    pixels: Any
    row_ids: Any
    pair_ids: Any
    reference_logps: Any
    unfolded: Any
