"""The training state: two trees of parameters, trainable and frozen, and the optimiser's state of the first alone.

Parameters are nested dictionaries, named by paths such as `language_model/layers/attention/query/kernel`. Patterns are
globs over whole paths: `*` stands for anything within one component, `**` for any number of components. `projector/**`
is all of the projector, `**/phantom/**` every phantom parameter wherever it is.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from phantom_jax.errors import InputError
from phantom_jax.trees import flatten, unflatten

Params = Mapping[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything a training step reads and writes.

    Attributes:
      step: int32 scalar, batches consumed in this phase, also those of skipped steps. The schedule reads it.
      trainable: float32 parameters that gradients and optimiser state exist for.
      frozen: the other parameters, in the compute dtype.
      optimizer_state: one entry per parameter group.
      skipped: int32 scalar, steps of this phase that were not applied since loss or gradient was not finite.
      skipped_in_a_row: int32 scalar, how many of the last steps were skipped without one applied between them.
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    optimizer_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def match(patterns: Sequence[str], paths: Iterable[str], *, what: str = "trainable") -> set[str]:
    """The paths that any of the patterns matches.

    Args:
      patterns: globs over whole paths.
      paths: every path there is.
      what: the config key that the patterns come from, for the message.

    Raises:
      InputError: if a pattern matches nothing; names the nearest paths.
    """
    paths = list(paths)
    matched = set()
    for pattern in patterns:
        expression = re.compile(_glob_to_regex(pattern))
        found = {path for path in paths if expression.fullmatch(path)}
        if not found:
            raise InputError(_matches_nothing(pattern, paths, what))
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


def _matches_nothing(pattern: str, paths: list[str], what: str) -> str:
    prefixes = {"/".join(path.split("/")[: depth + 1]) for path in paths for depth in range(path.count("/") + 1)}
    words = pattern.replace("/**", "").replace("**/", "")
    near = difflib.get_close_matches(words, sorted(prefixes), n=3, cutoff=0.3)
    if not near:
        near = sorted({path.split("/")[0] for path in paths})
    hint = ""
    if f"{words}/" in {f"{prefix}/" for prefix in prefixes} and "*" not in pattern:
        hint = f" To take everything below it, write {pattern + '/**'!r}."
    return (
        f"Pattern {pattern!r} of {what} matches no parameter.{hint} The nearest paths are: {', '.join(near)}."
        " `*` stands for anything within one component of a path, `**` for any number of components."
    )


def split(params: Params, patterns: Sequence[str]) -> tuple[dict, dict]:
    """Splits parameters into those that a pattern matches and the rest, as two nested dictionaries.

    Raises:
      InputError: if a pattern matches nothing.
    """
    flat = flatten(params)
    chosen = match(patterns, flat)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """One tree again, from two that share no path."""
    return unflatten(flatten(trainable) | flatten(frozen))


def cast(tree: Params, dtype: Any) -> Params:
    """Casts the floating-point leaves; integers, codes of quantised weights for instance, stay as they are."""

    def leaf(array):
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(leaf, tree)


def start_phase(
    params: Params, *, patterns: Sequence[str], init_optimizer: Callable[[Params], Any], compute_dtype: Any
) -> TrainState:
    """The state before the first step of a phase.

    Pure: to be traced by `jax.jit` or `jax.eval_shape`. Trainable parameters become float32 masters and frozen ones are
    cast to the compute dtype, so with bfloat16 a parameter that was trained before and is frozen now is rounded once.

    Args:
      params: all parameters, from the phase before or from initialisation.
      patterns: which of them train.
      init_optimizer: gives the optimiser's state of the trainable tree.
      compute_dtype: of the frozen parameters.
    """
    trainable, frozen = split(params, patterns)
    trainable = cast(trainable, jnp.float32)

    def zero():
        # One array each: a donated state must not hold the same buffer twice.
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        trainable=trainable,
        frozen=cast(frozen, compute_dtype),
        optimizer_state=init_optimizer(trainable),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )
