"""JSON objects in files."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from phantom_jax.errors import InputError

_DEEPEST = 100
"""Lists and objects in each other; what copies and compares them takes several calls for each."""


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object, or an `InputError` that names the file."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        _check_depth(content, _DEEPEST)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_depth(content: Any, left: int) -> None:
    if not left:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_depth(value, left - 1)
