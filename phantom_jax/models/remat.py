"""What a scanned layer keeps of its forward pass for its backward pass, and what is computed again."""

from typing import Any

import jax
from flax import linen as nn

from phantom_jax.ops.attention import OUTPUT

# By what a byte kept saves. Attention costs a row's length for each of its values, more than any product, so its
# output is kept; the projections before it and the one after it come next, at a layer's width for each value, and
# are small. The MLP's products cost as much for each value, but are several times as many values: they, and all that
# is computed element by element (norms, rotation, the phantom halves), are computed again.
QUERY, KEY, VALUE, MIXED = "query", "key", "value", "mixed"
NAMES = (QUERY, KEY, VALUE, OUTPUT, MIXED)

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
}
PRESETS = ("none", *_POLICIES)


def rematerialized(layer: type[nn.Module], preset: str) -> Any:
    """A module class whose instances, scanned, keep what a preset says.

    Args:
      layer: the class of one layer.
      preset: `none` keeps everything; `dots` the products with weights; `names` what is named in `NAMES`; `full`
        nothing but the layer's input.
    """
    if preset not in PRESETS:
        raise ValueError(f"remat {preset!r} does not exist: use one of {', '.join(PRESETS)}")
    if preset == "none":
        return layer
    # In a loop's body nothing can merge the two computations, and preventing it would keep the compiler from fusing.
    return nn.remat(layer, policy=_POLICIES[preset], prevent_cse=False)
