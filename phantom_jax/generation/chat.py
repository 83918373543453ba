"""A conversation with a model: its turns, their images, and how much of them the context holds."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

from absl import logging

from phantom_jax.data import tiles
from phantom_jax.data.conversation import IMAGE_MARK
from phantom_jax.data.stop_strings import check_stops
from phantom_jax.errors import InputError
from phantom_jax.generation.engine import MAX_NEW_TOKENS
from phantom_jax.generation.settings import Settings


@dataclasses.dataclass(frozen=True)
class Attachment:
    """An image of a turn.

    Attributes:
      name: the path that was given.
      data: the encoded bytes: what happens to the file later does not change the conversation.
      size: width and height in pixels.
      tiles: how many the processor makes of it.
    """

    name: str
    data: bytes
    size: tuple[int, int]
    tiles: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question as the model reads it, with a mark for each of its images, and what was answered."""

    question: str
    answer: str
    images: tuple[Attachment, ...]


class Conversation:
    """Questions and answers that build on one another.

    Attributes:
      turns: what is remembered, oldest first.
      attached: images of the next question.
    """

    def __init__(self, handle: Any, *, notify: Callable[[str], None] = logging.info, **settings: Any):
        """
        Args:
          handle: what `phantom_jax.load` gives.
          notify: is told when turns are forgotten.
          settings: fields of `Settings`.

        Raises:
          InputError: a setting is wrong, or answers with it cannot be streamed.
        """
        checked = Settings.of(settings)
        checked.check_streamable()
        self.turns: list[Turn] = []
        self.attached: list[Attachment] = []
        self._handle, self._notify, self._settings = handle, notify, settings
        context = handle.processor.max_length
        check_stops(checked.stop, handle.processor.tokenizer)
        if checked.least_new_tokens >= context:
            raise InputError(
                f"answers of {checked.least_new_tokens} new tokens leave nothing of the context's {context} for a "
                "question: ask for fewer"
            )
        self._reserve = checked.max_new_tokens or max(checked.min_new_tokens, min(MAX_NEW_TOKENS, context // 4))

    def attach(self, path: str | os.PathLike) -> Attachment:
        """Adds an image to the next question.

        Raises:
          InputError: it cannot be read, is no image, is damaged, or does not fit the context with those before it.
        """
        name = os.fspath(path)
        if not os.path.isfile(path):  # a pipe would be waited for
            raise InputError(f"there is no image file {name!r}: check the path")
        size = tiles.image_size(path, name)
        data = pathlib.Path(path).read_bytes()
        image = Attachment(name, data, size, len(self._handle.processor.encode_image(data, name)))
        attached = [*self.attached, image]
        self._length([], IMAGE_MARK * len(attached), attached, name=f"a question about {name}")
        self.attached = attached
        return image

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer, piece by piece. It is remembered when it has ended.

        Where the generator is closed or interrupted early, what was said so far counts as the answer; where that is
        nothing, the question counts as not asked. After an error it does not count either, and nothing is forgotten.

        The oldest turns are forgotten, with their images, where the question and a reserve for its answer would not
        fit the context with them. The reserve is `max_new_tokens` where it is set.

        Args:
          text: `<image>` says where an attached image stands; without it, images come first.

        Raises:
          InputError: the marks do not fit the attached images, or the question alone does not fit the context.
        """
        question = self._with_marks(text)
        forgotten = self._overflow(question)
        return self._answer(question, tuple(self.attached), self.turns[forgotten:], forgotten)

    def reset(self) -> None:
        """Forgets everything, attached images too."""
        self.turns, self.attached = [], []

    def _answer(
        self, question: str, images: tuple[Attachment, ...], kept: list[Turn], forgotten: int
    ) -> Generator[str, None, None]:
        said: list[str] = []

        def remember():
            self.turns = [*kept, Turn(question, "".join(said), images)]
            self.attached = []

        pieces = self._handle.stream(
            question,
            images=[image.data for image in _images(kept, images)],
            history=[(turn.question, turn.answer) for turn in kept],
            **self._settings,
        )
        try:
            for piece in pieces:
                if forgotten and not said:
                    what = "oldest turn was" if forgotten == 1 else f"{forgotten} oldest turns were"
                    context = self._handle.processor.max_length
                    self._notify(f"the context of {context} tokens is full: the {what} forgotten")
                said.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if "".join(said):
                remember()
            raise
        remember()

    def _with_marks(self, text: str) -> str:
        marks, count = text.count(IMAGE_MARK), len(self.attached)
        if marks and marks != count:
            raise InputError(
                f"the question has {marks} {IMAGE_MARK} marks, and {count} images are attached: write one for each "
                "image, or none"
            )
        if marks or not count:
            return text
        return IMAGE_MARK * count + self._handle.processor.template.after_image + text

    def _overflow(self, question: str) -> int:
        """How many of the oldest turns must go."""
        for count in range(len(self.turns)):
            try:
                length = self._length(self.turns[count:], question, self.attached)
            except InputError:
                continue
            if length + self._reserve <= self._handle.processor.max_length:
                return count
        self._length([], question, self.attached)
        return len(self.turns)

    def _length(self, kept: list[Turn], question: str, images: Iterable[Attachment], name: str = "the question") -> int:
        """Tokens of the prompt; an InputError where the context does not hold them."""
        turns = [*((turn.question, turn.answer) for turn in kept), (question, None)]
        counts = [image.tiles for image in _images(kept, images)]
        return len(self._handle.processor.encode_conversation(turns, counts, name=name).token_ids)


def _images(kept: list[Turn], images: Iterable[Attachment]) -> list[Attachment]:
    return [*(image for turn in kept for image in turn.images), *images]
