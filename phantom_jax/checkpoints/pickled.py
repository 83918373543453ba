"""Pickled weights (`.bin`), only where the user allows them: a process of its own makes safetensors of them.

A pickle is a program. PyTorch's `weights_only` loader runs none of what it may ask for, except tensors and plain
containers; that loader runs in a child process that can do little else, and this package reads what it wrote.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

from phantom_jax.checkpoints.tensor_files import weight_map
from phantom_jax.errors import InputError

NOT_ALLOWED = (
    "weights are pickled (.bin): rewrite them with `convert --allow_pickle`, where PyTorch's weights_only loader reads "
    "them in a process of its own, or take safetensors"
)
"""Says why pickled weights are not read, where the user did not ask for it."""

_WEIGHTS = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
# What Python and PyTorch need to start. No more: the environment may hold tokens and keys.
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "HOME",
    "PYTHONHOME",
    "PYTHONPATH",
    "TMPDIR",
    "TEMP",
    "TMP",
    "SYSTEMROOT",
)
_READER = pathlib.Path(__file__).with_name("pickled_reader.py")


def weight_files(directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The pickled weights of a model folder: the shards of `pytorch_model.bin.index.json`, or `pytorch_model.bin`.

    Raises:
      InputError: the index is damaged, or names a file outside the folder or one that does not exist.
    """
    directory = pathlib.Path(directory)
    if not (directory / _INDEX).is_file():
        return [directory / _WEIGHTS] if (directory / _WEIGHTS).is_file() else []
    return [directory / name for name in sorted(set(weight_map(directory / _INDEX).values()))]


def to_safetensors(files: Sequence[str | os.PathLike[str]], scratch: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes the tensors of pickled files as safetensors; names, shapes, dtypes and bytes stay.

    Needs PyTorch 2.6 or later. Files of PyTorch 1.6 and later are mapped, so that about one tensor is held besides
    pages of the file; an older file is read whole. Tensors that share memory are written each for itself.

    Args:
      files: each a dictionary of dense tensors by name.
      scratch: an existing folder; nothing in it is overwritten.

    Returns:
      One file in `scratch` for each of `files`, in their order: `STEM.safetensors`.

    Raises:
      InputError: PyTorch is not there or too old, a file asks for code, is damaged or holds something else, or the
        process was killed. Then none of the new files is left.
    """
    sources = [pathlib.Path(file).absolute() for file in files]
    scratch = pathlib.Path(scratch).absolute()
    targets = [scratch / f"{source.stem}.safetensors" for source in sources]
    for source, target in zip(sources, targets, strict=True):
        if not source.is_file():
            raise InputError(f"there is no file {source}")
        if target.exists() or targets.count(target) > 1:
            raise InputError(f"{source} would become {target}, which is taken: give another folder")
    try:
        _run(sources, scratch)
    except BaseException:
        for target in targets:
            target.unlink(missing_ok=True)
        raise
    return targets


def _run(sources: Sequence[pathlib.Path], scratch: pathlib.Path) -> None:
    # With -P no file beside the script stands for a module of its name.
    command = [sys.executable, "-P", "-B", str(_READER), str(scratch), *map(str, sources)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    child = subprocess.run(  # noqa: S603 - our own file
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    replies = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    for reply in replies:
        if "error" in reply:
            raise InputError(reply["error"])
    if child.returncode == 0 and len(replies) == len(sources):
        return
    at = sources[min(len(replies), len(sources) - 1)]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        hint = "most likely there was too little memory" if name == "SIGKILL" else "the file may be damaged"
        raise InputError(f"the process that read {at} was ended by {name}: {hint}")
    said = child.stderr.strip().splitlines() or ["it said nothing"]
    raise InputError(f"the process that read {at} failed with exit code {child.returncode}: {said[-1][:300]}")
