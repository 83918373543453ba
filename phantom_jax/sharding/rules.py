"""From logical axis names to mesh axes: one short table per strategy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phantom_jax import axes
from phantom_jax.models.vlm import VisionLanguageModel, abstract_parameters

DECODING = {
    axes.ACTIVATION_BATCH: "data",
    axes.HEADS: "tensor",
    axes.KV_HEADS: "tensor",
    axes.MLP: "tensor",
    axes.VOCAB: "tensor",
    axes.VISION_HEADS: "tensor",
    axes.VISION_MLP: "tensor",
}
"""Every weight and every key stays where it is, activations of one token travel: decoding is bound by memory."""


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Mapping[str, str]) -> PartitionSpec:
    """How an array is split. An axis whose size the mesh axis does not divide, 2 kv heads over 8 devices, is not."""
    split: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        mesh_axis = rules.get(name) if name is not None else None
        fits = mesh_axis is not None and mesh_axis not in split and size % mesh.shape[mesh_axis] == 0
        split.append(mesh_axis if fits else None)
    return PartitionSpec(*split)


def parameter_shardings(model: VisionLanguageModel, mesh: Mesh, rules: Mapping[str, str]) -> Any:
    """The sharding of each parameter of a module."""

    def sharding(leaf):
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        return NamedSharding(mesh, partition(names, nn.meta.unbox(leaf).shape, mesh, rules))

    def is_leaf(leaf):
        return isinstance(leaf, nn.Partitioned | jax.ShapeDtypeStruct)

    return jax.tree.map(sharding, abstract_parameters(model), is_leaf=is_leaf)


def cache_shardings(cache: Any, mesh: Mesh, rules: Mapping[str, str]) -> Any:
    """The sharding of each array of a key-value cache: rows and kv heads are split."""

    def sharding(leaf):
        # Keys, values and their scales are [B, S, K, ...], the structure [B, S], the length is a scalar.
        names = {4: (axes.ACTIVATION_BATCH, None, axes.KV_HEADS, None), 2: (axes.ACTIVATION_BATCH, None), 0: ()}
        return NamedSharding(mesh, partition(names[leaf.ndim], leaf.shape, mesh, rules))

    return jax.tree.map(sharding, cache)
