"""The folders that a run writes: a model after each phase, or an adapter, and what an adapter is for.

`models/PHASE` is the model after a phase, `model` that after the last one. A phase that trains an adapter writes that
alone. It names its base: the model that the phase began with. One that lies nowhere on disk, since it was drawn at
random or merged, is written as `models/PHASE.base` before the first step.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.checkpoints import model_folder
from phantom_jax.checkpoints.arrays import StoredArray, stack
from phantom_jax.ops.quantize import QuantizedTensor, dequantize
from phantom_jax.training.division import Division
from phantom_jax.training.state import TrainState, merge
from phantom_jax.training.task import Task
from phantom_jax.trees import Params, flatten, unflatten


class Exports:
    """What a run writes, phase by phase. What is there already stays as it is.

    Args:
      task: how models are written; without `export` nothing is.
      config: resolved.
      workdir: of the run.
      divisions: of its phases.
      say: prints a line.
    """

    def __init__(
        self,
        task: Task,
        config: Mapping[str, Any],
        workdir: Path,
        divisions: Sequence[Division],
        say: Callable[[str], None],
    ):
        self._task, self._workdir, self._divisions, self._say = task, workdir, divisions, say
        self._names, self._weights = [phase["name"] for phase in config["phases"]], config["model"]["weights"]

    def keep_base(self, index: int) -> Callable[[Params], None] | None:
        """What writes the model that a phase begins with; None where nothing has to be written."""
        if self._task.export is None or not self._divisions[index].lora.kernels or self._source(index):
            return None
        return lambda params: self._write(
            self._base(index), lambda folder: self._task.export(self._in_floats(params), folder)
        )

    def write(self, index: int, state: TrainState) -> None:
        """Writes what a phase made."""
        if self._task.export is None:
            return
        last = index == len(self._names) - 1
        target = self._workdir / "model" if last else self._workdir / "models" / self._names[index]
        lora, source = self._divisions[index].lora, self._source(index)
        if lora.kernels:
            if self._task.export_adapter is not None:
                base = source or os.path.abspath(self._base(index))
                self._write(target, lambda folder: self._task.export_adapter(state.trainable, lora, base, folder))
            return
        params = merge(state.trainable, state.frozen)
        self._write(target, lambda folder: self._task.export(self._in_floats(params), folder))

    def _source(self, index: int) -> str:
        """The folder of the model that a phase begins with; empty where it lies in none."""
        if index == 0:
            return os.path.abspath(self._weights) if self._weights else ""
        if self._divisions[index - 1].lora.kernels:
            return ""
        return os.path.abspath(self._workdir / "models" / self._names[index - 1])

    def _base(self, index: int) -> Path:
        # No phase has a dot in its name.
        return self._workdir / "models" / f"{self._names[index]}.base"

    def _write(self, target: Path, write: Callable[[Path], None]) -> None:
        # A run that is started again finds the models of finished phases written.
        if not target.exists():
            write(target)
            self._say(f"wrote {target}")

    def _in_floats(self, params: Params) -> dict[str, Any]:
        """The parameters with floats in place of codes: those that the codes were made from, where they are on disk."""
        flat, read = flatten(params), {}
        for path in [path for path, leaf in flat.items() if isinstance(leaf, QuantizedTensor)]:
            # Codes never change: their floats are those that the first phase that quantises them began with.
            first = next(index for index, division in enumerate(self._divisions) if path in division.quantized)
            source = self._source(first)
            if source not in read:
                read[source] = flatten(model_folder.read(source)[0].params) if source else {}
            flat[path] = read[source].get(path, _dequantized(flat[path]))
        return unflatten(flat)


def _dequantized(tensor: QuantizedTensor) -> StoredArray:
    """The kernel that the codes stand for, layer by layer when it is read."""

    def layer(index: tuple[int, ...]) -> StoredArray:
        def read(box):
            one = jax.tree.map(lambda leaf: leaf[index], tensor)
            return np.asarray(dequantize(one, jnp.float32))[box]

        return StoredArray((*tensor.input_shape, *tensor.output_shape), np.float32, read)

    if not tensor.layer_shape:
        return layer(())
    return stack([layer((index,)) for index in range(tensor.layer_shape[0])])
