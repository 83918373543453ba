"""Files of answers, one for each prompt of a file: written batch by batch, and gone on with after a kill."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import tqdm

from phantom_jax.errors import InputError
from phantom_jax.generation.prompt_file import FilePrompt
from phantom_jax.generation.settings import Settings

# From each of these places in a large file so many bytes tell one set of weights from another.
_SAMPLES, _SAMPLE_BYTES = 16, 2**16
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "params/**/*")
_SECONDS_BETWEEN_LINES = 30.0


class AnswerFile:
    """A file of answers to the prompts of a file, in their order, as far as they were given.

    A line is an object with LLaVA's fields: `question_id`, `prompt`, `text` (the answer; a list where several were
    asked for), `answer_id`, `model_id` (the model folder's name) and `metadata`: every setting, the images, and a
    digest of the model folder.

    Attributes:
      path: of the file.
      prompts: all that are to be answered.
      done: how many of them are.
      cut: bytes of a half line that a kill had left at the end.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        prompts: Sequence[FilePrompt],
        *,
        model: str | os.PathLike,
        settings: Settings,
        options: Mapping[str, Any],
    ):
        """Opens the file, or makes it. It is this process's alone until `close`.

        Args:
          path: of the file.
          prompts: what is to be answered.
          model: the model's folder.
          settings: of the generation.
          options: how the model is loaded, as far as that changes answers.

        Raises:
          InputError: another process writes to the file, or it does not hold answers to these prompts by this model
            with these settings. Nothing was changed then.
        """
        self.path, self.prompts = pathlib.Path(path), prompts
        self._folder = pathlib.Path(model)
        self._model_id, self._digest = self._folder.resolve().name, folder_digest(self._folder)
        # Through JSON, so that what is compared with a file's content has its types.
        self._settings = json.loads(json.dumps({**_as_dict(settings), **options}))
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"output {self.path} is no file that can be gone on with. Set --output to a .jsonl file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._made = not self.path.exists()
        self._file = self.path.open("ab+")
        try:
            self._lock()
            self._file.seek(0)
            *lines, half = self._file.read().split(b"\n")
            self._check(lines, half)
        except BaseException:
            self.close()
            raise
        self.done, self.cut = len(lines), len(half)
        self._keep = self._file.tell() - len(half)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Gives the file free; one that was made here and got no answer is removed."""
        if self._made and self._file.seek(0, os.SEEK_END) == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def write(self, answers: Sequence[str] | Sequence[list[str]]) -> None:
        """Adds the answers to the next prompts; the first call cuts off the half line."""
        self._file.truncate(self._keep)
        prompts = self.prompts[self.done : self.done + len(answers)]
        lines = [json.dumps(self._line(prompt, answer)) + "\n" for prompt, answer in zip(prompts, answers, strict=True)]
        self._file.write("".join(lines).encode())
        self._file.flush()
        self._keep = self._file.tell()
        self.done += len(answers)

    def _line(self, prompt: FilePrompt, answer: str | list[str]) -> dict[str, Any]:
        metadata = {"settings": self._settings, "images": list(prompt.names), "model": self._digest}
        known = {"question_id": prompt.question_id, "prompt": prompt.text, "text": answer}
        told = json.dumps([known, self._model_id, metadata])
        answer_id = hashlib.sha256(told.encode()).hexdigest()[:16]
        return {**known, "answer_id": answer_id, "model_id": self._model_id, "metadata": metadata}

    @staticmethod
    def _opening(prompt: FilePrompt) -> bytes:
        """What the line of a prompt begins with."""
        known = json.dumps({"question_id": prompt.question_id, "prompt": prompt.text})
        return f'{known[:-1]}, "text": '.encode()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"output {self.path} is in use: another process writes answers to it. Wait for it, stop it, or set "
                "--output to another file."
            ) from error

    def _check(self, lines: Sequence[bytes], half: bytes) -> None:
        if len(lines) > len(self.prompts):
            raise self._refusal(f"it holds {len(lines)} answers, to {len(self.prompts)} prompts")
        if half:
            opening = self._opening(self.prompts[len(lines)]) if len(lines) < len(self.prompts) else b"\n"
            if _is_json(half):
                # Whole but for its end: it is ours, or somebody's.
                lines = [*lines, half]
            elif not (half.startswith(opening) or opening.startswith(half)):
                raise self._refusal(f"its line {len(lines) + 1} is not an answer")
        for number, (line, prompt) in enumerate(zip(lines, self.prompts, strict=False), 1):
            try:
                theirs = json.loads(line)
                ours = self._line(prompt, theirs["text"])
                models = [(row["model_id"], row["metadata"]["model"]) for row in (theirs, ours)]
                settings = [dict(row["metadata"]["settings"]) for row in (theirs, ours)]
                questions = [
                    {key: row[key] for key in ("question_id", "prompt")} | {"images": row["metadata"]["images"]}
                    for row in (theirs, ours)
                ]
            except (ValueError, RecursionError, LookupError, TypeError) as error:
                raise self._refusal(f"its line {number} is not an answer") from error
            if models[0] != models[1]:
                other = f"model {models[0][0]!r}" if models[0][0] != models[1][0] else "a model of this name"
                raise self._refusal(f"its line {number} is of {other} with other contents than {self._folder}")
            for what, (before, now) in (("settings", settings), ("questions", questions)):
                differing = [
                    f"{key} {_short(before.get(key))} -> {_short(now.get(key))}"
                    for key in sorted({*before, *now})
                    if before.get(key) != now.get(key)
                ]
                if differing:
                    raise self._refusal(f"its line {number} has other {what}, theirs -> yours: {', '.join(differing)}")

    def _refusal(self, what: str) -> InputError:
        return InputError(f"output {self.path} is kept as it is: {what}. Set --output to another file.")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def answer_prompts(handle: Any, answers: AnswerFile, *, batch_size: int, settings: Mapping[str, Any]) -> None:
    """Answers all prompts that are not answered yet, with a progress bar on standard error.

    Args:
      handle: what `phantom_jax.load` gives.
      answers: the file that they go to.
      batch_size: prompts answered at once. Batches begin at multiples of it, also after a kill, so that the batches
        are those of a run that was not killed.
      settings: fields of `Settings`, those that `answers` was made with.
    """
    total = len(answers.prompts)
    if answers.done == total:
        return
    progress = _Bar if sys.stderr.isatty() else _Lines
    with progress(total, answers.done) as shown:
        for start in range(answers.done - answers.done % batch_size, total, batch_size):
            batch = answers.prompts[start : start + batch_size]
            texts = handle.generate(
                [prompt.text for prompt in batch],
                images=[list(prompt.paths) for prompt in batch],
                batch_size=batch_size,
                **settings,
            )
            answers.write(texts[answers.done - start :])
            shown.update(answers.done)


def folder_digest(folder: pathlib.Path) -> str:
    """Tells models apart by the names and sizes of their folder's files, and samples of their contents.

    Only what makes up a model counts, so that answers may be written beside it.

    Raises:
      InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no model folder {str(folder)!r}")
    digest = hashlib.sha256()
    files = [path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(json.dumps([path.relative_to(folder).as_posix(), size]).encode())
        with path.open("rb") as file:
            _sample(file, size, digest.update)
    return digest.hexdigest()[:16]


def _sample(file: BinaryIO, size: int, update: Any) -> None:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        update(file.read())
        return
    for number in range(_SAMPLES):
        file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
        update(file.read(_SAMPLE_BYTES))


def _as_dict(settings: Settings) -> dict[str, Any]:
    stop = [settings.stop] if isinstance(settings.stop, str) else list(settings.stop)
    return {**dataclasses.asdict(settings), "stop": stop}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Bar:
    """A progress bar."""

    def __init__(self, total: int, done: int):
        self._bar = tqdm.tqdm(total=total, initial=done, unit="prompt", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()

    def update(self, done: int) -> None:
        self._bar.update(done - self._bar.n)


class _Lines:
    """A line every so often, for logs."""

    def __init__(self, total: int, done: int):
        self._total, self._before, self._start, self._last = total, done, time.monotonic(), -math.inf

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and done < self._total:
            return
        self._last = now
        seconds = (now - self._start) / (done - self._before)
        rest = tqdm.tqdm.format_interval(seconds * (self._total - done))
        left = f", about {rest} left" if done < self._total else ""
        print(f"answered {done:,} of {self._total:,} prompts{left}", file=sys.stderr, flush=True)
