"""Compiled functions that say so."""

import time
from collections.abc import Callable
from typing import Any

import jax

from phantom_jax.training.metrics import compiled_memory


class Program:
    """A jitted function, compiled ahead once for each shape of its last argument.

    What was compiled takes no other shapes, so nothing is ever compiled unseen.

    Args:
      jitted: the function.
      what: its name in what is announced.
      announce: is given a line before and after each compilation.
    """

    def __init__(self, jitted: Any, what: str, announce: Callable[[str], None]):
        self._jitted, self._what, self._announce = jitted, what, announce
        self._programs = {}

    def trace(self, *args: Any) -> jax.stages.Traced:
        """As `jax.jit`'s own."""
        return self._jitted.trace(*args)

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args[-1])
        shapes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if shapes not in self._programs:
            self._announce(f"compiling the {self._what} ...")
            began = time.perf_counter()
            self._programs[shapes] = self._jitted.lower(*args).compile()
            seconds = time.perf_counter() - began
            memory = compiled_memory(self._programs[shapes])
            self._announce(f"compiled the {self._what} in {seconds:.1f}s{memory}")
        return self._programs[shapes](*args)
