"""From one layout of a model on disk to another."""

from pathlib import Path

import jax
import numpy as np

from phantom_jax.errors import InputError
from phantom_jax.pretrained import load, save


def convert(source: str, target: str, *, layout: str, verify: bool = False) -> str:
    """Reads a model folder of any known layout and writes it in another one.

    Args:
      source: folder to read.
      target: folder to write; it must not exist, or be empty.
      layout: "ours", "phantom", "llava-hf" or "llava-original".
      verify: read the target back and compare every tensor, bit by bit, with the source.

    Returns:
      One line that says what was done.

    Raises:
      InputError: the target holds files, or the model has no form in that layout.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"the target {target!r} exists and is not an empty folder. Set --target to a new one.")
    handle = load(source)
    save(handle, target, format=layout)
    count = len(jax.tree.leaves(handle.params))
    size = sum(leaf.size for leaf in jax.tree.leaves(handle.params))
    line = f"wrote {count} arrays, {size:,} parameters, to {target} ({layout})"
    if verify:
        differing = differences(handle.params, load(target).params)
        if differing:
            raise RuntimeError(f"what was written to {target!r} reads back differently: {'; '.join(differing)}")
        line += "; read back, all equal"
    return line


def differences(left: dict, right: dict) -> list[str]:
    """Which arrays of two parameter trees differ in presence, shape, dtype or any bit; empty when none."""
    sides = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (left, right))
    ]
    found = [f"{name} is on one side only" for name in sorted(sides[0].keys() ^ sides[1].keys())]
    for name in sorted(sides[0].keys() & sides[1].keys()):
        first, second = sides[0][name], sides[1][name]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            found.append(f"{name} is {first.dtype}{list(first.shape)} and {second.dtype}{list(second.shape)}")
        elif first.tobytes() != second.tobytes():
            found.append(f"{name} has other values")
    return found
