"""Low-rank adapters at rest, and what a model becomes with one.

An adapter changes a kernel W of ours, its input axes flattened and its output axes flattened, into W + s A B with
A [in, r], B [r, out] and s = alpha / r (Hu et al., arXiv 2106.09685), or alpha / sqrt(r) where the rank is stabilised
(Kalajdzievski, arXiv 2312.03732).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phantom_jax.checkpoints import hf, hf_config
from phantom_jax.checkpoints.arrays import Box, StoredArray, cast
from phantom_jax.data.conversation import describe_template, template_names
from phantom_jax.errors import InputError
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.processor import Processor


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change of one kernel, or of one kernel of every layer.

    Attributes:
      a: [layers, *in, r], in the kernel's own input axes; without the first axis for a kernel outside the layers.
      b: [layers, r, *out].
      ranks: of each layer, r the largest of them; what a layer has beyond its own rank is not read. 0: the layer is not
        adapted. One number for a kernel outside the layers.
      alphas: of each layer.
    """

    a: Any
    b: Any
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What training on top of a frozen model gives.

    Attributes:
      config: of the model that it adapts.
      published: the outside layout of that model; PEFT's names follow from it.
      tokens: special ids of that model.
      low_rank: by path of the kernel, `params/language_model/layers/attention/query/kernel`.
      others: parameters that come whole, by path, in their form in the model: they were trained in full, or PEFT put a
        head that it adapts beside its factors. They replace those of the model before the low-rank changes.
      dropout: on the input of A, in training.
      rank_stabilized: whether the update is scaled by alpha / sqrt(r).
      base: name or folder of that model, for whoever loads the adapter elsewhere; empty where it is not known.
      base_numbers: the first numbers of kernels of that model, by path, see `base_numbers`; empty where not known.
      template: name of the conversation template that it was trained with; None where it is not known.
      naming: PEFT's names that it came with, one of `adapter_names.NAMINGS`; None for the default ones.
      settings: the `adapter_config.json` that it came with.
      dropped: tensors that were left out because they change nothing: LoRA of the vision tower that was never trained.
    """

    config: VisionLanguageConfig
    published: hf_config.Published
    tokens: hf_config.TokenIds
    low_rank: Mapping[str, LowRank]
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0
    rank_stabilized: bool = False
    base: str = ""
    base_numbers: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    template: str | None = None
    naming: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor s of a layer; 0 without a rank."""
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank) if rank else 0.0

    @property
    def size(self) -> int:
        """Numbers in it, without the padding of layers that have a lower rank than others."""
        count = sum(leaf.size for leaf in self.others.values())
        for change in self.low_rank.values():
            each = (change.a.size + change.b.size) // (len(change.ranks) * max(change.ranks))
            count += each * sum(change.ranks)
        return count

    def check_template(self, processor: Processor | None) -> None:
        """Raises an `InputError` where a model's processor has another template than the adapter was trained with."""
        if processor is None or self.template is None or self.template in template_names(processor.template):
            return
        raise InputError(
            f"the adapter was trained with the template {self.template}, the model has "
            f"{describe_template(processor.template)}: store the adapter's with the model first, "
            f"convert --template={self.template}"
        )

    def check(self, where: str) -> None:
        """Compares the shapes with those of the model that it is for; `where` names the source in the error.

        Raises:
          InputError: one does not fit.
        """
        shapes = hf.shapes(self.config)
        meant = f": the adapter is for {self.base}" if self.base else ""
        if not self.low_rank and not self.others:
            raise InputError(f"{where} changes nothing: it holds neither low-rank factors nor whole parameters")
        for path, array in self.others.items():
            if tuple(array.shape) != shapes.get(path):
                raise InputError(
                    f"{where} holds {path} as {list(array.shape)}, the model has {shapes.get(path)}{meant}"
                )
        for path, change in self.low_rank.items():
            stacked = in_layers(path)
            lead, a, b = shapes.get(path, ())[:stacked], tuple(change.a.shape), tuple(change.b.shape)
            product = (*a[:-1], *b[stacked + 1 :])
            layers = lead[0] if lead else 1
            if (
                product != shapes.get(path)
                or (*lead, a[-1]) != b[: stacked + 1]
                or not len(change.ranks) == len(change.alphas) == layers
                or a[-1] != max(change.ranks)
                or a[-1] == 0
            ):
                raise InputError(
                    f"{where} holds factors {list(a)} and {list(b)} of ranks {change.ranks} for {path}, which is "
                    f"{shapes.get(path)} in the model{meant}"
                )


def base_numbers(flat: Mapping[str, Any], kernels: Sequence[str]) -> dict[str, list[float]]:
    """By what the model of an adapter is told from another one of the same shapes: eight numbers of each kernel.

    Args:
      flat: parameters of the model by path, `params/...`.
      kernels: paths of the kernels that are adapted, without `params/`.
    """
    paths = [f"params/{path}" for path in kernels]
    return {path: _first_numbers(flat[path]) for path in paths if not isinstance(flat[path], QuantizedTensor)}


def _first_numbers(kernel: Any) -> list[float]:
    first = (*[slice(0, 1)] * (len(kernel.shape) - 1), slice(0, min(8, kernel.shape[-1])))
    return np.asarray(kernel[first]).astype(np.float64).reshape(-1).tolist()


def in_layers(path: str) -> bool:
    """Whether the parameter's first axis counts layers."""
    return "/layers/" in path


def merge(base: hf.Checkpoint, adapter: Adapter) -> hf.Checkpoint:
    """The base with the adapter worked in; nothing is computed until a part of a kernel is asked for.

    Kernels are summed in float32 and rounded once, to the base's dtype.

    Args:
      base: of 16 or 32 bits. An adapter that was trained on a quantised model belongs on the weights before that.
      adapter: for a model of the same shape.

    Raises:
      InputError: the base is quantised, or the adapter is for another model.
    """
    flat = base.flat()
    if any(isinstance(leaf, QuantizedTensor) for leaf in flat.values()):
        raise InputError("the base is quantised: merge into the 16-bit model that it was made from")
    adapter.check("the adapter")
    touched = {*adapter.low_rank, *adapter.others}
    for path, shape in hf.shapes(adapter.config).items():
        if path in touched or path.startswith(("params/language_model/", "params/projector/")):
            found = tuple(flat[path].shape) if path in flat else None
            if found != shape:
                raise InputError(
                    f"the adapter is for another model: {path} is {shape} there and {found or 'absent'} here. Give the "
                    f"model that it was trained on{', ' + adapter.base if adapter.base else ''}"
                )
    for path, numbers in adapter.base_numbers.items():
        found = _first_numbers(flat[path])
        # A base may have been rounded to bfloat16 since.
        if not np.allclose(found, numbers, rtol=2**-7, atol=1e-6):
            raise InputError(
                f"the adapter was trained on another model of the same shape: {path} begins with {numbers[0]:.6g} there"
                f" and with {found[0]:.6g} here. Give the model that it was trained on, {adapter.base}"
            )
    for path, whole in adapter.others.items():
        flat[path] = cast(whole, flat[path].dtype)
    for path, change in adapter.low_rank.items():
        scalings = [adapter.scaling(*pair) for pair in zip(change.ranks, change.alphas, strict=True)]
        flat[path] = _changed(flat[path], change, scalings, in_layers(path))
    return base.with_flat(flat)


def _changed(kernel: Any, change: LowRank, scalings: list[float], stacked: bool) -> StoredArray:
    inputs = len(change.a.shape) - 1 - stacked

    def read(box: Box) -> np.ndarray:
        whole = np.asarray(kernel[box]).astype(np.float32)
        axes = box[stacked:]
        for place, layer in enumerate(range(box[0].start, box[0].stop) if stacked else (0,)):
            rank = slice(0, change.ranks[layer])
            if not rank.stop:
                continue
            lead = (layer,) if stacked else ()
            a = np.asarray(change.a[(*lead, *axes[:inputs], rank)]).astype(np.float32)
            b = np.asarray(change.b[(*lead, rank, *axes[inputs:])]).astype(np.float32)
            part = whole[place] if stacked else whole
            product = a.reshape(-1, rank.stop) @ b.reshape(rank.stop, -1)
            part += (scalings[layer] * product).reshape(part.shape)
        return whole.astype(kernel.dtype)

    return StoredArray(kernel.shape, kernel.dtype, read, getattr(kernel, "block_axis", 0))
