"""What became of every tensor: kept as it was, transformed, made fresh, or dropped, and why."""

import collections
import dataclasses
import os
from collections.abc import Iterable

ACTIONS = ("kept", "transformed", "fresh", "dropped")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the report.

    Attributes:
      name: published name of the tensor, in the file that was read or, on export, in the one that is written; empty
        for a parameter that no file holds.
      paths: our parameters, `collection/module/.../name`; empty for a tensor that was dropped.
      action: one of `ACTIONS`. `kept` means the same numbers, whatever their order; `transformed`, that some changed.
      reason: for `transformed`, `fresh` and `dropped`: why. Entries that share a reason are counted together.
    """

    name: str
    paths: tuple[str, ...]
    action: str
    reason: str = ""

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise ValueError(f"{self.name or self.paths} is {self.action!r}: use one of {', '.join(ACTIONS)}")


def changed(entries: Iterable[Entry], paths: Iterable[str], reason: str) -> tuple[Entry, ...]:
    """The entries, those of some parameters with one more reason for being transformed."""
    paths = set(paths)
    return tuple(
        dataclasses.replace(entry, action="transformed", reason="; ".join(filter(None, (entry.reason, reason))))
        if paths.intersection(entry.paths) and entry.action != "fresh"
        else entry
        for entry in entries
    )


def summary(entries: Iterable[Entry]) -> str:
    """One line with the count of each action, and of each reason of what was not kept."""
    reasons: dict[str, collections.Counter[str]] = {action: collections.Counter() for action in ACTIONS}
    for entry in entries:
        reasons[entry.action][entry.reason] += 1
    parts = []
    for action, counts in reasons.items():
        if not counts:
            continue
        said = ", ".join(f"{reason}: {count}" for reason, count in counts.items() if reason and action != "kept")
        parts.append(f"{counts.total()} {action}" + (f" ({said})" if said else ""))
    return "tensors: " + ("; ".join(parts) or "none")


def write(entries: Iterable[Entry], path: str | os.PathLike[str]) -> None:
    """Writes tab-separated lines `name, parameters, action, reason` under a line of headings.

    Several parameters of one tensor are joined by spaces.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write("name\tparameters\taction\treason\n")
        for entry in entries:
            file.write("\t".join((entry.name, " ".join(entry.paths), entry.action, entry.reason)) + "\n")
