"""What README.md and docs/ say against the code: messages, verbs, files, phases."""

import ast
import re
import runpy

import pytest

from phantom_jax import config as configs


def _template(node):
    """A string of the source, with … where a value is put in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_template(node.left) or "…") + (_template(node.right) or "…")
    return None


@pytest.fixture(scope="module")
def messages(repository):
    """All strings of the package, and the lines of the scripts."""
    found = []
    for path in sorted((repository / "phantom_jax").rglob("*.py")):
        found += filter(None, map(_template, ast.walk(ast.parse(path.read_text()))))
    for path in sorted((repository / "launch").glob("*.sh")):
        found += path.read_text().splitlines()
    return found


def test_every_explained_message_exists(repository, messages):
    text = (repository / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)
    assert len(headings) > 20
    missing = []
    for heading in headings:
        # In a heading … stands for any text; what lies between must come in this order in one message.
        pattern = re.compile(".*".join(map(re.escape, filter(None, re.split(r"\s*…\s*", heading)))), re.DOTALL)
        if not any(pattern.search(message) for message in messages):
            missing.append(heading)
    assert not missing


def test_commands_and_links_in_the_docs_exist(repository):
    """Verbs, configs and files that README.md and docs/ name."""
    from phantom_jax.cli import _VERBS

    for path in [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]:
        text = path.read_text()
        for verb in re.findall(r"^phantom-jax (\w+)", text, flags=re.MULTILINE):
            assert verb in _VERBS, f"{path.name}: {verb}"
        for name in re.findall(r"(?:configs|launch|docs|phantom_jax)/[\w/]+\.(?:py|sh|md)", text):
            assert (repository / name).is_file() or "NAME" in name, f"{path.name}: {name}"
        assert not re.search(r"FILL_ME|^[A-Z]+_(TRANSCRIPT|TABLE)$", text, flags=re.MULTILINE), f"{path.name} has gaps"
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_guide_explains_every_phase(repository):
    config = runpy.run_path(str(repository / "configs" / "quickstart.py"))["get_config"]()
    text = (repository / "docs" / "quickstart.md").read_text()
    assert re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE) == [phase.name for phase in config.phases]


def test_the_page_on_configs_is_right_and_names_every_key(repository, tmp_path):
    text = (repository / "docs" / "training.md").read_text()
    (tmp_path / "own.py").write_text(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1])
    resolved = configs.resolve(runpy.run_path(str(tmp_path / "own.py"))["get_config"]())
    assert [phase["name"] for phase in resolved["phases"]] == ["pretrain", "step_1"]
    for section in (configs.DEFAULTS, configs.PHASE, configs.OPTIMIZER, configs.GROUP, configs.PHASE["data"]):
        for key in section:
            assert re.search(rf"\b{key}\b", text), key


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md"])
def test_the_example_of_the_library_runs(page, repository, tmp_path, monkeypatch, capsys):
    import dataclasses

    from phantom_jax import pretrained
    from phantom_jax.models.phantom import PhantomConfig
    from tests.generation import tiny
    from tests.models import small

    [code] = re.findall(r"```python\n(.*?)```", (repository / page).read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    decoder = dataclasses.replace(small.DECODER, phantom=PhantomConfig())
    pretrained.save(tiny.handle(decoder), "runs/quickstart/hf")
    tiny.image(48, 16).save("number.png")
    (tmp_path / "example.py").write_text(code)
    runpy.run_path("example.py")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert capsys.readouterr().out.strip()
