"""What the recipes of both families have in common."""

import difflib
from collections.abc import Iterable
from typing import Any

from phantom_jax.errors import InputError


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises an `InputError` that names the nearest where a variant's value is none of the choices."""
    words = {str(choice): choice for choice in choices}
    if str(value) not in words:
        near = difflib.get_close_matches(str(value), words, n=1)
        hint = f" Did you mean {name}={near[0]}?" if near else ""
        raise InputError(f"Variant {name}={value} does not exist.{hint} There are: {', '.join(words)}.")


def steps_of(rows: int, batch_size: int) -> int:
    """Steps of one pass over so many rows. The last batch may be filled up with rows of the next pass."""
    return -(-rows // batch_size)


def make_smoke(config: Any, model: dict[str, Any], *, max_length: int) -> None:
    """Turns a recipe into two steps of each phase on handwritten numbers, on one device.

    Phases, objectives, schedules, adapters and quantised kinds stay the recipe's; sizes do not.

    Args:
      config: the recipe, changed in place.
      model: name and overrides of a tiny model of the family.
      max_length: tokens that a question about a number takes at most.
    """
    settings = {key: config.model[key] for key in ("dtype", "remat")}
    config.model = {"weights": "", "attention_backend": "xla", **settings, **model}
    config.data.name = "handwritten_numbers"
    config.processor.update(tile_size=32, max_length=max_length)
    config.mesh.update(data=1, fsdp=1, tensor=1, seq=1)
    for phase in config.phases:
        phase.batch_size, phase.accumulation, phase.steps = 4, min(phase.accumulation, 2), 2
        phase.data.sources = {}
        if phase.lora.rank:
            phase.lora.alpha *= 4 / phase.lora.rank
            phase.lora.rank = 4
    config.log_every = 1
