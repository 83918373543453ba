"""Where arrays lie on a mesh, said in traced code by logical axis names.

Whoever traces sets a mesh (`jax.set_mesh`) and the rules that map names to its axes (`flax.linen.logical_axis_rules`,
see `sharding/rules.py`). Without rules, or with one device, nothing here does anything.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from phantom_jax import axes
from phantom_jax.ops.linear import Kernel, LowRankKernel
from phantom_jax.ops.partition import mesh_axes
from phantom_jax.ops.quantize import QuantizedTensor

Names = Sequence[str | None]
Rules = Sequence[tuple[str, str | tuple[str, ...]]]
"""Pairs of a logical name and the mesh axis, or axes, that split it; earlier pairs come first."""


def partition(names: Names, shape: Sequence[int], mesh: Any, rules: Rules) -> PartitionSpec:
    """How an array is split: each mesh axis goes to the first rule that it fits.

    An axis whose size the mesh axis does not divide, 2 kv heads over 8 devices, is not split by it: a later rule may
    give that mesh axis to another axis of the array.

    Args:
      names: logical name of each axis, None for one that is never split.
      shape: sizes of the axes.
      mesh: concrete or abstract.
      rules: see `Rules`.
    """
    split: list[str | tuple[str, ...] | None] = [None] * len(shape)
    taken: set[str] = set()
    for name, target in rules:
        if name not in names:
            continue
        axis = tuple(names).index(name)
        several = tuple(mesh_axis for mesh_axis in mesh_axes(target) if mesh.shape[mesh_axis] > 1)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in several)
        if several and split[axis] is None and not taken & set(several) and shape[axis] % parts == 0:
            split[axis] = several if len(several) > 1 else several[0]
            taken |= set(several)
    return PartitionSpec(*split)


def _summed(name: str) -> str:
    """The name of a parameter's axis where its gradient, once summed, lies."""
    return f"summed {name}"


def quantized_names(tensor: QuantizedTensor, inputs: Names, outputs: Names) -> QuantizedTensor:
    """Logical names of the axes of the arrays of a quantised kernel, stacked or of one layer.

    The blocks of NF4 run over the inputs and bear the name of their first axis. What is small has no names.
    """
    layers = (axes.LAYERS,) * len(tensor.layer_shape)
    if tensor.kind == "int8":
        codes, block_codes, block_mean = (*layers, *inputs, *outputs), None, None
    else:
        codes, block_codes = (*layers, inputs[0], None, *outputs), (*layers, inputs[0], *outputs)
        block_mean = (None,) * tensor.block_mean.ndim
    scales = (None,) * tensor.scales.ndim
    return QuantizedTensor(codes, scales, block_codes, block_mean, tensor.kind, tensor.input_shape, tensor.output_shape)


def scoped_rules(computation: Rules, gradients: Rules) -> Rules:
    """The rules to trace under: of the computation, and of where gradients of parameters lie."""
    return (*computation, *((_summed(name), target) for name, target in gradients))


def constrain(x: jax.Array, names: Names) -> jax.Array:
    """The array, split as the rules say; so is its gradient."""
    if not _partitioned():
        return x
    spec = partition(names, x.shape, jax.sharding.get_abstract_mesh(), _rules())
    return jax.lax.with_sharding_constraint(x, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(parameter: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter as one layer's computation takes it; its gradient goes straight to where gradients are stored."""
    return constrain(parameter, names)


def _gather_forward(parameter, names):
    return constrain(parameter, names), None


def _gather_backward(names, _, gradient):
    return (constrain(gradient, tuple(name and _summed(name) for name in names)),)


gather.defvjp(_gather_forward, _gather_backward)


def gather_kernel(kernel: Kernel, inputs: Names, outputs: Names, dtype: Any) -> Kernel:
    """`gather` for the kernel of a linear map of one layer; of a quantised one the codes travel, not the values.

    Args:
      kernel: [*inputs, *outputs].
      inputs, outputs: logical names of its axes.
      dtype: of the computation. Floats are cast before they travel, most of them to half their size.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    if isinstance(kernel, LowRankKernel):
        return dataclasses.replace(
            kernel,
            kernel=gather_kernel(kernel.kernel, inputs, outputs, dtype),
            a=gather(kernel.a.astype(dtype), (*inputs, axes.LORA_RANK)),
            b=gather(kernel.b.astype(dtype), (axes.LORA_RANK, *outputs)),
        )
    if not isinstance(kernel, QuantizedTensor):
        return gather(kernel.astype(dtype), (*inputs, *outputs))
    if not _partitioned():
        return kernel
    return jax.tree.map(constrain, kernel, quantized_names(kernel, inputs, outputs))


def gathered_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of parameters that gathers them, whose backward pass gathers them once more.

    It keeps its arguments: gathered parameters of all layers, kept from the forward pass, would be the whole model on
    every device. Products are not computed again, nothing in the backward pass asks for them.
    """
    return jax.checkpoint(function, prevent_cse=False) if _partitioned() else function


def look_up(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Rows [B, L, D] of a table whose channels, or those of its gradient, are split: it stays, the rows travel.

    Each device looks its part of the channels up for the tokens of all who share the table out. A table has more rows
    than a batch has tokens, and so has its gradient.
    """
    take = functools.partial(jnp.take, axis=0)
    if not _partitioned():
        return take(table_VD, ids_BL)
    names = (_summed(axes.VOCAB), _summed(axes.EMBED))
    channels = partition(names, table_VD.shape, jax.sharding.get_abstract_mesh(), _rules())[1]
    if channels is None:
        return take(table_VD, ids_BL)
    return jax.shard_map(
        take,
        in_specs=(PartitionSpec(None, channels), PartitionSpec()),
        out_specs=PartitionSpec(None, None, channels),
        axis_names=set(mesh_axes(channels)),
    )(table_VD, ids_BL)


def split_of(names: Names, shape: Sequence[int]) -> PartitionSpec:
    """How the rules split an array, for an operation that has to be told; nothing splits it on one device.

    Args:
      names: logical name of each axis, None for one that is never split.
      shape: sizes of the axes.
    """
    if not _partitioned():
        return PartitionSpec(*[None] * len(names))
    return partition(names, shape, jax.sharding.get_abstract_mesh(), _rules())


def _rules() -> Rules:
    """The rules in force, without those over mesh axes along which the code is split by hand already."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    rules = nn.get_logical_axis_rules()
    return [rule for rule in rules if not manual & set(mesh_axes(rule[1]))]


def _partitioned() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and bool(_rules())
