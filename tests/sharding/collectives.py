"""What the devices of a compiled program tell one another, read from its text."""

import dataclasses
import re

_LINE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation.

    Attributes:
      kind: `all-gather` for instance.
      arrays: (dtype, shape) of each result, as one device holds it.
      where: the path of functions and modules that it comes from.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    where: str

    @property
    def layers(self) -> str | None:
        """Whose scan over layers it stands in, `language_model` or `vision_tower`; None outside of them."""
        match = re.search(r"(language_model|vision_tower)/while/body", self.where)
        return None if match is None else match[1]


def collectives(program) -> list[Collective]:
    """All of a compiled program, those of a loop's body once."""
    found = []
    for line in program.as_text().splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        arrays = tuple(
            (dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in _ARRAY.findall(match[1])
        )
        name = re.search(r'op_name="([^"]*)"', line)
        found.append(Collective(match[2], arrays, name[1] if name else ""))
    return found
