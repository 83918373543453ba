"""What a model and a step of training cost: parameters, FLOPs, bytes, share of a chip's peak, node-hours, dollars.

All of it is arithmetic over shapes; nothing is allocated. FLOPs are those that the mathematics needs, two for each
multiply-add of a matrix product: what is computed again to save memory, masked scores and padding do not count. A
parameter in a matrix takes 2 a token forward, 2 backward where a gradient passes through it, and 2 more where it
trains: 6N in full, 4N with frozen weights and 6 for each parameter of their adapters, 2N before the first one that
trains. Norms, biases, activation functions and the optimiser are left out, and so is what a row's start-of-sequence
token is expanded to.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.linen import meta

from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.vlm import VisionLanguageConfig, VisionLanguageModel, abstract_parameters
from phantom_jax.trees import flatten

GROUPS = ("vision_tower", "projector", "embeddings", "language_model", "phantom", "head")
"""Parts of a model. `language_model` is the layers and the final norm, without embeddings, head and phantom."""

PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
)
"""Dense bfloat16 FLOPs a second by the beginning of a `device_kind`, the first that fits. TPUs: Google Cloud's pages on
each version. GPUs: NVIDIA's data sheets, whose figures with sparsity are twice as large."""

GPUS_PER_NODE = 8
DOLLARS_PER_NODE_HOUR = 13.63
"""The scaling study's node and price: 8 A100 of 80 GB on Azure (arXiv 2309.09958, section 2)."""


def parameter_shapes(config: VisionLanguageConfig) -> dict[str, Any]:
    """Shapes of all parameters of a model as nested dictionaries."""
    return meta.unbox(abstract_parameters(VisionLanguageModel(config)))


def group_of(path: str) -> str:
    """Which of `GROUPS` the parameter of a path belongs to; an adapter belongs where its linear map does."""
    parts = path.split("/")
    if parts[0] != "language_model":
        return parts[0]
    if "phantom" in parts:
        return "phantom"
    return {"embedding": "embeddings", "head": "head"}.get(parts[1], "language_model")


def count_parameters(params: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters in each of `GROUPS`, 0 where there are none.

    Args:
      params: any tree of parameters or of their shapes: a whole model, what trains of it, adapters.
    """
    counts = dict.fromkeys(GROUPS, 0)
    for path, leaf in flatten(params).items():
        counts[group_of(path)] += math.prod(leaf.shape)
    return counts


def lora_parameters(config: VisionLanguageConfig, rank: int) -> int:
    """Parameters of adapters on the seven linear maps of each decoder layer: rank x (inputs + outputs) of each map."""
    decoder = config.language_model
    width, mlp = decoder.embed_dim, decoder.mlp_dim
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    sides = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + mlp)
    return decoder.num_layers * rank * sides


def count_bytes(trainable: Any, frozen: Any, optimizer_state: Any) -> dict[str, int]:
    """Bytes that a step holds by kind, over all devices: `trainable`, `frozen`, `optimizer` and `gradients`.

    Args:
      trainable, frozen, optimizer_state: trees of arrays or of their shapes and types. Gradients are as large as what
        trains.
    """
    kinds = {"trainable": trainable, "frozen": frozen, "optimizer": optimizer_state, "gradients": trainable}
    return {
        kind: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for kind, tree in kinds.items()
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to compute in a batch.

    Attributes:
      tokens: real ones, without padding.
      pairs: of a token and one that it sees, itself included: `positions + 1` summed over the real tokens.
      targets: tokens that predict one. Only there logits are needed.
      tiles: images as the tower takes them.
    """

    tokens: float
    pairs: float
    targets: float
    tiles: float


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by what computes them: attention counts where it happens, embeddings cost none."""

    vision_tower: float
    projector: float
    language_model: float
    phantom: float
    head: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def step_flops(config: VisionLanguageConfig, trainable: Mapping[str, Any]) -> Callable[[Work], Flops]:
    """A function that gives the FLOPs of loss and gradients, and so of a training step, from what is in its batch.

    Args:
      config: the model.
      trainable: the tree that gradients are taken of, or its shapes: a part of the model's, with adapters as
        `lora_a` and `lora_b` beside the kernels that they adapt. Empty for the forward pass alone.
    """
    decoder, tower = config.language_model, config.vision_tower
    whole, trains, adapters = _matrices(parameter_shapes(config)), _matrices(trainable), _adapters(trainable)
    present = {group for group, count in count_parameters(trainable).items() if count}
    if decoder.tie_embeddings:
        whole["head"] = decoder.vocab_size * decoder.embed_dim
        trains["head"] = whole["head"] if "embeddings" in present else 0

    # The gradient comes from the loss and passes everything behind the first part that trains.
    passes, before = {}, set()
    for group in ("vision_tower", "projector", "language_model", "head"):
        before |= {group} & present
        if group == "language_model":
            before |= {"embeddings", "phantom"} & present
        passes[group] = bool(before)

    def linear(group: str) -> float:
        """FLOPs of one token in the matrices of a group and their adapters."""
        return (2 + 2 * passes[group]) * whole[group] + 2 * trains[group] + 6 * adapters[group]

    def product(group: str) -> int:
        """FLOPs of a multiply-add of two activations, with what both of their gradients need."""
        return 6 if passes[group] else 2

    patches = tower.grid**2 + 1
    tower_pairs = 2 * tower.embed_dim * tower.num_layers * patches**2
    tile = patches * linear("vision_tower") + tower_pairs * product("vision_tower")
    projected = config.tokens_per_tile * linear("projector")
    # Scores and values, one multiply-add for each channel of each head; the phantom dimension doubles what it expands.
    channels = decoder.num_layers * decoder.num_heads * decoder.head_dim
    phantom = decoder.phantom
    doubled = 0 if phantom is None else phantom.query_key + phantom.value
    pair, phantom_pair = (count * channels * product("language_model") for count in (2, doubled))
    token, target = linear("language_model"), linear("head")
    phantom_token = _phantom_flops(decoder, passes["language_model"], "phantom" in present)

    def of(work: Work) -> Flops:
        return Flops(
            vision_tower=work.tiles * tile,
            projector=work.tiles * projected,
            language_model=work.tokens * token + work.pairs * pair,
            phantom=work.tokens * phantom_token + work.pairs * phantom_pair,
            head=work.targets * target,
        )

    return of


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of a device, by JAX's name for it; None where it is not in `PEAKS`, as CPUs are.

    Also for runs in float32: a share of the same peak can be compared.
    """
    return next((peak for name, peak in PEAKS if device_kind.startswith(name)), None)


def mfu(flops: float, seconds: float, devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: the share of what the devices could have computed. None where their peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops / (seconds * devices * peak)


def node_hours(seconds: float, devices: int, *, devices_per_node: int = GPUS_PER_NODE) -> float:
    """Hours of whole nodes, as the scaling study counts them: wall-clock x GPUs / 8."""
    return seconds / 3600 * devices / devices_per_node


def dollars(node_hours: float, *, epochs: float = 1.0, price: float = DOLLARS_PER_NODE_HOUR) -> float:
    """What training costs: node-hours of an epoch x epochs x price of a node-hour."""
    return node_hours * epochs * price


def _matrices(params: Mapping[str, Any]) -> dict[str, int]:
    """Parameters that stand in matrices which every token of a group goes through."""
    counts = dict.fromkeys(GROUPS, 0)
    for path, leaf in flatten(params).items():
        if path.endswith("kernel") and "phantom" not in path.split("/"):
            counts[group_of(path)] += math.prod(leaf.shape)
    return counts


def _adapters(params: Mapping[str, Any]) -> dict[str, int]:
    counts = dict.fromkeys(GROUPS, 0)
    for path, leaf in flatten(params).items():
        if path.endswith(("/lora_a", "/lora_b")):
            counts[group_of(path)] += math.prod(leaf.shape)
    return counts


def _phantom_flops(decoder: DecoderConfig, passes: bool, trains: bool) -> int:
    """FLOPs of one token: the linear map and the attention over heads of each branch, and the gate."""
    phantom, head_dim = decoder.phantom, decoder.head_dim
    if phantom is None:
        return 0
    heads = phantom.query_key * [decoder.num_heads, decoder.num_kv_heads] + phantom.value * [decoder.num_kv_heads]
    linears = sum(heads) * head_dim**2
    if phantom.value and phantom.gate == "learned":
        linears += 2 * decoder.num_heads * head_dim
    attended = sum(2 * count**2 * head_dim for count in heads)
    return decoder.num_layers * ((2 + 2 * passes + 2 * trains) * linears + (6 if passes else 2) * attended)
