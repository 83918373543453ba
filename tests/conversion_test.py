"""Conversion between layouts, on the reference checkpoints."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint
import pytest
from safetensors.numpy import load_file, save_file

from phantom_jax import cli, conversion, pretrained, verification
from phantom_jax.checkpoints import hf_config, model_folder
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.errors import InputError, Mismatch
from phantom_jax.layouts import STORED_DTYPES
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.trees import flatten
from tests.checkpoints import peft_folder
from tests.models import small


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
    with pytest.raises(Mismatch, match="differently, so it was removed: params/language_model/final_norm/scale has"):
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


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_fewer_bits_on_the_way_in(golden, tmp_path, kind):
    source, target = str(golden / "phantom-1.8b"), str(tmp_path / "ours")
    lines = conversion.convert(source, target, layout="ours", quantize=kind, verify=True)
    stored, at_once = pretrained.load(target), pretrained.load(source, quantize=kind)
    jax.tree.map(np.testing.assert_array_equal, stored.params, at_once.params)
    assert any(f"quantised to {kind}" in line for line in lines)
    meta = json.loads((tmp_path / "ours" / "phantom_jax.json").read_text())
    assert meta["quantization"] == kind and meta["schema_version"] == 2
    # What has few bits can be moved on, and is never quantised twice.
    conversion.convert(target, str(tmp_path / "moved"), layout="ours", verify=True)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / "moved").params, at_once.params)
    with pytest.raises(InputError, match=f"quantised to {kind} already"):
        conversion.convert(target, str(tmp_path / "twice"), layout="ours", quantize="int8")
    with pytest.raises(InputError, match="set --to=ours, or leave quantize out"):
        conversion.convert(source, str(tmp_path / "no"), layout="phantom", quantize=kind)


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_another_dtype_on_the_way_in(golden, tmp_path, dtype):
    source = tmp_path / "source"
    shutil.copytree(golden / "llava-hf", source)
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(config))
    lines = conversion.convert(str(source), str(tmp_path / "new"), layout="llava-hf", dtype=dtype, verify=True)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "new" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].tobytes() == tensor.astype(dtype).tobytes(), name
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == dtype
    assert any("float32 to" in line for line in lines) == (dtype != "float32")


def test_the_report_names_every_tensor(golden, tmp_path):
    conversion.convert(str(golden / "phantom-3.8b"), str(tmp_path / "new"), layout="ours", dtype="bfloat16")
    head, *lines = (tmp_path / "new" / "conversion_report.tsv").read_text().splitlines()
    entries = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert {entry["name"] for entry in entries} == set(load_file(golden / "phantom-3.8b" / "model.safetensors"))
    assert {entry["action"] for entry in entries} == {"transformed"}
    packed = next(entry for entry in entries if entry["name"].endswith("layers.0.self_attn.qkv_proj.weight"))
    kernels = [f"params/language_model/layers/attention/{part}/kernel" for part in ("query", "key", "value")]
    assert packed["parameters"].split(" ") == kernels


def test_results_go_into_the_model_card(golden, tmp_path):
    results = {"source": "numbers", "split": "test", "models": {"phantom-0.5b": {"all": {"all": [3, 4]}}, "other": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    conversion.convert(str(golden / "phantom-0.5b"), str(tmp_path / "new"), layout="phantom", evaluation=str(tmp_path))
    assert "| exact match, numbers test, 4 questions | 0.75 |" in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(InputError, match="has results of phantom-0.5b, other, none of 'llava-hf': give one as NAME="):
        conversion.convert(str(golden / "llava-hf"), str(tmp_path / "x"), layout="ours", evaluation=str(tmp_path))


def test_a_tied_head_stays_tied(tmp_path):
    config = small.with_decoder(phantom=PhantomConfig(), qkv_bias=True, tie_embeddings=True)
    _, params = small.init(config)
    published = hf_config.Published("phantom", "qwen2")
    checkpoint = Checkpoint(config, params, {}, published, hf_config.TokenIds(image=60, eos=(2,)))
    model_folder.write(checkpoint, None, tmp_path / "a", format="phantom")
    conversion.convert(str(tmp_path / "a"), str(tmp_path / "ours"), layout="ours")
    conversion.convert(str(tmp_path / "ours"), str(tmp_path / "b"), layout="phantom", verify=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert not any("lm_head" in name for name in second)
    assert {name: tensor.tobytes() for name, tensor in first.items()} == {
        name: tensor.tobytes() for name, tensor in second.items()
    }
    assert json.loads((tmp_path / "b" / "config.json").read_text())["llm_config"]["tie_word_embeddings"] is True


@pytest.mark.parametrize("layout", ["ours", "phantom"])
def test_orbax_reads_what_is_written(golden, tmp_path, layout):
    """Orbax's own reader gets the same arrays, straight onto its devices."""
    source = golden / "phantom-7b"
    if layout == "phantom":
        conversion.convert(str(source), str(tmp_path / "again"), layout="phantom")
        source = tmp_path / "again"
    conversion.convert(str(source), str(tmp_path / "ours"), layout="ours")
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "ours" / "params")
    expected, _ = model_folder.read(golden / "phantom-7b")
    assert flatten(restored).keys() == expected.flat().keys()
    for path, array in flatten(restored).items():
        assert np.array_equal(np.asarray(array), np.asarray(expected.flat()[path])), path


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
        with pytest.raises(InputError, match=f"is an adapter, and --{flag} is for whole models"):
            conversion.convert(adapter, str(tmp_path / "new"), layout="ours", base=str(base), **{flag: value})
    with pytest.raises(InputError, match="there is no folder"):
        conversion.convert(str(tmp_path / "missing"), str(tmp_path / "new"), layout="peft")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_dtype_that_is_too_small_is_refused(golden, tmp_path, stored):
    source = tmp_path / "source"
    shutil.copytree(golden / "phantom-0.5b", source)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    tensors["vision_proj.1.weight"][3, 5] = -1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match="a weight of -.*e\\+0. overflows in float16: take bfloat16 or float32"):
        conversion.convert(str(source), str(tmp_path / "new"), layout="ours", dtype="float16")
    assert not (tmp_path / "new").exists()
    conversion.convert(str(source), str(tmp_path / "new"), layout="ours", dtype="bfloat16")
