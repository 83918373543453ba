"""Adapters through the functions of `convert` and `merge`."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import phantom_jax
from phantom_jax.checkpoints import adapter_folder, hf
from phantom_jax.conversion import convert, merge_adapter
from phantom_jax.errors import InputError
from tests.checkpoints import peft_folder


@pytest.fixture
def source(golden, tmp_path):
    """(base, PEFT folder, its factors by published module)."""
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: "layers" in module)
    return base, peft_folder.write(tmp_path / "peft", pairs, rename=peft_folder.in_memory), pairs


def test_to_ours_and_back(source, tmp_path):
    base, folder, _ = source
    convert(str(folder), str(tmp_path / "ours"), layout="ours", base=str(base))
    convert(str(tmp_path / "ours"), str(tmp_path / "again"), layout="peft")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert {name: tensor.tobytes() for name, tensor in after.items()} == {
        name: tensor.tobytes() for name, tensor in before.items()
    }
    settings = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert settings[0].items() <= settings[1].items()


def test_without_the_model(source, tmp_path):
    with pytest.raises(InputError, match="some/base"):
        convert(str(source[1]), str(tmp_path / "ours"), layout="ours")
    assert not (tmp_path / "ours").exists()


def test_of_the_model_only_the_config_is_read(source, tmp_path):
    base, folder, _ = source
    (tmp_path / "base").mkdir()
    shutil.copy(base / "config.json", tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"not looked at")
    convert(str(folder), str(tmp_path / "ours"), layout="ours", base=str(tmp_path / "base"))
    assert adapter_folder.read(tmp_path / "ours").low_rank


def test_our_own_model_is_described_too(source, tmp_path):
    base, folder, _ = source
    convert(str(base), str(tmp_path / "base"), layout="ours")
    shutil.rmtree(tmp_path / "base" / "params")
    convert(str(folder), str(tmp_path / "ours"), layout="ours", base=str(tmp_path / "base"))
    adapter = adapter_folder.read(tmp_path / "ours")
    assert (adapter.config, adapter.published, adapter.tokens) == hf.load(base).description


def test_a_base_that_is_no_model(source, tmp_path):
    for base, message in ((tmp_path / "absent", "there is no model folder"), (tmp_path, "it is no model folder")):
        with pytest.raises(InputError, match=message):
            convert(str(source[1]), str(tmp_path / "ours"), layout="ours", base=str(base))


def test_merging_looks_at_the_target_first(source, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        merge_adapter(str(tmp_path / "absent"), str(source[1]), str(tmp_path / "taken"))
    with pytest.raises(InputError, match="layout 'peft' does not exist"):
        merge_adapter(str(tmp_path / "absent"), str(source[1]), str(tmp_path / "new"), layout="peft")


def test_merging(source, tmp_path):
    base, folder, pairs = source
    merge_adapter(str(base), str(folder), str(tmp_path / "merged"))
    tensors, plain = load_file(tmp_path / "merged" / "model.safetensors"), peft_folder.weights(base)
    assert set(tensors) == set(plain)
    for name, tensor in plain.items():
        if name.removesuffix(".weight") in pairs:
            a, b = pairs[name.removesuffix(".weight")]
            np.testing.assert_allclose(tensors[name], tensor + 2 * (b @ a), rtol=0, atol=1e-4)
        else:
            assert tensors[name].tobytes() == tensor.tobytes()
    handle = phantom_jax.load(tmp_path / "merged")
    kernel = np.asarray(handle.params["language_model"]["layers_1"]["up"]["kernel"])
    np.testing.assert_array_equal(kernel, tensors["language_model.model.layers.1.mlp.up_proj.weight"].T)
