"""Conversion between layouts, on the reference checkpoints."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from phantom_jax import cli, conversion, verification
from phantom_jax.checkpoints import model_folder
from phantom_jax.errors import InputError
from tests.checkpoints import peft_folder


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_projector_as_llava_hf(golden, tmp_path, dtype):
    """The identity behind it is of the projector's dtype."""
    source, there, back = str(golden / "llava-original"), str(tmp_path / "there"), str(tmp_path / "back")
    conversion.convert(source, there, layout="llava-hf", dtype=dtype)
    tensors = load_file(tmp_path / "there" / "model.safetensors")
    identity = tensors["multi_modal_projector.linear_2.weight"]
    assert str(identity.dtype) == dtype
    np.testing.assert_array_equal(identity.astype(np.float32), np.eye(len(identity)))
    assert not np.any(tensors["multi_modal_projector.linear_2.bias"])
    conversion.convert(there, back, layout="llava-original", verify=True)


def test_a_quantised_model_has_no_published_layout(golden, tmp_path):
    ours = str(tmp_path / "ours")
    conversion.convert(str(golden / "phantom-0.5b"), ours, layout="ours", quantize="int8")
    with pytest.raises(InputError, match="the model is quantised to int8, and phantom has no form for that"):
        conversion.convert(ours, str(tmp_path / "back"), layout="phantom")
    assert not (tmp_path / "back").exists()


def test_flags_of_whole_models_are_not_ignored_for_adapters(golden, tmp_path):
    base = golden / "llava-hf"
    adapter = str(peft_folder.write(tmp_path / "peft", peft_folder.factors(base), rename=peft_folder.in_memory))
    for flag, value in (("dtype", "bfloat16"), ("template", "llava_v1"), ("verify", True)):
        with pytest.raises(InputError, match=f"is an adapter, --{flag} is for whole models"):
            conversion.convert(adapter, str(tmp_path / "new"), layout="ours", base=str(base), **{flag: value})
    with pytest.raises(InputError, match="there is no folder"):
        conversion.convert(str(tmp_path / "missing"), str(tmp_path / "new"), layout="peft")
    assert not (tmp_path / "new").exists()
