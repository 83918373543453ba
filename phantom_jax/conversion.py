"""From one layout of a model on disk to another."""

from collections.abc import Mapping

import numpy as np

from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.pretrained import read, write
from phantom_jax.trees import flatten


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
      InputError: the target holds files, or the model has no form in that layout. Nothing is overwritten.
      RuntimeError: what was written reads back differently.
    """
    checkpoint, processor = read(source)
    write(checkpoint, processor, target, format=layout)
    arrays = _arrays(checkpoint)
    size = sum(array.size for array in arrays.values())
    line = f"wrote {len(arrays)} arrays, {size:,} parameters, to {target} ({layout})"
    if verify:
        differing = differences(arrays, _arrays(read(target)[0]))
        if differing:
            raise RuntimeError(f"what was written to {target!r} reads back differently: {'; '.join(differing)}")
        line += "; read back, all equal"
    return line


def differences(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> list[str]:
    """Which of two sets of arrays by name differ in presence, shape, dtype or any bit; empty when none."""
    found = [f"{name} is on one side only" for name in sorted(left.keys() ^ right.keys())]
    for name in sorted(left.keys() & right.keys()):
        first, second = left[name], right[name]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            found.append(f"{name} is {first.dtype}{list(first.shape)} and {second.dtype}{list(second.shape)}")
        elif first.tobytes() != second.tobytes():
            found.append(f"{name} has other values")
    return found


def _arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All arrays of a model by path, those included that a file holds and no computation uses."""
    trees = {"params": checkpoint.params, "unused": checkpoint.unused}
    return {path: np.asarray(leaf) for path, leaf in flatten(trees).items()}
