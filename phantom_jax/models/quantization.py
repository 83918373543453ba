"""Which weights of a model are stored in few bits."""

import functools
import operator
import re
from typing import Any

import jax

from phantom_jax.errors import InputError
from phantom_jax.ops import quantize
from phantom_jax.trees import flatten

# Stacked layers are `layers`, layers of their own `layers_0`, `layers_1`, ...
_KERNEL = re.compile(
    r"language_model/layers(?P<index>_\d+)?/(attention/(?P<attention>query|key|value|out)|gate|up|down)/kernel"
)


def quantize_params(params: dict[str, Any], kind: str) -> dict[str, Any]:
    """Quantises the linear maps of the language model's layers: query, key, value, out, gate, up and down.

    They are nearly all of a large model. Everything else keeps its dtype: norms and biases are small; embeddings and
    head are where an error reaches the probabilities of tokens directly; the phantom linears work on single heads,
    whose rows of 64 to 128 numbers give little to save, and decide a branch that is small beside the rest. The released
    Phantom too keeps its phantom linears and its head out of 8 bits. Vision tower and projector run once an image.

    Args:
      params: of a `VisionLanguageModel`, nested dictionaries. CHANGED IN PLACE, kernel after kernel, so that besides
        the model one kernel at a time needs memory, provided that nobody else holds the old ones.
      kind: `int8` or `nf4`, see `ops.quantize`.

    Returns:
      `params`.

    Raises:
      InputError: the kind does not exist, there is nothing to quantise, or it is quantised already.
    """
    if kind not in quantize.KINDS:
        raise InputError(f"weights cannot be quantised to {kind!r}: use one of {', '.join(quantize.KINDS)}")
    matches = [match for match in map(_KERNEL.fullmatch, flatten(params)) if match]
    if not matches:
        raise InputError(
            f"there is no language model to quantise among {', '.join(sorted(params))}: give the parameters of a whole "
            "vision-language model"
        )
    for match in matches:
        *parents, name = match[0].split("/")
        node = functools.reduce(operator.getitem, parents, params)
        if isinstance(node[name], quantize.QuantizedTensor):
            raise InputError(f"{match[0]} is quantised to {node[name].kind} already: quantise the float model instead")
        inputs = 2 if match["attention"] == "out" else 1
        layers = 0 if match["index"] else 1
        # Waiting bounds the memory: dispatched ahead, many kernels would be held in both forms.
        node[name] = jax.block_until_ready(quantize.quantize(node[name], kind, inputs=inputs, layers=layers))
    return params
