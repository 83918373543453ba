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
from phantom_jax.ops.attention import attention
from phantom_jax.ops.linear import Kernel, LowRankKernel
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.ops.structure import Structure

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
        mesh_axes = tuple(mesh_axis for mesh_axis in _mesh_axes(target) if mesh.shape[mesh_axis] > 1)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if mesh_axes and split[axis] is None and not taken & set(mesh_axes) and shape[axis] % parts == 0:
            split[axis] = mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]
            taken |= set(mesh_axes)
    return PartitionSpec(*split)


def _mesh_axes(target: str | tuple[str, ...]) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target


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
        axis_names=set(_mesh_axes(channels)),
    )(table_VD, ids_BL)


def attention_by_parts(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKE: jax.Array,
    *,
    names: Names,
    backend: str,
    query_structure: Structure | None = None,
    key_structure: Structure | None = None,
    **options: Any,
) -> jax.Array:
    """`ops.attention`, each device for its own rows, its own heads and its own queries.

    Where tokens are split over devices, queries stay where they are and every device is sent the keys and values of
    whole rows: few heads, and what causal attention needs of them is not less than half.

    Args:
      query_BLNH, key_BSKH, value_BSKE, backend, query_structure, key_structure: as there.
      names: logical names of the rows, the tokens and the heads of the queries.
      **options: as there.
    """

    def run(query, key, value, query_structure, key_structure):
        structures = {"query_structure": query_structure, "key_structure": key_structure}
        return attention(query, key, value, backend=backend, **structures, **options)

    # Kernels of one platform split themselves.
    if not _partitioned() or backend not in ("xla", "chunked"):
        return run(query_BLNH, key_BSKH, value_BSKE, query_structure, key_structure)
    mesh = jax.sharding.get_abstract_mesh()
    query_spec = partition((*names, None), query_BLNH.shape, mesh, _rules())
    rows, tokens, head_axis, _ = query_spec
    manual = {axis for target in (rows, tokens, head_axis) if target for axis in _mesh_axes(target)}
    if not manual:
        return run(query_BLNH, key_BSKH, value_BSKE, query_structure, key_structure)
    parts = 1 if head_axis is None else mesh.shape[head_axis]
    # Fewer key-value heads than parts: each goes to all the devices whose queries see it.
    repeats = math.lcm(key_BSKH.shape[2], parts) // key_BSKH.shape[2]
    if repeats > 1:
        key_BSKH, value_BSKE = (jnp.repeat(x, repeats, axis=2) for x in (key_BSKH, value_BSKE))
    key_spec = PartitionSpec(rows, None, head_axis, None)
    return jax.shard_map(
        run,
        in_specs=(query_spec, key_spec, key_spec, PartitionSpec(rows, tokens), PartitionSpec(rows, None)),
        out_specs=query_spec,
        axis_names=manual,
        # Loops over blocks begin with constants, which are the same everywhere as their results are not.
        check_vma=False,
    )(query_BLNH, key_BSKH, value_BSKE, query_structure, key_structure)


def _rules() -> Rules:
    """The rules in force, without those over mesh axes along which the code is split by hand already."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    rules = nn.get_logical_axis_rules()
    return [rule for rule in rules if not manual & set(_mesh_axes(rule[1]))]


def _partitioned() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and bool(_rules())
