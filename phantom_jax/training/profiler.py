"""A trace of some steps, on demand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps that a config's `profile` names into a folder, for TensorBoard's profile plugin or Perfetto.

    Args:
      first_step: of the trace, counted over all phases from 1.
      num_steps: how many; 0 traces nothing.
      folder: of the traces; each makes a folder of its own in it, named for the time.
      say: prints a line.
    """

    def __init__(self, first_step: int, num_steps: int, folder: Path, say: Callable[[str], None]):
        self._steps = range(max(first_step, 1), max(first_step, 1) + num_steps)
        self._folder, self._say = folder, say
        self._began: int | None = None
        self._seen = False

    def step_begins(self, step: int, before: Any) -> bool:
        """Starts the trace where it is due, once the arrays of the step `before` are there. Whether one is running."""
        if self._began is None and step in self._steps:
            jax.block_until_ready(before)
            jax.profiler.start_trace(self._folder)
            self._began, self._seen = step, True
        return self._began is not None

    def step_ends(self, step: int, outputs: Any) -> None:
        """Stops the trace after its last step, once the outputs of that one are there."""
        if self._began is not None and step + 1 not in self._steps:
            jax.block_until_ready(outputs)
            self._stop(step)

    def close(self) -> None:
        """Writes what was traced of a run that ends before its last traced step."""
        if self._began is not None:
            self._stop(None)
        elif self._steps and not self._seen:
            self._say(f"no trace: profile.first_step is {self._steps[0]}, a step that this run did not come to")

    def _stop(self, step: int | None) -> None:
        began, self._began = self._began, None
        jax.profiler.stop_trace()
        steps = f"steps {began} to {step}" if step is not None else f"what there was from step {began} on"
        self._say(f"wrote a trace of {steps} to {self._folder}")
