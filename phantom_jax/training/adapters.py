"""From the trainable tree of a phase with low-rank factors to an adapter at rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from phantom_jax.checkpoints.adapter import Adapter, LowRank
from phantom_jax.checkpoints.adapter_folder import Model
from phantom_jax.lora import Lora, factor_paths
from phantom_jax.models.linears import layer_axes
from phantom_jax.trees import Params, flatten


def adapter_of(
    trainable: Params, lora: Lora, *, model: Model, base: str, numbers: Mapping[str, Sequence[float]], template: str
) -> Adapter:
    """The adapter that a phase has trained.

    Args:
      trainable: its factors, and the parameters that trained in full.
      lora: the adapter as it was trained.
      model: what it adapts, `Checkpoint.description`.
      base: folder of that model.
      numbers: by which that model is told from others, see `checkpoints.adapter.base_numbers`.
      template: name of the conversation template.

    Raises:
      InputError: it does not fit the model.
    """
    flat: dict[str, Any] = jax.device_get(flatten(trainable))
    low_rank = {}
    for path in lora.kernels:
        a, b = (np.asarray(flat.pop(factor)) for factor in factor_paths(path))
        layers = a.shape[0] if layer_axes(path) else 1
        low_rank[f"params/{path}"] = LowRank(a, b, (lora.rank,) * layers, (float(lora.alpha),) * layers)
    others = {f"params/{path}": array for path, array in flat.items()}
    adapter = Adapter(*model, low_rank, others, lora.dropout, base=base, base_numbers=numbers, template=template)
    adapter.check("the trained adapter")
    return adapter
