"""Files of prompts: read, and checked to the last line before anything is answered."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from phantom_jax.data import tiles
from phantom_jax.data.conversation import IMAGE_MARK
from phantom_jax.errors import InputError
from phantom_jax.generation.settings import Settings
from phantom_jax.processor import Processor

_SHOWN = 10
_IDS = ("question_id", "id")
_TEXTS = ("prompt", "question", "text")
_IMAGES = ("image", "images")


@dataclasses.dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file.

    Attributes:
      line: its number, from 1.
      question_id: as the file has it; by default the line number.
      text: the question.
      names: its images as the file names them.
      paths: the files they are, without links, in the image folder.
      sizes: their widths and heights.
    """

    line: int
    question_id: str | int
    text: str
    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


class _Problem(Exception):
    """What is wrong with a line."""


def read_prompts(path: str | os.PathLike, *, image_folder: str | os.PathLike | None = None) -> list[FilePrompt]:
    """Reads a file of prompts. Empty lines are passed over.

    Args:
      path: a `.txt` with a question a line, or a `.jsonl` with an object a line: the question under `prompt`,
        `question` or `text`; its id under `question_id` or `id`; its images under `image`, a path, or `images`, a list
        of paths. Further keys are left alone.
      image_folder: what the paths of images start from and must not leave; by default the folder of the file.

    Raises:
      InputError: the file is of another kind, holds no prompt, or lines of it are wrong; all are checked.
    """
    path = pathlib.Path(path)
    parse = {".jsonl": _parse_object, ".txt": _parse_text}.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"{path} is no file of prompts: give a .jsonl, with an object a line, or a .txt")
    folder = path.parent if image_folder is None else pathlib.Path(image_folder)
    if not folder.is_dir():
        raise InputError(f"there is no image folder {str(folder)!r}: give the one that the images' paths start from")
    images = _Images(folder)
    prompts: list[FilePrompt] = []
    first_line: dict[str, int] = {}
    problems: list[str] = []
    # Lines end with a line feed alone: other characters that end lines may stand in a JSON string.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = parse(line, number, images)
            before = first_line.setdefault(str(prompt.question_id), number)
            if before != number:
                raise _Problem(f"question id {prompt.question_id!r} stands in line {before} already")
            prompts.append(prompt)
        except _Problem as problem:
            problems.append(f"line {number}: {problem}")
    _refuse(problems, path)
    if not prompts:
        raise InputError(f"{path} holds no prompts: write one a line")
    return prompts


def check_lengths(
    prompts: list[FilePrompt], processor: Processor, settings: Settings, *, path: str | os.PathLike
) -> None:
    """Refuses prompts that the context does not hold together with the shortest answer that was asked for.

    Args:
      prompts: as `read_prompts` gives them.
      processor: of the model that is to answer.
      settings: `max_new_tokens` counts where it is set.
      path: of the file, for the error.

    Raises:
      InputError: some are too long; all are checked.
    """
    problems = []
    room = settings.least_new_tokens
    for prompt in prompts:
        counts = [processor.tile_count(*size) for size in prompt.sizes]
        try:
            encoded = processor.encode_conversation([(prompt.text, None)], counts)
        except InputError as error:
            problems.append(f"line {prompt.line}: {error}")
            continue
        length = len(encoded.token_ids)
        if length + room > processor.max_length:
            problems.append(
                f"line {prompt.line}: a prompt of {length} tokens leaves {processor.max_length - length} of the "
                f"context's {processor.max_length} for the answer, which needs {room}"
            )
    _refuse(problems, path)


def _refuse(problems: list[str], path: str | os.PathLike) -> None:
    if problems:
        more = len(problems) - _SHOWN
        lines = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise InputError("\n  ".join([f"{os.fspath(path)} cannot be answered as it is, correct it first:", *lines]))


class _Images:
    """Finds images in a folder; each file is looked at once."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder.resolve()
        self._found: dict[str, tuple[str, tuple[int, int]]] = {}

    def find(self, name: Any) -> tuple[str, tuple[int, int]]:
        """Path and size of an image."""
        if not isinstance(name, str) or not name:
            raise _Problem(f"an image is {name!r}: write its path")
        if name not in self._found:
            self._found[name] = self._look(name)
        return self._found[name]

    def _look(self, name: str) -> tuple[str, tuple[int, int]]:
        pure = pathlib.PurePath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise _Problem(f"image {name!r}: write a path inside the image folder, without '..'")
        try:
            path = (self._folder / pure).resolve()
        # A loop of links is a RuntimeError, half a surrogate pair a ValueError.
        except (OSError, RuntimeError, ValueError) as error:
            raise _Problem(f"image {name!r} is no path: {error}") from error
        if not path.is_relative_to(self._folder):
            raise _Problem(f"image {name!r} is a link that leaves the image folder")
        if not os.path.isfile(path):
            raise _Problem(f"image {name!r} is missing in the image folder {str(self._folder)!r}")
        try:
            return str(path), tiles.image_size(path, name)
        except InputError as error:
            raise _Problem(str(error)) from error


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _Problem(f"not UTF-8 ({error.reason} at byte {error.start})") from error


def _parse_text(line: bytes, number: int, images: _Images) -> FilePrompt:
    return _checked(FilePrompt(number, number, _decode(line).strip()))


def _parse_object(line: bytes, number: int, images: _Images) -> FilePrompt:
    try:
        content = json.loads(_decode(line))
    # Nesting without end is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise _Problem(f"not JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise _Problem(f"{type(content).__name__} where an object {{...}} is needed")
    question_id = next((content[key] for key in _IDS if content.get(key) is not None), number)
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise _Problem(f"question id {question_id!r} is neither a string nor a whole number")
    text = _only(content, _TEXTS)
    if text is None:
        raise _Problem(f"no question: write it under {', '.join(map(repr, _TEXTS[:-1]))} or {_TEXTS[-1]!r}")
    if not isinstance(text, str) or not text.strip():
        raise _Problem(f"the question is {text!r}: write some text")
    names = _only(content, _IMAGES)
    names = [] if names is None else names if isinstance(names, list) else [names]
    found = [images.find(name) for name in names]
    return _checked(
        FilePrompt(
            number,
            question_id,
            text,
            names=tuple(names),
            paths=tuple(path for path, _ in found),
            sizes=tuple(size for _, size in found),
        )
    )


def _only(content: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value under the one of these keys that is there; None where none is."""
    present = [key for key in keys if content.get(key) is not None]
    if len(present) > 1:
        raise _Problem(f"both {present[0]!r} and {present[1]!r}: leave one of them")
    return content[present[0]] if present else None


def _checked(prompt: FilePrompt) -> FilePrompt:
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise _Problem("the question holds half of a surrogate pair") from error
    marks = prompt.text.count(IMAGE_MARK)
    if marks and marks != len(prompt.paths):
        raise _Problem(f"{marks} {IMAGE_MARK} marks and {len(prompt.paths)} images: write one for each, or none")
    return prompt
