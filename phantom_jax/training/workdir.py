"""The folder of a run: whose it is, and that one process at a time trains in it."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phantom_jax import config as configs
from phantom_jax.errors import InputError
from phantom_jax.json_files import write_json


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this config's run already; False for one that is new. Writes nothing.

    Raises:
      InputError: it is another run's, with the difference, or what is in it is nobody's.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} cannot be read as a config: {error}. Choose another workdir.") from error
        difference = configs.config_difference(theirs, config)
        difference = [line for line in difference if not configs.decides_nothing(line)]
        if difference:
            raise InputError(
                f"Workdir {workdir} holds a run of another config; theirs -> yours:\n"
                + "\n".join(f"  {line}" for line in difference)
                + "\nSet --workdir to a new folder, or the config back to theirs."
            )
        return True
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"Workdir {workdir} is a file; set --workdir to a folder.")
    for name in ("checkpoints", "metrics.jsonl", "models", "model", "reference"):
        if (workdir / name).exists():
            raise InputError(
                f"Workdir {workdir} holds {name} but no config.json, so whose it is cannot be told. Choose another one."
            )
    return False


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder and writes its config.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / "config.json.tmp"
    write_json(temporary, config)
    temporary.replace(workdir / "config.json")


@contextlib.contextmanager
def sole_owner(workdir: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of a workdir; a killed process keeps nobody out."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Workdir {workdir} is in use: another process trains in it. Wait for it, stop it, or set --workdir to"
                " a new folder."
            ) from error
        yield
