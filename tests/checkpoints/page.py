"""The commands of docs/checkpoints.md, taken out as they are written, and tried."""

import dataclasses
import pathlib
import re
import shlex

from phantom_jax import cli
from phantom_jax.checkpoints import adapter_folder, model_folder
from phantom_jax.checkpoints.hf_config import detect_format
from phantom_jax.json_files import read_json

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_VARYING = re.compile(r"[0-9a-f]{16}|\d[\d.,]*")


@dataclasses.dataclass
class Step:
    """A command of the shell or a block of Python, and the lines that the page shows below it."""

    language: str
    code: str
    shown: list[str] = dataclasses.field(default_factory=list)

    @property
    def needs_torch(self) -> bool:
        """Pickles, logits of transformers, PEFT."""
        return "--allow_pickle" in self.code or "from peft" in self.code or "--to=llava-hf --verify" in self.code

    def run(self) -> None:
        """Runs it in the current folder; a command must leave what it says, unless the page shows an error."""
        if self.language == "python":
            exec(self.code, {})  # noqa: S102
            return
        program, *arguments = shlex.split(self.code)
        refused = any(line.startswith("error: ") for line in self.shown)
        assert program == "phantom-jax"
        assert cli.main(arguments) == (2 if refused else 0), self.code
        flags = dict(argument.removeprefix("--").split("=") for argument in arguments if "=" in argument)
        if "target" not in flags:
            return
        target = pathlib.Path(flags["target"])
        assert target.exists() != refused, self.code
        if not refused:
            assert _layout(target) == (flags.get("to") or _layout(pathlib.Path(flags["model"]))), self.code

    def check(self, printed: str) -> None:
        """Compares what was printed with the page, which may leave lines out; numbers vary with the models."""
        rest = iter(map(_comparable, printed.splitlines()))
        for line in self.shown:
            pattern = re.escape(_comparable(line)).replace("…", ".*")
            assert any(re.fullmatch(pattern, found) for found in rest), f"{self.code}\ndid not print\n{line}"


def steps(page: pathlib.Path) -> list[Step]:
    found: list[Step] = []
    for language, content in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            found[-1].shown = content.splitlines()
        elif language == "python":
            found.append(Step(language, content))
        else:
            found += [Step(language, line) for line in content.replace("\\\n", "").splitlines()]
    return found


def _layout(folder: pathlib.Path) -> str:
    if adapter_folder.is_adapter(folder):
        return "ours" if (folder / adapter_folder.CONFIG).is_file() else "peft"
    return "ours" if model_folder.is_ours(folder) else detect_format(read_json(folder / "config.json"))


def _comparable(line: str) -> str:
    return _VARYING.sub("#", line).strip()
