"""PEFT's names of the linear maps of a model.

PEFT calls a module as the model in memory does, which is not always how it is called on disk, and not the same in all
versions of transformers.
"""

import dataclasses
import re
from collections.abc import Iterable

from phantom_jax.checkpoints import hf, names
from phantom_jax.checkpoints.hf_config import Published
from phantom_jax.models.vlm import VisionLanguageConfig

PREFIX = "base_model.model."

_IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}

# By name: the layout whose table is taken, and the prefixes that are called otherwise in memory.
NAMINGS = {
    "llava-hf": ("llava-hf", _IN_MEMORY | {"vision_tower.vision_model.": "model.vision_tower."}),
    # transformers from 4.52 to 5.0: the tower has a level more.
    "llava-hf-5.0": ("llava-hf", _IN_MEMORY | {"vision_tower.": "model.vision_tower."}),
    # transformers before 4.52.
    "llava-hf-4.51": ("llava-hf", {}),
    # Also that of a decoder without its tower.
    "llava-original": ("llava-original", {}),
    "phantom": ("phantom", {}),
    # Phantom's decoder without its tower.
    "phantom-decoder": ("phantom", {"language_model.": ""}),
}
"""In the order of preference where names fit several."""

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_TOWER = re.compile(r"(^|\.)vision_(tower|model)\.")


@dataclasses.dataclass(frozen=True)
class Key:
    """What a tensor's name in a PEFT file says.

    Attributes:
      name: the whole of it.
      module: of a linear map, or the full name of a parameter that was trained as a whole.
      factor: `A`, `B`, or empty for such a parameter.
    """

    name: str
    module: str
    factor: str = ""

    @property
    def in_tower(self) -> bool:
        return _TOWER.search(self.module) is not None


def parse(name: str) -> Key:
    """Takes a tensor's name apart; any name is one of a whole parameter if nothing else."""
    inner = name.removeprefix(PREFIX)
    match = _LORA.fullmatch(inner)
    if match:
        return Key(name, match["module"], match["factor"])
    return Key(name, re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", inner))


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A linear map of a model, or one of every layer.

    Attributes:
      name: the module's, with `{layer}` where there is one a layer.
      row: of the table; our kernels in it are several where the published one packs them.
      inputs: how many input axes our kernels have.
    """

    name: str
    row: names.Row
    inputs: int

    def modules(self) -> list[str]:
        """Names of all layers."""
        return [name.removesuffix(".weight") for name in self.row.names()]

    @property
    def a(self) -> names.Transform:
        """Between PEFT's A [r, in] and ours [*in, r]."""
        return names.Linear(self.inputs)

    @property
    def b(self) -> names.Transform:
        """Between PEFT's B [out, r] and ours [r, *out], one for each kernel."""
        return self.row.transform if isinstance(self.row.transform, names.GroupedQKV) else names.Linear()


def _inputs(row: names.Row) -> int | None:
    transform = row.transform
    if not row.name.endswith(".weight"):
        return None
    if isinstance(transform, names.GroupedQKV):
        return 1
    if isinstance(transform, names.Linear):
        return transform.inputs or None
    # Phantom's gates, from a head to one number.
    gate = isinstance(transform, names.Reshape) and len(transform.published) == 2 and transform.published[0] == 1
    return 1 if gate else None


def rows(config: VisionLanguageConfig, language_model: str, naming: str) -> list[names.Row]:
    """The table of a model under the names that PEFT has for it.

    Args:
      config: the model.
      language_model: as in `Published`.
      naming: one of `NAMINGS`.
    """
    layout, renamed = NAMINGS[naming]
    table = hf.table(config, Published(layout, language_model))
    for old, new in renamed.items():
        table = [
            dataclasses.replace(row, name=new + row.name.removeprefix(old)) if row.name.startswith(old) else row
            for row in table
        ]
    return table


def linears(table: Iterable[names.Row]) -> list[LinearMap]:
    """The rows that are linear maps."""
    found = []
    for row in table:
        inputs = _inputs(row)
        if inputs:
            found.append(LinearMap(row.name.removesuffix(".weight"), row, inputs))
    return found


def fitting(published: Published) -> list[str]:
    """Namings under which adapters for such a model are found, its own first."""
    related = ("phantom",) if published.format == "phantom" else ("llava-hf", "llava-original")
    found = [naming for naming, (layout, _) in NAMINGS.items() if layout in related]
    return sorted(found, key=lambda naming: NAMINGS[naming][0] != published.format)
