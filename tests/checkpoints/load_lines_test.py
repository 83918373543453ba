import ast
import shlex

import pytest

from phantom_jax import pretrained
from phantom_jax.checkpoints.load_lines import adapter_lines, load_lines, serve_line
from phantom_jax.errors import InputError
from phantom_jax.layouts import MODEL_LAYOUTS

PATHS = ["out/model", "/models/my model", 'it\'s "quoted"', "back\\slash", "猫"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", MODEL_LAYOUTS)
def test_lines_are_python_that_names_the_folder(layout, path):
    lines = load_lines(layout, path)
    tree = ast.parse("\n".join(lines))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert path in strings
    assert "model" in [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("layout", ["ours", "phantom", "llava-original"])
def test_our_lines_load(layout, tmp_path, golden):
    source = golden / {"ours": "phantom-0.5b", "phantom": "phantom-0.5b"}.get(layout, layout)
    handle = pretrained.load(source)
    pretrained.save(handle, tmp_path / "model", format=layout)
    names = {}
    exec("\n".join(load_lines(layout, tmp_path / "model")), names)  # noqa: S102
    assert names["model"].model.config == handle.model.config


def test_original_loader_is_named():
    assert any("llava.model.builder import load_pretrained_model" in line for line in load_lines("llava-original", "x"))


def test_adapter_names_its_base():
    lines = adapter_lines("llava-hf", "out/adapter", base="llava-hf/llava-1.5-7b-hf")
    assert sum("'llava-hf/llava-1.5-7b-hf'" in line for line in lines) == 2
    assert sum("'BASE'" in line for line in adapter_lines("llava-hf", "out/adapter")) == 2
    assert not any("peft" in line for line in adapter_lines("phantom", "out/adapter")), "PEFT has no such model"
    lines = adapter_lines("llava-original", "out/adapter", base="lmsys/vicuna-7b-v1.5")
    assert any("--llm=lmsys/vicuna-7b-v1.5" in line for line in lines), "a language model alone is no model to load"
    assert lines[-1] == "model = phantom_jax.load('MODEL', adapter='out/adapter')"


@pytest.mark.parametrize("path", PATHS)
def test_serve_line(path):
    assert shlex.split(serve_line("llava-hf", path)) == ["vllm", "serve", path]
    assert all(serve_line(layout, path) is None for layout in ("ours", "phantom", "llava-original"))


def test_unknown_layout():
    for function in (load_lines, adapter_lines, serve_line):
        with pytest.raises(InputError, match="layout 'onnx' does not exist"):
            function("onnx", "x")
