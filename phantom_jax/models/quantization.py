"""Which weights of a model are stored in few bits: query, key, value, out, gate, up and down of the layers.

They are nearly all of a large model. Everything else keeps its dtype: norms and biases are small; embeddings and head
are where an error reaches the probabilities of tokens directly; the phantom linears work on single heads, whose rows of
64 to 128 numbers give little to save, and decide a branch that is small beside the rest. The released Phantom too keeps
its phantom linears and its head out of 8 bits. Vision tower and projector run once an image. Training chooses for
itself, see `quantize_linear`.
"""

from typing import Any

import jax

from phantom_jax.errors import InputError
from phantom_jax.layouts import QUANTIZATIONS
from phantom_jax.models.linears import layer_axes, linear_inputs
from phantom_jax.ops import quantize


def kernel_inputs(path: str) -> int | None:
    """How many axes the kernel at a path contracts; None where it is not one of those that are quantised."""
    return linear_inputs(path) if path.startswith("language_model/layers") else None


def check_kind(kind: str) -> None:
    """Raises an `InputError` where weights cannot be quantised to a kind."""
    if kind not in QUANTIZATIONS:
        raise InputError(f"weights cannot be quantised to {kind!r}: use one of {', '.join(QUANTIZATIONS)}")


def quantize_kernel(path: str, array: Any, kind: str) -> Any:
    """The array at a path of a `VisionLanguageModel`, quantised if it is one of those that are.

    Args:
      path: `language_model/layers/...`, the array stacked, or `language_model/layers_0/...`.
      array: jax's or numpy's.
      kind: `int8` or `nf4`, see `ops.quantize`.

    Raises:
      InputError: it is quantised already.
    """
    return array if kernel_inputs(path) is None else quantize_linear(path, array, kind)


def quantize_linear(path: str, array: Any, kind: str) -> Any:
    """The kernel of any linear map, quantised; in training a phase says which ones are.

    Args:
      path: of the kernel, see `linears`.
      array: jax's or numpy's; stacked layers are quantised one after another.
      kind: `int8` or `nf4`.

    Raises:
      InputError: it is quantised already.
    """
    if isinstance(array, quantize.QuantizedTensor):
        raise InputError(f"{path} is quantised to {array.kind} already: quantise the float model instead")
    # Waiting bounds the memory: dispatched ahead, many kernels would be held in both forms.
    return jax.block_until_ready(quantize.quantize(array, kind, inputs=linear_inputs(path), layers=layer_axes(path)))
