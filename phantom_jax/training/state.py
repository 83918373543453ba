"""The training state: two trees of parameters, trainable and frozen, and the optimiser's state of the first alone.

Parameters are nested dictionaries, named by paths such as `language_model/layers/attention/query/kernel`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from phantom_jax.lora import NO_LORA, Lora
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.patterns import match
from phantom_jax.trees import Params, flatten, unflatten


@dataclasses.dataclass
class Progress:
    """Where a run stands; `TrainState` is what it stands there with.

    Attributes:
      phase: index of the phase.
      phase_step: steps done of it.
      step: steps done over all phases; names checkpoints.
      tokens: real tokens seen over all phases.
      images: images seen over all phases.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    tokens: int = 0
    images: int = 0


class TrainState(flax.struct.PyTreeNode):
    """Everything a training step reads and writes.

    Attributes:
      step: int32 scalar, batches consumed in this phase, also those of skipped steps. The schedule reads it.
      trainable: float32 parameters that gradients and optimiser state exist for, low-rank factors among them.
      frozen: the other parameters, in the compute dtype or quantised.
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


def split(params: Params, patterns: Sequence[str]) -> tuple[dict, dict]:
    """Splits parameters into those that a pattern matches and the rest, as two nested dictionaries.

    Raises:
      InputError: if a pattern matches nothing.
    """
    flat = flatten(params)
    chosen = match(patterns, flat, what="trainable")
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """One tree again, from two that share no path."""
    return unflatten(flatten(trainable) | flatten(frozen))


def cast(tree: Params, dtype: Any) -> Params:
    """Casts the floating-point leaves; integers and quantised kernels stay as they are."""

    def leaf(array):
        stays = isinstance(array, QuantizedTensor) or not jnp.issubdtype(array.dtype, jnp.floating)
        return array if stays else array.astype(dtype)

    return jax.tree.map(leaf, tree, is_leaf=lambda node: isinstance(node, QuantizedTensor))


def start_phase(
    params: Params,
    *,
    patterns: Sequence[str],
    init_optimizer: Callable[[Params], Any],
    compute_dtype: Any,
    lora: Lora = NO_LORA,
    key: jax.Array | None = None,
) -> TrainState:
    """The state before the first step of a phase.

    Pure: to be traced by `jax.jit` or `jax.eval_shape`. Trainable parameters become float32 masters and frozen ones are
    cast to the compute dtype, so with bfloat16 a parameter that was trained before and is frozen now is rounded once.

    Args:
      params: all parameters, from the phase before or from initialisation.
      patterns: which of them train.
      init_optimizer: gives the optimiser's state of the trainable tree.
      compute_dtype: of the frozen parameters.
      lora: whose factors train beside them.
      key: of those factors.
    """
    trainable, frozen = split(params, patterns)
    if lora.kernels:
        trainable = merge(trainable, lora.init(frozen, key))
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
