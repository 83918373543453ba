"""Means over the batches of a validation."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def run_validation(step: Callable[[Any], dict[str, Any]], batches: Iterable[Any]) -> dict[str, float]:
    """Metrics of all batches, each the weighted mean of those of `step`.

    Args:
      step: gives sums and weights by name, for one batch; see `step.make_validation_step`.
      batches: all of them, on the devices.

    Returns:
      `validation/NAME` for every name that has weight, and `validation/questions`: how many there were.
    """
    with jax.transfer_guard("disallow"):
        parts = jax.device_get([step(batch) for batch in batches])
    means = {}
    for name in parts[0] if parts else ():
        total, weight = (sum(float(part[name][which]) for part in parts) for which in (0, 1))
        if weight:
            means[f"validation/{name}"] = total / weight
    return means | {"validation/questions": sum(float(part["exact_match"][1]) for part in parts)}
