"""One row of a batch: conversations about some images, packed side by side, and how large it can get.

Prompt and image are most of a row, so whatever conversations share is there once: the chosen and the rejected answer to
a question are branches after one prompt, and questions about one image are branches after it. Where the model's
attention knows no branches, a row also says how its tokens make up each conversation by itself (`unfolded`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from phantom_jax.batch import IGNORE
from phantom_jax.data import conversation, tiles
from phantom_jax.data.sources import Question, Record
from phantom_jax.errors import InputError
from phantom_jax.processor import Processor

Asking = tuple[int, Record, Sequence[Question]]
"""A record with its index in the source, and which of its questions are asked."""


class Bound(NamedTuple):
    """The most tokens that some questions take.

    Attributes:
      shared: in a row, where what is shared stands once.
      apart: of all their conversations together, each whole.
      longest: of one conversation.
    """

    shared: int
    apart: int
    longest: int

    def rounded_up(self, multiple: int) -> "Bound":
        """To multiples of a number."""
        return Bound(*(-(-tokens // multiple) * multiple for tokens in self))


@dataclasses.dataclass(frozen=True)
class RowStructure:
    """What a model's attention tells apart within a row.

    Attributes:
      branches: whether it knows branches; where not, rows have no `branch_ids`.
      segments: whether it knows segments.
    """

    branches: bool = True
    segments: bool = True

    def unfolded(self, images: int, conversations: int, bound: Bound) -> tuple[int, int] | None:
        """The shape (C, U) of a row's `unfolded`, None where there is nothing to take apart.

        Args:
          images: most segments of a row.
          conversations: most conversations of a row.
          bound: most tokens of a row.
        """
        if conversations == 1 or (self.segments and (self.branches or conversations == images)):
            return None
        return (1, bound.apart) if self.segments else (conversations, bound.longest)


KNOWS_ALL = RowStructure()


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of rows.

    Attributes:
      length: tokens L.
      tiles: tiles I.
      pairs: how many pairs of `pair_ids`; with 0 the row has none.
      structure: what the model's attention tells apart.
      unfolded: (C, U) of `unfolded`; None where the row has none.
    """

    length: int
    tiles: int
    pairs: int = 0
    structure: RowStructure = KNOWS_ALL
    unfolded: tuple[int, int] | None = None


def count_tiles(record: Record, processor: Processor) -> int:
    """How many tiles a record's image has, from its header alone."""
    width, height = tiles.image_size(record.image, record.id)
    return processor.tile_count(width, height)


def length_bound(processor: Processor, *, rejected: bool) -> Callable[[Record, Sequence[Question], int, int], Bound]:
    """Makes (record, questions, tiles, count) -> most tokens that `count` of these questions take.

    Raises the error of a conversation that is longer than the context. What a question and its answers come to is
    counted once, with an image of a single token: a whole data set takes a second or two.
    """

    @functools.lru_cache(maxsize=2**16)
    def encode(question: str, answer: str | None) -> conversation.Conversation:
        return conversation.encode([(question, answer)], [1], processor.template, processor.encoder)

    @functools.lru_cache(maxsize=2**16)
    def measure(question: str, answers: tuple[str, ...]) -> tuple[int, int, tuple[int, ...]]:
        """What all questions on the image share, what the answers share, and the length with each answer."""
        encoded = [encode(question, answer) for answer in answers]
        fork = conversation.shared_length(encoded)
        return encoded[0].prefix_length, fork, tuple(len(one.token_ids) for one in encoded)

    def bound(record: Record, questions: Sequence[Question], tile_count: int, count: int) -> Bound:
        more = tile_count * processor.tokens_per_tile - 1
        measured = [
            measure(question.question, (question.chosen, *_rejected(record, question, rejected)))
            for question in questions
        ]
        for question, (_, _, ends) in zip(questions, measured, strict=True):
            if max(ends) + more > processor.max_length:
                _segment(record, [question], tile_count, processor, rejected)
        # The final end marker of a conversation is only ever a target.
        whole = sorted(sum(end + more - 1 for end in ends) for _, _, ends in measured)
        longest = max(max(ends) + more - 1 for _, _, ends in measured)
        return Bound(bound_shared(questions, measured, more, count), sum(whole[-count:]), longest)

    def bound_shared(questions, measured, more, count) -> int:
        if count == 1:
            # The two answers of a single question share all of the prompt.
            return max(fork + more - 1 + sum(end - fork for end in ends) for _, fork, ends in measured)
        shared = min(prefix for prefix, _, _ in measured) + more
        if any(conversation.IMAGE_MARK in question.question for question in questions):
            # Where a mark puts the image into the question, it may be that not even the image is shared.
            shared = conversation.shared_length([encode(question.question, None) for question in questions])
        return shared - 1 + sum(sorted(sum(end + more - shared for end in ends) for _, _, ends in measured)[-count:])

    return bound


def build_row(
    asking: Sequence[Asking], processor: Processor, shape: RowShape, *, rejected: bool
) -> dict[str, np.ndarray]:
    """Packs records and their questions into one row: the fields of a `Batch` without the axis B.

    Args:
      asking: at most as much as `shape` holds; nothing gives a padding row, with `row_ids` -1.
      processor: tokenizer, template and tiling.
      shape: of the row.
      rejected: whether the wrong answers come too.
    """
    length, size = shape.length, processor.tile_size
    row = {
        "token_ids": np.full(length, processor.pad_id, np.int32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
        "branch_ids": np.zeros(length, np.int32),
        "image_slots": np.full(length, -1, np.int32),
        "targets": np.full(length, IGNORE, np.int32),
        "sft_mask": np.zeros(length, bool),
        "answer_slots": np.zeros(length, np.int32),
        "pixels": np.zeros((shape.tiles, size, size, 3), np.uint8),
        "row_ids": np.int32(asking[0][0] if asking else -1),
    }
    if shape.pairs:
        row["pair_ids"] = np.full((shape.pairs, 2), -1, np.int32)
    token = tile = pair = 0
    for number, (index, record, questions) in enumerate(asking, start=1):
        cut = processor.encode_image(record.image, record.id)
        segment = _segment(record, questions, len(cut), processor, rejected)
        part = slice(token, token + len(segment))
        for field in dataclasses.fields(segment):
            row[field.name][part] = getattr(segment, field.name)
        row["segment_ids"][part] = number
        row["image_slots"][part] += np.where(segment.image_slots >= 0, tile * processor.tokens_per_tile, 0)
        row["answer_slots"][part] += np.where(segment.answer_slots > 0, 2 * pair, 0)
        row["pixels"][tile : tile + len(cut)] = cut
        if shape.pairs:
            asked = [(index, record.questions.index(question)) for question in questions]
            row["pair_ids"][pair : pair + len(questions)] = asked
        token, tile, pair = token + len(segment), tile + len(cut), pair + len(questions)
        if segment.token_ids[0] != row["token_ids"][0] or segment.image_slots[0] != -1:
            # The phantom dimension reads the states of the first token, and one set of them serves the whole row.
            raise InputError(
                f"{record.id} begins with token {segment.token_ids[0]}, its row with {row['token_ids'][0]}. The "
                "conversations of a row must begin with the same text token: set images_per_row to 1, or take a "
                "template that opens every conversation alike."
            )
    if shape.unfolded is not None:
        row["unfolded"] = unfolded_index(row["segment_ids"], row["branch_ids"], shape.unfolded)
    if not shape.structure.branches:
        del row["branch_ids"]
    return row


def unfolded_index(segment_ids: np.ndarray, branch_ids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[C, U] int32 indices of the tokens of each conversation of a row, -1 for padding.

    Args:
      segment_ids, branch_ids: [L] of the row.
      shape: (C, U). With a C of 1 the conversations stand side by side in one row, otherwise each in a row of its own.
    """
    index, start = np.full(shape, -1, np.int32), 0
    answers = np.unique(np.stack([segment_ids, branch_ids], axis=1)[branch_ids > 0], axis=0)
    for number, (segment, branch) in enumerate(answers):
        own = np.flatnonzero((segment_ids == segment) & ((branch_ids == 0) | (branch_ids == branch)))
        index[0 if shape[0] == 1 else number, start : start + len(own)] = own
        start += len(own) if shape[0] == 1 else 0
    return index


def _rejected(record: Record, question: Question, wanted: bool) -> list[str]:
    if not wanted or not question.rejected:
        return []
    if question.rejected == question.chosen:
        raise InputError(
            f"{record.id} has {question.chosen!r} both as the chosen and as the rejected answer to "
            f"{question.question!r}. Correct one of them, or leave the rejected one empty."
        )
    return [question.rejected]


def _segment(
    record: Record, questions: Sequence[Question], tile_count: int, processor: Processor, rejected: bool
) -> conversation.Segment:
    def encode(question: Question, answer: str) -> conversation.Conversation:
        return processor.encode_conversation([(question.question, answer)], [tile_count], name=record.id)

    return conversation.lay_out(
        [
            (
                encode(question, question.chosen),
                *(encode(question, wrong) for wrong in _rejected(record, question, rejected)),
            )
            for question in questions
        ]
    )
