"""Conversion between layouts, on the reference checkpoints."""

import dataclasses

import numpy as np
import pytest

from phantom_jax import cli, conversion, verification
from phantom_jax.checkpoints import model_folder
from phantom_jax.errors import InputError


@pytest.mark.parametrize(("name", "layout"), [("phantom-0.5b", "phantom"), ("llava-hf", "llava-hf")])
def test_there_and_back(golden, tmp_path, name, layout):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    lines = conversion.convert(str(golden / name), ours, layout="ours", verify=True)
    assert any(line.startswith("read back: ") and "all equal" in line for line in lines)
    conversion.convert(ours, back, layout=layout, verify=True)
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 0


def test_a_target_that_holds_something_is_left_alone(golden, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        conversion.convert(str(golden / "phantom-0.5b"), str(tmp_path), layout="ours")
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_verb(golden, tmp_path, capsys):
    arguments = [f"--source={golden / 'llava-hf'}", f"--target={tmp_path / 'new'}", "--to=phantom"]
    assert cli.main(["convert", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "new").exists()


def test_damage_on_the_way_is_found(golden, tmp_path, monkeypatch):
    write = model_folder.write

    def damaged(checkpoint, *arguments, **named):
        norm = checkpoint.params["language_model"]["final_norm"]
        params = {**checkpoint.params, "language_model": {**checkpoint.params["language_model"]}}
        params["language_model"]["final_norm"] = {"scale": np.asarray(norm["scale"]) + np.float32(1e-6)}
        write(dataclasses.replace(checkpoint, params=params), *arguments, **named)

    monkeypatch.setattr(model_folder, "write", damaged)
    with pytest.raises(RuntimeError, match="reads back differently: params/language_model/final_norm/scale has other"):
        conversion.convert(str(golden / "phantom-0.5b"), str(tmp_path / "new"), layout="ours", verify=True)


def test_differences_names_each_kind():
    left = {"a": np.ones(2), "b": np.ones(2, np.float32), "c": np.zeros(1), "d": np.ones(1)}
    right = {"a": np.ones(2), "b": np.ones(2), "c": -np.zeros(1), "e": np.ones(1)}
    assert verification.differences(left, right) == [
        "d is on one side only",
        "e is on one side only",
        "b is float32[2] and float64[2]",
        "c has other values",
    ]
