"""Folders that hold a model: recognised by their content, opened without reading, written whole or not at all."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from phantom_jax.checkpoints import hf, native, tensor_report
from phantom_jax.checkpoints.generation_config import generation_config
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.checkpoints.hf_processor import load_processor
from phantom_jax.checkpoints.model_card import model_card
from phantom_jax.checkpoints.parents import read_vision_tower
from phantom_jax.checkpoints.published_processor import save_published
from phantom_jax.checkpoints.weights import open_tensors
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json, write_json
from phantom_jax.layouts import MODEL_LAYOUTS, check_name
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.processor import Processor

REPORT = "conversion_report.tsv"

_GENERATION = "generation_config.json"
_ADAPTERS = ("phantom_jax_adapter.json", "adapter_config.json")
_LOCK = ".lock"


def read(
    path: str | os.PathLike[str],
    *,
    template: str | None = None,
    scratch: pathlib.Path | None = None,
    vision: str | os.PathLike[str] | None = None,
) -> tuple[Checkpoint, Processor | None]:
    """Opens a model folder of any layout; its arrays are read when they are asked for.

    Args:
      path: the folder.
      template: name of the conversation template, of a folder that remembers none; see `hf_processor.load_processor`.
      scratch: an existing folder for what pickled weights are turned into, to be kept as long as the model is in use;
        None refuses them.
      vision: folder of the vision tower, for an original LLaVA that leaves it out.

    Raises:
      InputError: there is no model in the folder, it is not complete, or it is not supported.
    """
    directory = pathlib.Path(path)
    if _holds_ours(directory):
        if vision is not None:
            raise InputError(f"{directory} is a model of ours and holds its vision tower: leave --vision out")
        checkpoint = native.load(directory)
    else:
        opened = functools.partial(open_tensors, scratch=scratch)
        tower = None if vision is None else read_vision_tower(vision, open_files=opened)
        parts = None if tower is None else (tower.config, tower.arrays)
        checkpoint = hf.load(directory, open_files=opened, tower=parts)
        if tower is not None:
            checkpoint = dataclasses.replace(checkpoint, entries=(*checkpoint.entries, *tower.entries))
    processor = load_processor(directory, checkpoint.config, checkpoint.published, checkpoint.tokens, template=template)
    return checkpoint, processor


def describe(path: str | os.PathLike[str]) -> tuple[VisionLanguageConfig, Published, TokenIds]:
    """What a model folder of any layout says of its model; its weights are not opened.

    Raises:
      InputError: there is no model in the folder, or it is not supported.
    """
    directory = pathlib.Path(path)
    return native.read_description(directory) if _holds_ours(directory) else hf.read_config(directory)


def _holds_ours(directory: pathlib.Path) -> bool:
    """Whether a model folder is in our own layout, not in a published one."""
    if not directory.is_dir():
        raise InputError(f"there is no model folder {str(directory)!r}: give one with {native.CONFIG} or config.json")
    if is_ours(directory):
        return True
    if not (directory / "config.json").is_file():
        if any((directory / name).is_file() for name in _ADAPTERS):
            raise InputError(
                f"{directory} holds an adapter and no model: give the model that it is for, and this folder as the"
                " adapter, or merge the two (phantom-jax merge)"
            )
        raise InputError(f"{directory} holds neither {native.CONFIG} nor config.json: it is no model folder")
    if "phases" in read_json(directory / "config.json"):
        raise InputError(
            f"{directory} is the workdir of a training run, it is no model folder: take {directory / 'model'}, "
            f"which appears when all phases are done, or one of {directory / 'models'}"
        )
    return False


def write(
    checkpoint: Checkpoint,
    processor: Processor | None,
    path: str | os.PathLike[str],
    *,
    format: str = "ours",
    metrics: Mapping[str, float] | None = None,
    report: bool = False,
    check: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes a model folder of a layout; it appears complete or not at all.

    Args:
      checkpoint: the model; its published layout is that of `format`, or `format` is `ours`.
      processor: written beside it, where there is one.
      path: a new or empty folder.
      format: one of `layouts.MODEL_LAYOUTS`.
      metrics: for the model card.
      report: whether `REPORT` is written too: what became of every tensor.
      check: looks at the folder before it gets its name; what it raises leaves nothing behind.

    Raises:
      InputError: the folder holds something, the format cannot express the model, or the disk is full.
    """
    check_new(path)
    check_name("format", format, MODEL_LAYOUTS)
    with appearing(path, needed=checkpoint.nbytes) as scratch:
        if format == "ours":
            native.save(checkpoint, scratch)
        else:
            hf.save(checkpoint, scratch)
            source = checkpoint.published.generation_config
            settings = generation_config(checkpoint.tokens, source=source)
            write_json(scratch / _GENERATION, settings)
            card = model_card(
                checkpoint.config,
                checkpoint.published,
                format,
                name=pathlib.Path(path).name,
                dtype=checkpoint.dtype,
                template=None if processor is None else processor.template,
                base=checkpoint.origin.base,
                data=checkpoint.origin.data,
                metrics=metrics,
            )
            (scratch / "README.md").write_text(card, encoding="utf-8")
        if report:
            tensor_report.write(checkpoint.entries, scratch / REPORT)
        if processor is not None:
            processor.save(scratch)
            if format != "ours":
                save_published(processor, scratch, layout=format, config=checkpoint.config)
        if check is not None:
            check(scratch)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model in our own layout."""
    return (pathlib.Path(path) / native.CONFIG).is_file()


def check_new(path: str | os.PathLike[str]) -> None:
    """Raises an `InputError` where there is something already, or what cannot be replaced by a folder."""
    target = pathlib.Path(path)
    if target.is_symlink():
        raise InputError(f"{str(path)!r} is a symbolic link: nothing was written, choose a new folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(path)!r} exists and is not an empty folder: nothing was written, choose a new one")
    if os.path.ismount(target) or (target.exists() and target.samefile(os.curdir)):
        what = "a mount point" if os.path.ismount(target) else "the folder that you are in"
        raise InputError(f"{str(path)!r} is {what}: nothing was written, choose a new folder inside it")


@contextlib.contextmanager
def appearing(path: str | os.PathLike[str], *, needed: int = 0) -> Iterator[pathlib.Path]:
    """A folder beside the target to write into; it becomes the target when all went well, else it is removed.

    Args:
      path: the target, new or empty.
      needed: bytes that will be written, as far as known.

    Raises:
      InputError: there is something at the target, another process is writing it, or the disk is full.
    """
    target = pathlib.Path(os.path.abspath(path))
    with scratch_folder(target, "partial") as scratch:
        check_new(path)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise InputError(
                f"{str(path)!r} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left: nothing was "
                "written, make room or choose another disk"
            )
        try:
            yield scratch
            # The new name is on the disk at once: what it stands for must be there before.
            for folder, _, files in os.walk(scratch):
                for file in files:
                    _sync(os.path.join(folder, file))
                _sync(folder)
        except Exception as error:
            if _disk_is_full(error):
                raise InputError(
                    f"the disk of {str(path)!r} became full: nothing was left there, make room or choose another disk"
                ) from error
            raise
        check_new(path)
        # Takes the place of an empty folder. The lock goes last: without it another process might take the folder over.
        scratch.rename(target)
        (target / _LOCK).unlink()
        _sync(target.parent)


@contextlib.contextmanager
def scratch_folder(target: pathlib.Path, purpose: str) -> Iterator[pathlib.Path]:
    """An empty folder `.NAME.PURPOSE` beside a target, of this process alone; it is removed at the end.

    What a killed process left there goes first. Parents that it needs are made, and removed with it where they are
    empty then.

    Raises:
      InputError: another process is writing the target.
    """
    target = pathlib.Path(os.path.abspath(target))
    folder = target.parent / f".{target.name}.{purpose}"
    made = [parent for parent in target.parents if not parent.exists()]
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
        if not _holds(lock, folder):
            raise InputError(f"another process is writing {str(target)!r}: wait for it, or choose a new folder")
        for entry in folder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield folder
    finally:
        # A signal may come when the file is there, and not its name here.
        with contextlib.suppress(OSError):
            lock = lock or (folder / _LOCK).open("r+")
        if lock is not None and _holds(lock, folder):
            _remove(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        if lock is not None:
            lock.close()


def _remove(folder: pathlib.Path) -> None:
    """Also where threads of a save that was interrupted, Orbax's for instance, still write a last file into it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _holds(lock: TextIO, folder: pathlib.Path) -> bool:
    """Whether this process has, or now gets, the lock of a folder."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have gone, or another one have come, since the file was opened.
        return os.path.samestat(os.fstat(lock.fileno()), (folder / _LOCK).stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # Tensorstore passes on what the system said, in words.
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def _sync(path: str | os.PathLike[str]) -> None:
    """Puts a file, or what a folder lists, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
