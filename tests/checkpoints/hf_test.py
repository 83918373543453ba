import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phantom_jax import pretrained
from phantom_jax.checkpoints import hf, hf_config, model_folder, native
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from tests.models import small

ROOT = pathlib.Path(os.environ.get("PHANTOM_JAX_GOLDEN") or pathlib.Path(__file__).parents[1] / "golden")
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/golden.npz"))

# What the reference code reads of each config.json; nested keys with dots.
VISION_FIELDS = [
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
]
INTERNVIT_FIELDS = ["norm_type", "qk_normalization", "qkv_bias"]
DECODER_FIELDS = [
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
]
TOP_FIELDS = {
    "phantom": [
        "architectures",
        "downsample_ratio",
        "eos_token_id",
        "force_image_size",
        "ignore_index",
        "image_token_index",
        "model_type",
    ],
    "llava-hf": [
        "architectures",
        "image_token_index",
        "model_type",
        "projector_hidden_act",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    ],
    "llava-original": [
        "architectures",
        "mm_hidden_size",
        "mm_vision_select_feature",
        "mm_vision_select_layer",
        "mm_vision_tower",
        "model_type",
        "use_mm_proj",
    ],
}


def lost(old, new, path=""):
    """Fields of the old config that the new one lacks or changes."""
    for key, value in old.items():
        if isinstance(value, dict):
            yield from lost(value, new.get(key, {}), f"{path}{key}.")
        elif key not in new or new[key] != value:
            yield f"{path}{key}: {value} -> {new.get(key)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_then_export_keeps_every_tensor_and_field(folder, tmp_path):
    source = ROOT / folder
    pretrained.save(pretrained.load(source), tmp_path / "out", format=hf.load(source).published.format)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    assert set(ours) == set(theirs)
    for name in theirs:
        assert (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype)
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    for name in ("config.json", "vision_config.json"):
        if (source / name).exists():
            assert not list(
                lost(json.loads((source / name).read_text()), json.loads((tmp_path / "out" / name).read_text()))
            )


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_config_is_written_from_the_model_alone(folder):
    """What the reference reads does not lean on fields kept from the file that was imported."""
    checkpoint = hf.load(ROOT / folder)
    bare = hf_config.Published(checkpoint.published.format, checkpoint.published.language_model)
    written, beside = hf_config.write(checkpoint.config, bare, checkpoint.tokens, "float32")
    original = checkpoint.published.config
    text = {"phantom": "llm_config", "llava-hf": "text_config"}.get(bare.format)
    for key in DECODER_FIELDS:
        ours, theirs = (config[text] if text else config for config in (written, original))
        assert ours[key] == theirs[key], key
    tower = beside if bare.format == "llava-original" else written["vision_config"]
    theirs = checkpoint.published.vision_config or original["vision_config"]
    for key in VISION_FIELDS + (INTERNVIT_FIELDS if bare.format == "phantom" else []):
        assert tower[key] == theirs[key], key
    again = hf_config.read(written, beside)
    assert again[0] == checkpoint.config and again[2].image == checkpoint.tokens.image
    for key in TOP_FIELDS[bare.format]:
        assert written[key] == original[key], key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_keep_their_dtype(golden, dtype, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "phantom-1.8b", source)
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    pretrained.save(pretrained.load(source), tmp_path / "out", format="phantom")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        ours[name].tobytes() == tensor.tobytes() and ours[name].dtype == dtype for name, tensor in tensors.items()
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("folder", ["phantom-3.8b", "llava-original"])
def test_our_format_keeps_every_array(golden, folder, tmp_path):
    handle = pretrained.load(golden / folder)
    pretrained.save(handle, tmp_path / "ours")
    again = pretrained.load(tmp_path / "ours")
    assert again.model == handle.model and again.tokens == handle.tokens
    for tree in ("params", "unused"):
        jax.tree.map(np.testing.assert_array_equal, getattr(again, tree), getattr(handle, tree))
    # And out again, as if it had never been ours.
    pretrained.save(again, tmp_path / "out", format=handle.published.format)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", golden / folder))
    assert {name: tensor.tobytes() for name, tensor in ours.items()} == {
        name: tensor.tobytes() for name, tensor in theirs.items()
    }


def test_a_model_made_here_becomes_a_published_phantom(tmp_path):
    config = small.with_decoder(phantom=zoo.PhantomConfig())
    model, params = small.init(config)
    tokens = hf_config.TokenIds(image=60, eos=(2,))
    checkpoint = hf.Checkpoint(config, params, {}, hf_config.publish(config), tokens)
    model_folder.write(checkpoint, None, tmp_path / "out", format="phantom")
    again, _ = model_folder.read(tmp_path / "out")
    assert again.config == config and again.published.language_model == "qwen2"
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_all_wrong_tensors_are_listed(golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "phantom-0.5b", source)
    tensors = load_file(source / "model.safetensors")
    gone = [f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    for name in gone:
        del tensors[name]
    tensors |= {"stray.weight": np.zeros(3, np.float32), "vision_proj.0.bias": np.zeros(7, np.float32)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError) as error:
        pretrained.load(source)
    text = str(error.value)
    assert "3 missing" in text and all(name in text for name in gone)
    assert "1 not expected:\n    stray.weight" in text
    assert "vision_proj.0.bias is (7,) instead of (128,)" in text


def test_all_wrong_arrays_of_our_format_are_listed(golden, tmp_path):
    checkpoint, _ = model_folder.read(golden / "phantom-0.5b")
    checkpoint.params["projector"]["stray"] = np.zeros(3, np.float32)
    del checkpoint.params["projector"]["norm"]
    checkpoint.params["language_model"]["embedding"] = np.zeros((5, 64), np.float32)
    native_folder = tmp_path / "ours"
    native_folder.mkdir()
    native.save(checkpoint, native_folder)
    with pytest.raises(InputError) as error:
        pretrained.load(native_folder)
    for line in (
        "missing: params/projector/norm/bias",
        "missing: params/projector/norm/scale",
        "not expected: params/projector/stray",
        "misshapen: params/language_model/embedding is (5, 64) instead of (211, 64)",
    ):
        assert line in str(error.value)


def test_a_damaged_folder_of_ours_is_refused(golden, tmp_path):
    pretrained.save(pretrained.load(golden / "phantom-0.5b"), tmp_path / "ours")
    largest = max((tmp_path / "ours" / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read, it may be damaged"):
        pretrained.load(tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "params")
    (tmp_path / "ours" / "params").mkdir()
    with pytest.raises(InputError, match="cannot be read, it may be damaged"):
        pretrained.load(tmp_path / "ours")


def test_weights_that_are_no_floating_point_numbers_are_refused(golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "phantom-0.5b", source)
    tensors = load_file(source / "model.safetensors")
    tensors["vision_proj.0.bias"] = tensors["vision_proj.0.bias"].astype(np.int32)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match="1 not floating point:\n    vision_proj.0.bias is I32"):
        pretrained.load(source)


def test_folders_that_are_no_model_are_refused(golden, tmp_path):
    with pytest.raises(InputError, match="no model folder '.*nowhere'"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds neither phantom_jax.json nor config.json"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text('{"phases": []}')
    with pytest.raises(InputError, match="is the workdir of a training run"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="model_type='bert'"):
        pretrained.load(tmp_path)
    shutil.copy(golden / "phantom-0.5b" / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(InputError, match="weights are pickled .* --allow_pickle"):
        pretrained.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(InputError, match="no readable safetensors file"):
        pretrained.load(tmp_path)


def test_a_shard_index_cannot_point_outside(golden, tmp_path):
    shutil.copy(golden / "phantom-0.5b" / "config.json", tmp_path / "config.json")
    for name in ("../model.safetensors", "/etc/passwd", "missing.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(InputError, match="names the shard"):
            pretrained.load(tmp_path)


def test_a_model_that_lacks_a_parameter_is_not_written(golden, tmp_path):
    handle = pretrained.load(golden / "phantom-0.5b")
    del handle.params["projector"]["norm"]["bias"]
    with pytest.raises(InputError, match="lacks parameters, nothing was written: params/projector/norm/bias"):
        pretrained.save(handle, tmp_path / "out", format="phantom")
    assert not (tmp_path / "out").exists()


def test_old_files_may_hold_tables_of_angles(golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "llava-original", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(tensors, source / "model.safetensors")
    assert pretrained.load(source).published.format == "llava-original"


def test_what_transformers_leaves_out_is_its_default(golden):
    config = json.loads((golden / "llava-hf" / "config.json").read_text())
    config["text_config"] = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    decoder = hf_config.read(config)[0].language_model
    assert (decoder.embed_dim, decoder.mlp_dim, decoder.num_layers, decoder.head_dim) == (4096, 11008, 32, 128)


def test_nothing_is_overwritten(golden, tmp_path):
    handle = pretrained.load(golden / "phantom-0.5b")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        pretrained.save(handle, tmp_path, format="phantom")
    with pytest.raises(InputError, match="llava-hf holds a linear or mlp2x_gelu projector"):
        pretrained.save(handle, tmp_path / "new", format="llava-hf")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"], "a refused save leaves nothing behind"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "scales RoPE by 'yarn'"),
        ({"llm_config": {"sliding_window": 64, "use_sliding_window": True}}, "sliding_window=64"),
        ({"llm_config": {"hidden_act": "gelu"}}, "hidden_act='gelu'"),
        ({"llm_config": {"vocab_size": None}}, "has no 'vocab_size'"),
        ({"image_token_index": None}, "has no 'image_token_index'"),
        ({"llm_config": {"num_key_value_heads": 3}}, "4 query heads are no multiple of 3"),
        ({"llm_config": {"hidden_size": "x"}}, "hidden_size='x': it must be a whole number"),
        ({"vision_config": {"norm_type": "group_norm"}}, "vision norm 'group_norm' does not exist"),
        ({"quantization_config": ["awq"]}, "quantization_config=.*take the 16-bit model"),
        ({"model_type": "internvl_chat"}, "an InternVL2: .* --vision, --llm and --projector"),
        ({"eos_token_id": None, "llm_config": {"eos_token_id": None}}, "has no 'eos_token_id'"),
    ],
)
def test_configs_that_mean_another_function_are_refused(golden, change, message):
    config = json.loads((golden / "phantom-0.5b" / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message):
        hf_config.read(config)


def test_code_that_does_not_come_along_is_not_named(golden, tmp_path):
    checkpoint = hf.load(golden / "phantom-1.8b")
    config = {**checkpoint.published.config, "auto_map": {"AutoModel": "modeling.Model"}}
    config["llm_config"] = {**config["llm_config"], "auto_map": {"AutoModel": "modeling.Model"}}
    published = dataclasses.replace(checkpoint.published, config=config)
    written, _ = hf_config.write(checkpoint.config, published, checkpoint.tokens, "float32")
    assert "auto_map" not in json.dumps(written)
    assert "auto_map" in config and "auto_map" in config["llm_config"], "what was read stays as it is"
