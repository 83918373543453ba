"""From logical axis names to mesh axes: one short table per strategy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from phantom_jax import axes
from phantom_jax.models.partitioning import Names, Rules, partition, quantized_names
from phantom_jax.models.vlm import VisionLanguageModel, abstract_parameters
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.trees import flatten

HEADS_AND_WIDTHS: Rules = (
    (axes.HEADS, "tensor"),
    (axes.KV_HEADS, "tensor"),
    (axes.MLP, "tensor"),
    (axes.VOCAB, "tensor"),
    (axes.VISION_HEADS, "tensor"),
    (axes.VISION_MLP, "tensor"),
)
"""Each layer is computed by several devices, which exchange activations."""

DECODING: Rules = ((axes.ACTIVATION_BATCH, "data"), *HEADS_AND_WIDTHS)
"""Every weight and every key stays where it is, activations of one token travel: decoding is bound by memory."""

ONE_AXIS: Rules = (
    (axes.EMBED, "fsdp"),
    (axes.VISION_EMBED, "fsdp"),
    (axes.MLP, "fsdp"),
    (axes.VISION_MLP, "fsdp"),
    (axes.VOCAB, "fsdp"),
    (axes.PROJECTOR_IN, "fsdp"),
    (axes.HEADS, "fsdp"),
    (axes.KV_HEADS, "fsdp"),
    (axes.VISION_HEADS, "fsdp"),
)
"""Every matrix is cut along one of its axes, the first of these that divides."""

ROWS_AND_TOKENS: Rules = (
    (axes.ACTIVATION_BATCH, ("data", "fsdp")),
    (axes.ACTIVATION_BATCH, "data"),
    (axes.ACTIVATION_LENGTH, "seq"),
    # Tiles are no part of a sequence: the devices that share a row share its tiles out.
    (axes.ACTIVATION_TILES, ("data", "fsdp", "seq")),
    (axes.ACTIVATION_TILES, ("data", "fsdp")),
)
"""Each device computes some rows, or some tokens of some rows, through all of the model."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How training is split over a mesh.

    Attributes:
      parameters: where parameters lie between steps.
      states: where gradients and the optimiser's state lie.
      computation: how activations are split, and the parameters of a layer while it is computed.
    """

    parameters: Rules
    states: Rules
    computation: Rules = ROWS_AND_TOKENS


_BOTH = (*HEADS_AND_WIDTHS, *ONE_AXIS)
_COMPUTED_TOGETHER = (*ROWS_AND_TOKENS, *HEADS_AND_WIDTHS)

STRATEGIES = {
    "zero3": Strategy(ONE_AXIS, ONE_AXIS),
    "zero2": Strategy((), ONE_AXIS),
    "tensor": Strategy(HEADS_AND_WIDTHS, HEADS_AND_WIDTHS, _COMPUTED_TOGETHER),
    "zero3_tensor": Strategy(_BOTH, _BOTH, _COMPUTED_TOGETHER),
    "zero2_tensor": Strategy(HEADS_AND_WIDTHS, _BOTH, _COMPUTED_TOGETHER),
}
"""ZeRO (arXiv 1910.02054), stages 3 and 2; Megatron's tensor parallelism (arXiv 1909.08053); and both."""


def parameter_names(model: VisionLanguageModel) -> dict[str, Names]:
    """Logical axis names of each parameter of a module, by path."""
    return {path: tuple(leaf.names) for path, leaf in flatten(abstract_parameters(model)).items()}


def leaf_names(path: str, leaf: Any, names: Mapping[str, Names]) -> Any:
    """Logical names of one leaf of a parameter tree; of each of its arrays where it is quantised.

    Args:
      path: of the leaf. `.../lora_a` and `.../lora_b` are the factors of the kernel beside them.
      leaf: an array or `QuantizedTensor`, or the shapes of one.
      names: of the model's own parameters; one that is not in it is never split.
    """
    parent, _, last = path.rpartition("/")
    if last in ("lora_a", "lora_b") and f"{parent}/kernel" in names:
        kernel = tuple(names[f"{parent}/kernel"])
        layers = kernel[:1] if kernel[0] == axes.LAYERS else ()
        shared = leaf.ndim - len(layers) - 1
        if last == "lora_a":
            return (*kernel[: len(layers) + shared], axes.LORA_RANK)
        return (*layers, axes.LORA_RANK, *kernel[len(kernel) - shared :])
    if isinstance(leaf, QuantizedTensor):
        kernel = tuple(names.get(path, ()))[len(leaf.layer_shape) :]
        kernel = kernel or (None,) * (len(leaf.input_shape) + len(leaf.output_shape))
        return quantized_names(leaf, kernel[: len(leaf.input_shape)], kernel[len(leaf.input_shape) :])
    return tuple(names.get(path, (None,) * leaf.ndim))


def leaf_sharding(path: str, leaf: Any, names: Mapping[str, Names], mesh: Mesh, rules: Rules) -> Any:
    """The sharding of one leaf of a parameter tree; of each of its arrays where it is quantised.

    Biases and other vectors are not split over `fsdp`: they take no room, and a layer would wait for each of them.

    Args:
      path, leaf, names: see `leaf_names`.
      mesh, rules: see `partition`.
    """
    leaf_axes = leaf_names(path, leaf, names)
    if path.endswith("/bias") or not isinstance(leaf, QuantizedTensor) and leaf.ndim - (axes.LAYERS in leaf_axes) < 2:
        rules = [rule for rule in rules if rule[1] != "fsdp"]

    def sharding(array, array_axes):
        return NamedSharding(mesh, partition(array_axes, array.shape, mesh, rules))

    return jax.tree.map(sharding, leaf, leaf_axes)


def cache_shardings(cache: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of each array of a key-value cache: rows and kv heads are split."""

    def sharding(leaf):
        # Keys, values and their scales are [B, S, K, ...], the structure [B, S], the length is a scalar.
        names = {4: (axes.ACTIVATION_BATCH, None, axes.KV_HEADS, None), 2: (axes.ACTIVATION_BATCH, None), 0: ()}
        return NamedSharding(mesh, partition(names[leaf.ndim], leaf.shape, mesh, rules))

    return jax.tree.map(sharding, cache)
