"""Flags of `convert` and `merge` that do not go together: each is said, none is passed over."""

import json

import pytest

from phantom_jax import cli, conversion
from tests.checkpoints import peft_folder
from tests.checkpoints.refusals import refused


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """Models, adapters and results by name."""
    root = tmp_path_factory.mktemp("folders")
    found = {name: golden / name for name in ("phantom-0.5b", "phantom-1.8b", "llava-hf", "llava-original")}
    found |= {name: root / name for name in ("ours", "int8", "results", "adapter", "llava-adapter", "none")}
    phantom = str(golden / "phantom-0.5b")
    conversion.convert(phantom, str(found["ours"]), layout="ours")
    conversion.convert(phantom, str(found["int8"]), layout="ours", quantize="int8")
    peft_folder.write(found["adapter"], peft_folder.factors(golden / "phantom-0.5b"))
    peft_folder.write(found["llava-adapter"], peft_folder.factors(golden / "llava-hf"))
    found["results"].mkdir()
    right = {"all": {"all": [1, 2]}}
    results = {"source": "numbers", "split": "test", "models": {"first": right, "second": right}}
    (found["results"] / "results.json").write_text(json.dumps(results))
    return {name.replace("-", "_").replace(".", "_"): path for name, path in found.items()}


CONVERT = {
    "nothing": ("", "needs --source, or --vision and --llm"),
    "vision alone": ("--vision={llava_hf}", "needs --source, or --vision and --llm"),
    "llm alone": ("--llm={llava_hf}", "needs --source, or --vision and --llm"),
    "llm beside source": ("--source={ours} --llm={llava_hf} --vision={llava_hf}", "give one of them"),
    "projector": ("--source={ours} --projector={llava_hf}", "--projector is for a new model"),
    "projector kind": ("--source={ours} --projector_kind=linear", "--projector_kind is for a new model"),
    "seed": ("--source={ours} --seed=1", "--seed is for a new model"),
    "no kind": ("--llm=a --vision=b --projector_kind=conv", "--projector_kind=conv"),
    "no layout": ("--source={ours} --to=x", "flag --to=x"),
    "no dtype": ("--source={ours} --dtype=int8", "flag --dtype=int8"),
    "no quantisation": ("--source={ours} --quantize=int3", "flag --quantize=int3"),
    "no source": ("--source={none}", "there is no folder '{none}'"),
    "a file": ("--source={ours}/phantom_jax.json", "there is no folder '{ours}/phantom_jax.json'"),
    "no model": ("--source={results}", "{results} holds neither phantom_jax.json nor config.json"),
    "base of a model": ("--source={ours} --base={ours}", "{ours} is none: leave it out"),
    "base of a new model": ("--llm={ours} --vision={ours} --base={ours}", "a new model of {ours} and {ours} is none"),
    "quantised and published": ("--source={phantom_0_5b} --quantize=int8 --to=phantom", "set --to=ours, or leave"),
    "dtype of quantised": ("--source={int8} --dtype=float32", "the weights are quantised to int8", "leave dtype out"),
    "quantised again": ("--source={int8} --quantize=nf4", "quantised to int8 already: leave quantize out"),
    "quantised published": ("--source={int8} --to=phantom", "quantised to int8, and phantom has no form for that"),
    "tower inside": ("--source={phantom_0_5b} --vision={llava_hf}", "config.json", "a vision tower is"),
    "tower inside ours": ("--source={ours} --vision={llava_hf}", "{ours}", "leave --vision out"),
    "llm is no language model": ("--llm={ours} --vision={ours}", "{ours}"),
    "whole to peft": ("--source={ours} --to=peft", "{ours} is a whole model, peft is a layout of adapters"),
    "adapter to phantom": ("--source={adapter} --base={ours} --to=phantom", "{adapter} is an adapter", "`merge`"),
    "adapter to llava-hf": ("--source={adapter} --base={ours} --to=llava-hf", "{adapter} is an adapter", "`merge`"),
    "adapter alone": ("--source={adapter}", "{adapter} has no config.json", "some/base"),
    "adapter of another": ("--source={adapter} --base={phantom_1_8b}", "{adapter} holds", "no place for"),
    "adapter of a llava": ("--source={adapter} --base={llava_hf}", "{adapter} holds", "no place for"),
    "adapter of an adapter": ("--source={adapter} --base={adapter}", "{adapter} holds an adapter and no model"),
    "adapter of none": ("--source={adapter} --base={none}", "there is no model folder '{none}'"),
    "adapter's dtype": ("--source={adapter} --base={ours} --dtype=float16", "--dtype is for whole models"),
    "adapter's bits": ("--source={adapter} --base={ours} --quantize=int8", "--quantize is for whole models"),
    "adapter's template": ("--source={adapter} --base={ours} --template=plain", "--template is for whole models"),
    "adapter's tower": ("--source={adapter} --base={ours} --vision={ours}", "--vision is for whole models"),
    "adapter verified": ("--source={adapter} --base={ours} --verify", "--verify is for whole models"),
    "phantom to llava": ("--source={phantom_0_5b} --to=llava-hf", "has 'pixel_shuffle'"),
    "llava to phantom": ("--source={llava_hf} --to=phantom", "has 'mlp2x_gelu'"),
    "template without tokenizer": ("--source={ours} --template=plain", "{ours} has no tokenizer", "leave it out"),
    "no results": ("--source={ours} --evaluation={none}", "{none} holds no results.json", "`evaluate --output`"),
    "others' results": ("--source={ours} --evaluation={results}", "has results of first, second", "'ours'"),
}


@pytest.mark.parametrize(("flags", "texts"), [(each[0], each[1:]) for each in CONVERT.values()], ids=CONVERT.keys())
def test_convert(flags, texts, folders, tmp_path, capsys):
    command = ["convert", f"--target={tmp_path / 'new'}", "--to=ours", *flags.format(**folders).split()]
    refused(capsys, tmp_path, command, *(text.format(**folders) for text in texts))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"models": []}', '{"models": {"a": 3}}'])
def test_results_that_are_none(content, folders, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    command = ["convert", f"--source={folders['ours']}", f"--target={tmp_path / 'new'}", "--to=phantom"]
    refused(capsys, tmp_path, [*command, f"--evaluation={tmp_path}"], tmp_path / "results.json")


MERGE = {
    "another model": ("--model={phantom_1_8b} --adapter={adapter}", "{adapter} holds", "no place for"),
    "a llava": ("--model={llava_hf} --adapter={adapter}", "{adapter} holds", "no place for"),
    "a phantom": ("--model={phantom_0_5b} --adapter={llava_adapter}", "{llava_adapter} holds", "no place for"),
    "quantised": ("--model={int8} --adapter={adapter}", "quantised: merge into the 16-bit model"),
    "model as adapter": ("--model={ours} --adapter={phantom_0_5b}", "{phantom_0_5b} holds neither"),
    "our model as adapter": ("--model={ours} --adapter={ours}", "{ours} holds neither phantom_jax_adapter.json"),
    "adapter as model": ("--model={adapter} --adapter={adapter}", "{adapter} holds an adapter and no model"),
    "no model": ("--model={none} --adapter={adapter}", "there is no model folder '{none}'"),
    "no adapter": ("--model={ours} --adapter={none}", "{none} holds neither", "it holds no folder"),
    "to peft": ("--model={ours} --adapter={adapter} --to=peft", "flag --to=peft"),
    "to llava": ("--model={ours} --adapter={adapter} --to=llava-hf", "has 'pixel_shuffle'"),
    "half": ("--model={ours}", "merge needs --adapter"),
}


@pytest.mark.parametrize(("flags", "texts"), [(each[0], each[1:]) for each in MERGE.values()], ids=MERGE.keys())
def test_merge(flags, texts, folders, tmp_path, capsys):
    command = ["merge", f"--target={tmp_path / 'new'}", *flags.format(**folders).split()]
    refused(capsys, tmp_path, command, *(text.format(**folders) for text in texts))


def test_what_a_killed_process_left_of_pickles_goes(folders, tmp_path):
    (tmp_path / ".new.pickled" / "0").mkdir(parents=True)
    (tmp_path / ".new.pickled" / "0" / "half.safetensors").write_text("")
    command = ["convert", f"--source={folders['phantom_0_5b']}", f"--target={tmp_path / 'new'}", "--to=phantom"]
    assert cli.main([*command, "--allow_pickle"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
