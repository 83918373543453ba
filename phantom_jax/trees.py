"""Nested dictionaries of arrays as flat dictionaries by path, `language_model/layers/attention/query/kernel`."""

from collections.abc import Mapping
from typing import Any

Params = Mapping[str, Any]
"""Parameters: nested dictionaries of arrays, or of what stands for arrays."""


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves by path, in the order of the paths. Anything but a dictionary is a leaf."""
    flat = {}

    def visit(node, path):
        if isinstance(node, Mapping):
            for key in sorted(node):
                visit(node[key], (*path, key))
        else:
            flat["/".join(path)] = node

    visit(tree, ())
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
