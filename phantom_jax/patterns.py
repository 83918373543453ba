"""Patterns that name parameters: globs over whole paths, `language_model/layers/attention/query/kernel` for instance.

`*` stands for anything within one component, `**` for any number of components. `projector/**` is all of the
projector, `**/phantom/**` every phantom parameter wherever it is.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from phantom_jax.errors import InputError


def match(patterns: Sequence[str], paths: Iterable[str], *, what: str, noun: str = "parameter") -> set[str]:
    """The paths that any of the patterns matches.

    Args:
      patterns: globs over whole paths.
      paths: every path there is.
      what: the config key that the patterns come from, for the message.
      noun: what the paths are of, for the message.

    Raises:
      InputError: if a pattern matches nothing; names the nearest paths.
    """
    paths = list(paths)
    matched = set()
    for pattern in patterns:
        expression = re.compile(_glob_to_regex(pattern))
        found = {path for path in paths if expression.fullmatch(path)}
        if not found:
            raise InputError(_matches_nothing(pattern, paths, what, noun))
        matched |= found
    return matched


def _glob_to_regex(pattern: str) -> str:
    parts = []
    components = pattern.split("/")
    for index, component in enumerate(components):
        last = index == len(components) - 1
        if component == "**":
            # Zero or more components, so that `**/phantom/**` also matches where nothing stands before `phantom`.
            parts.append(".*" if last else "(?:[^/]+/)*")
        else:
            parts.append(re.escape(component).replace(r"\*", "[^/]*") + ("" if last else "/"))
    return "".join(parts)


def _matches_nothing(pattern: str, paths: list[str], what: str, noun: str) -> str:
    prefixes = {"/".join(path.split("/")[: depth + 1]) for path in paths for depth in range(path.count("/") + 1)}
    words = pattern.replace("/**", "").replace("**/", "")
    near = difflib.get_close_matches(words, sorted(prefixes), n=3, cutoff=0.3)
    if not near:
        near = sorted({path.split("/")[0] for path in paths})
    hint = ""
    if f"{words}/" in {f"{prefix}/" for prefix in prefixes} and "*" not in pattern:
        hint = f" To take everything below it, write {pattern + '/**'!r}."
    return (
        f"Pattern {pattern!r} of {what} matches no {noun}.{hint} The nearest paths are: {', '.join(near)}."
        " `*` stands for anything within one component of a path, `**` for any number of components."
    )
