"""Conversations as tokens: templates, label masks built turn by turn, and branches that share a prefix.

Each piece of a conversation (a marker, a question, an answer) is tokenised on its own, so that what is supervised is
known by construction and a prompt has the same tokens whether an answer follows it or not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from phantom_jax.batch import IGNORE
from phantom_jax.errors import InputError

IMAGE_MARK = "<image>"
"""Where an image stands in a user's text. Without any mark all images come before the first question."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around a conversation's turns, as data.

    A conversation reads: system, then for each turn user + question + assistant + answer + answer_end + turn_end.
    """

    user: str
    """Before the user's text."""
    assistant: str
    """After the user's text, up to where the answer begins."""
    answer_end: str
    """One special token. Supervised with the answer; generation stops at it."""
    image_token: str
    """One special token, repeated for every feature of an image."""
    image_begin: str = ""
    image_end: str = ""
    after_image: str = ""
    """Between the images and the first question, where no mark says where they stand."""
    system: str = ""
    turn_end: str = ""
    """After an answer's end, not supervised."""


_MARKS = {"image_begin": "<img>", "image_token": "<IMG_CONTEXT>", "image_end": "</img>"}

_CHATML = Template(
    user="<|im_start|>user\n", assistant="<|im_end|><|im_start|>assistant\n", answer_end="<|im_end|>", **_MARKS
)

TEMPLATES = {
    "qwen2": _CHATML,
    "internlm2": _CHATML,
    "phi3": Template(user="<|user|>\n", assistant="<|end|><|assistant|>\n", answer_end="<|end|>", **_MARKS),
}
"""Those of the Phantoms, by their language model. None has a system turn."""

Turn = tuple[str, str | None]
"""A question and its answer; None where the model is to answer."""


class Tokenize(Protocol):
    """Ids of a piece of text. Only in markup do special tokens count as such: a user cannot write them."""

    def __call__(self, text: str, markup: bool = False) -> Sequence[int]: ...


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One conversation in tokens, all arrays [n]."""

    token_ids: np.ndarray
    image_slots: np.ndarray
    """-1 for text, else which feature of the images this token stands for."""
    supervised: np.ndarray
    """Whether the token belongs to an answer or is the end marker of one."""
    answer_start: int
    """Index of the last answer's first token; the length if it is yet to come."""


def encode(
    turns: Sequence[Turn], features: Sequence[int], template: Template, tokenize: Tokenize, *, name: str = "the prompt"
) -> Conversation:
    """Turns a conversation into tokens.

    Args:
      turns: questions and answers; only the last answer may be None.
      features: for each image how many tokens it has.
      template: the text around the turns.
      tokenize: see `Tokenize`.
      name: what to call the conversation in an error.

    Raises:
      InputError: the number of `<image>` marks is neither zero nor the number of images.
    """
    marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
    if marks and marks != len(features):
        kind = "more" if marks > len(features) else "fewer"
        raise InputError(
            f"{name} has {kind} {IMAGE_MARK} marks than images ({marks} marks, {len(features)} images). "
            f"Write one {IMAGE_MARK} for each image, or none to put all of them first."
        )
    ids: list[int] = []
    slots: list[int] = []
    supervised: list[bool] = []
    first_slot = [0, *np.cumsum(features, dtype=int).tolist()]
    image_id = tokenize(template.image_token, markup=True)[0]

    def add(text: str, *, markup: bool = True, answer: bool = False):
        piece = tokenize(text, markup=markup) if text else ()
        ids.extend(piece)
        slots.extend([-1] * len(piece))
        supervised.extend([answer] * len(piece))

    def add_image(index: int):
        add(template.image_begin)
        ids.extend([image_id] * features[index])
        slots.extend(range(first_slot[index], first_slot[index + 1]))
        supervised.extend([False] * features[index])
        add(template.image_end)

    add(template.system)
    placed = answer_start = 0
    for number, (question, answer) in enumerate(turns):
        add(template.user)
        if number == 0 and not marks and features:
            for index in range(len(features)):
                add_image(index)
            add(template.after_image)
        for part, text in enumerate(question.split(IMAGE_MARK)):
            if part:
                add_image(placed)
                placed += 1
            add(text, markup=False)
        add(template.assistant)
        answer_start = len(ids)
        if answer is not None:
            add(answer, markup=False, answer=True)
            add(template.answer_end, answer=True)
            if number + 1 < len(turns):
                add(template.turn_end)
    return Conversation(
        np.array(ids, np.int32), np.array(slots, np.int32), np.array(supervised, bool), answer_start=answer_start
    )


@dataclasses.dataclass(frozen=True)
class Segment:
    """Conversations on the same images, laid out as a shared prefix and branches; fields as in `Batch`, each [n]."""

    token_ids: np.ndarray
    positions: np.ndarray
    branch_ids: np.ndarray
    image_slots: np.ndarray
    targets: np.ndarray
    sft_mask: np.ndarray
    answer_slots: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


def lay_out(pairs: Sequence[Sequence[Conversation]]) -> Segment:
    """Lays out pairs of conversations on the same images: the chosen one and, where there is one, the rejected one.

    What all of them begin with is written once, up to where the first last answer begins; the prefix's last token opens
    every branch. So a single question's chosen and rejected answers share the whole prompt, and several questions
    share the images. The final end marker is only ever a target.

    Args:
      pairs: pair k gets answer slots 2k + 1 (chosen) and 2k + 2 (rejected).
    """
    branches = [
        (conversation, 2 * k + 1 + rejected)
        for k, pair in enumerate(pairs)
        for rejected, conversation in enumerate(pair)
    ]
    # The token before the first difference must stand in every branch: it has several successors.
    opening = max(0, _shared([conversation for conversation, _ in branches]) - 1)
    first = branches[0][0]
    parts = [_part(first, 0, opening, branch=0, slot=0, sft=True)]
    for branch, (conversation, slot) in enumerate(branches, start=1):
        end = len(conversation.token_ids) - 1
        parts.append(_part(conversation, opening, end, branch=branch, slot=slot, sft=slot % 2 == 1))
    return Segment(**{field.name: np.concatenate([part[field.name] for part in parts]) for field in _FIELDS})


_FIELDS = dataclasses.fields(Segment)


def _shared(conversations: Sequence[Conversation]) -> int:
    """Length of the longest common prefix that ends before any last answer."""
    length = min(conversation.answer_start for conversation in conversations)
    first = conversations[0]
    for other in conversations[1:]:
        same = (first.token_ids[:length] == other.token_ids[:length]) & (
            first.image_slots[:length] == other.image_slots[:length]
        )
        length = length if same.all() else int(np.argmin(same))
    return length


def _part(conversation: Conversation, start: int, end: int, *, branch: int, slot: int, sft: bool) -> dict:
    """Tokens start to end (exclusive); the targets are those one further on."""
    following = slice(start + 1, end + 1)
    supervised = conversation.supervised[following]
    scored = supervised & (np.arange(start + 1, end + 1) >= conversation.answer_start)
    count = end - start
    return {
        "token_ids": conversation.token_ids[start:end],
        "positions": np.arange(start, end, dtype=np.int32),
        "branch_ids": np.full(count, branch, np.int32),
        "image_slots": conversation.image_slots[start:end],
        "targets": np.where(supervised, conversation.token_ids[following], IGNORE).astype(np.int32),
        "sft_mask": supervised & sft,
        "answer_slots": np.where(scored, slot, 0).astype(np.int32),
    }
