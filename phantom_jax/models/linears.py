"""Which parameters are kernels of linear maps `y = x W`, by path: what low-rank factors and few bits are for.

Embeddings, norms and convolutions are none. Neither are the phantom linears, which work on single heads: their rows of
64 to 128 numbers give little to save, and low-rank factors of them would be as large as they are.
"""

import re
from collections.abc import Iterable, Sequence

from phantom_jax.patterns import match

HEAD = "language_model/head/kernel"

# Stacked layers are `layers`, layers of their own `layers_0`, `layers_1`, ...
_KERNEL = re.compile(
    r"language_model/(layers(_\d+)?/(attention/(query|key|value|(?P<out>out))|gate|up|down)|head)/kernel"
    r"|vision_tower/layers/(query|key|value|(?P<tower_out>out)|up|down)/kernel"
    r"|projector/linear_[12]/kernel"
)


def linear_inputs(path: str) -> int | None:
    """How many axes the kernel at a path contracts, layer axes not counted; None where it is no linear map's."""
    found = _KERNEL.fullmatch(path)
    if found is None:
        return None
    return 2 if found["out"] or found["tower_out"] else 1


def match_linears(patterns: Sequence[str], paths: Iterable[str], *, what: str) -> set[str]:
    """The kernels of linear maps that any of the patterns matches.

    The head is matched only by a pattern with `head` among its components: LLaVA and PEFT leave it out of "all linear
    maps", and an error in it reaches the probabilities of tokens directly.

    Args:
      patterns: globs over whole paths of kernels, see `patterns`.
      paths: of all parameters.
      what: the config key that the patterns come from, for the message.

    Raises:
      InputError: a pattern matches none; names the nearest paths.
    """
    kernels = [path for path in paths if linear_inputs(path) is not None]
    chosen: set[str] = set()
    for pattern in patterns:
        named = "head" in pattern.split("/")
        chosen |= match(
            [pattern], [path for path in kernels if named or path != HEAD], what=what, noun="kernel of a linear map"
        )
    return chosen


def layer_axes(path: str) -> int:
    """How many axes of the array at a path count layers."""
    return 1 if "/layers/" in path else 0
