"""What importing costs, and what the package's source must not contain."""

import ast
import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "transformers", "orbax", "grain")
COMMANDS = {
    "import": "import phantom_jax; assert {'load', 'save'} <= set(dir(phantom_jax))",
    "help": "from phantom_jax.cli import main; assert main(['--help']) == 0",
    "verb help": "from phantom_jax.cli import main; assert main(['train', '--help']) == 0",
    "chat help": "from phantom_jax.cli import main; assert main(['chat', '--help']) == 0",
    "wrong flags": "from phantom_jax.cli import main; assert main(['generate', '--model=x', '--output=y']) == 2",
    "unknown flag": "from phantom_jax.cli import main; assert main(['train', '--workdr=x']) == 2",
}


@pytest.mark.parametrize("code", COMMANDS.values(), ids=COMMANDS.keys())
def test_loads_nothing_heavy(code, repository):
    check = (
        f"import sys\n{code}\nloaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=repository, stdout=subprocess.DEVNULL)


def _source_files(repository):
    files = sorted((repository / "phantom_jax").rglob("*.py"))
    assert files
    return files


def test_no_code_is_made_from_data(repository):
    """No pickle, eval or exec: a checkpoint, a data set or a config value never becomes code."""
    for path in _source_files(repository):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [node.func.id]
            for name in names:
                banned = name.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve", "eval", "exec"}
                assert not banned, f"{path}:{node.lineno} uses {name}"


def test_remote_code_is_never_trusted(repository):
    for path in _source_files(repository):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}:{node.lineno}"


# Which floor a module stands on: it may import from its own floor and below. Names without a dot are folders or files.
FLOORS = {
    0: ("axes", "batch", "config", "errors", "json_files", "layouts", "sizes", "trees", "version"),
    1: ("ops", "recipes"),
    2: ("models", "objectives"),
    3: ("data", "checkpoints", "processor", "sharding"),
    4: ("generation",),
    5: ("pretrained", "training"),
    6: ("conversion", "evaluation", "report", "verification"),
    7: ("checkpoint_verbs", "cli", "compiled", "generation_verbs", "__init__", "__main__"),
}


def test_lower_floors_do_not_know_higher_ones(repository):
    floor_of = {name: floor for floor, names in FLOORS.items() for name in names}
    for path in _source_files(repository):
        part = path.relative_to(repository / "phantom_jax").parts[0].removesuffix(".py")
        assert part in floor_of, f"{part} stands on no floor: add it to FLOORS"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                modules = [f"{base}.{alias.name}" for alias in node.names] if base == "phantom_jax" else [base]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                if module.startswith("phantom_jax."):
                    other = module.split(".")[1]
                    assert floor_of[other] <= floor_of[part], f"{path}:{node.lineno}: {part} imports {other}"
