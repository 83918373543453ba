"""Reading the parents by their published names. That what is read computes the same is in tests/parity."""

import json

import numpy as np
import pytest
import safetensors.numpy

from phantom_jax.checkpoints import parents
from phantom_jax.checkpoints.weights import open_tensors
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from phantom_jax.ops.rope import RopeConfig
from tests.checkpoints import parent_folders as folders

TINY_LANGUAGE = {
    "qwen2": folders.QWEN2_05B | folders.TINY | {"num_key_value_heads": 2, "vocab_size": 40},
    "internlm2": folders.INTERNLM2_18B | folders.TINY | {"num_key_value_heads": 2, "vocab_size": 40},
    "phi3": folders.PHI3_MINI_128K
    | folders.TINY
    | {"num_key_value_heads": 4, "vocab_size": 40}
    | {"rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}},
    "llama": folders.VICUNA_7B | folders.TINY | {"vocab_size": 40},
}
TINY_INTERNVIT = folders.INTERNVIT_300M | folders.TINY_VISION
TINY_CLIP = folders.CLIP_LARGE | folders.TINY_VISION


def dropped(parent):
    return {entry.name: entry.reason for entry in parent.entries if entry.action == "dropped"}


def kept(parent):
    return {entry.name for entry in parent.entries if entry.action == "kept"}


@pytest.mark.parametrize("kind", TINY_LANGUAGE)
def test_language_model(kind, tmp_path):
    config = TINY_LANGUAGE[kind]
    weights = folders.random_weights(folders.language_model(config))
    parent = parents.read_language_model(folders.write(tmp_path / "llm", config, weights))
    assert parent.kind == kind
    assert kept(parent) == set(weights)
    assert not dropped(parent)
    assert parent.config.phantom is None
    rope = {"qwen2": "default", "internlm2": "dynamic", "phi3": "su", "llama": "default"}
    assert parent.config.rope.kind == rope[kind]
    assert parent.config.tie_embeddings == (kind == "qwen2")
    assert sum(array.size for array in parent.arrays.values()) == sum(array.size for array in weights.values())
    embedding = "model.tok_embeddings.weight" if kind == "internlm2" else "model.embed_tokens.weight"
    np.testing.assert_array_equal(parent.arrays["params/language_model/embedding"], weights[embedding])
    # One packed and one plain matrix of the second layer.
    query = np.asarray(parent.arrays["params/language_model/layers/attention/query/kernel"])[1]
    down = np.asarray(parent.arrays["params/language_model/layers/down/kernel"])[1]
    layer = "model.layers.1."
    if kind == "internlm2":
        wqkv = weights[layer + "attention.wqkv.weight"].reshape(2, 4, 4, 16)  # two query heads, a key and a value each
        np.testing.assert_array_equal(query, wqkv[:, :2].reshape(16, 16).T.reshape(16, 4, 4))
        np.testing.assert_array_equal(down, weights[layer + "feed_forward.w2.weight"].T)
    else:
        name = "qkv_proj" if kind == "phi3" else "q_proj"
        np.testing.assert_array_equal(query.reshape(16, 16), weights[f"{layer}self_attn.{name}.weight"][:16].T)
        np.testing.assert_array_equal(down, weights[layer + "mlp.down_proj.weight"].T)


def test_old_llama(tmp_path):
    config = {**folders.LLAMA_65B, **folders.TINY, "vocab_size": 40}
    weights = folders.random_weights(folders.language_model(config), np.float16)
    weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for n in range(2)}
    parent = parents.read_language_model(folders.write(tmp_path / "llm", config, weights))
    assert parent.kind == "llama"
    assert parent.config.rope == RopeConfig(theta=1e4, max_length=2048)
    assert parent.config.num_kv_heads == 4
    assert (parent.eos, parent.pad) == ((2,), 0)
    assert dropped(parent) == {
        f"model.layers.{n}.self_attn.rotary_emb.inv_freq": "follows from the config" for n in range(2)
    }


def test_a_tied_head_on_the_disk_is_dropped(tmp_path):
    config = TINY_LANGUAGE["qwen2"]
    weights = folders.random_weights(folders.language_model(config))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    parent = parents.read_language_model(folders.write(tmp_path / "llm", config, weights))
    assert dropped(parent) == {"lm_head.weight": "the embedding is the head"}


def test_window_of_attention(tmp_path, caplog):
    """Up to its length, attention over a window is attention: so Phi-3-mini-4k is read, and promises no more."""
    config = TINY_LANGUAGE["phi3"] | {"max_position_embeddings": 4096, "sliding_window": 2047, "rope_scaling": None}
    del config["original_max_position_embeddings"]
    weights = folders.random_weights(folders.language_model(config))
    parent = parents.read_language_model(folders.write(tmp_path / "llm", config, weights))
    assert parent.config.rope == RopeConfig(theta=1e4, max_length=2047)
    assert "sliding_window=2047" in caplog.text


def internvl2(tmp_path, kind="internlm2", seed=0):
    llm = TINY_LANGUAGE[kind] | {"tie_word_embeddings": False}
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "llm_config": llm,
        "vision_config": TINY_INTERNVIT,
    }
    shapes = folders.language_model(llm, "language_model.") | folders.internvit(TINY_INTERNVIT, "vision_model.")
    shapes |= {"mlp1.0.weight": (32,), "mlp1.0.bias": (32,)}
    shapes |= {"mlp1.1.weight": (16, 32), "mlp1.1.bias": (16,), "mlp1.3.weight": (16, 16), "mlp1.3.bias": (16,)}
    weights = folders.random_weights(shapes, seed=seed)
    return folders.write(tmp_path / "internvl2", config, weights), weights


@pytest.mark.parametrize("kind", ["qwen2", "internlm2", "phi3"])
def test_whole_internvl2(kind, tmp_path):
    folder, weights = internvl2(tmp_path, kind)
    language, tower = parents.read_language_model(folder), parents.read_vision_tower(folder)
    projector = parents.read_projector(folder)
    assert language.sees_images
    assert (language.kind, language.config.tie_embeddings) == (kind, False)
    assert kept(language) | kept(tower) | kept(projector) == set(weights)
    assert kept(language) == {name for name in weights if name.startswith("language_model.")}
    assert kept(tower) == {name for name in weights if name.startswith("vision_model.")}
    assert set(dropped(tower).values()) == {"is not of the vision tower"}
    assert projector.config == parents.ProjectorConfig("pixel_shuffle", 8, 16, 2)
    np.testing.assert_array_equal(projector.arrays["params/projector/norm/scale"], weights["mlp1.0.weight"])
    np.testing.assert_array_equal(projector.arrays["params/projector/linear_2/kernel"], weights["mlp1.3.weight"].T)


@pytest.mark.parametrize("model_type", ["intern_vit_6b", "intern_vit_300m"])
def test_internvit(model_type, tmp_path):
    weights = folders.random_weights(folders.internvit(TINY_INTERNVIT))
    folder = folders.write(tmp_path / "vision", TINY_INTERNVIT | {"model_type": model_type}, weights)
    parent = parents.read_vision_tower(folder)
    assert kept(parent) == set(weights)
    assert not dropped(parent)
    assert (parent.config.num_layers, parent.config.layer_scale, parent.config.pre_norm) == (3, True, False)
    patches = weights["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(parent.arrays["params/vision_tower/patch_kernel"], patches)


@pytest.mark.parametrize("nested", [TINY_CLIP, {n: v for n, v in TINY_CLIP.items() if n != "hidden_act"}])
def test_full_clip(nested, tmp_path):
    weights = folders.random_weights(folders.full_clip(TINY_CLIP))
    for part, length in (("text", 7), ("vision", 17)):
        weights[f"{part}_model.embeddings.position_ids"] = np.arange(length)[None]
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {}, "vision_config": nested}
    parent = parents.read_vision_tower(folders.write(tmp_path / "clip", config, weights))
    reasons = dropped(parent)
    assert reasons.pop("vision_model.embeddings.position_ids") == "follows from the config"
    assert set(reasons) == {name for name in weights if not name.startswith("vision_model.")}
    assert set(reasons.values()) == {"is not of the vision tower"}
    assert (parent.config.num_layers, parent.config.unused_layers) == (2, 1)
    assert parent.config.activation == "quick_gelu"
    # The last layer and the norm behind it are kept, where nothing computes them.
    last = parent.arrays["unused/vision_tower/layers/up/kernel"]
    np.testing.assert_array_equal(last[0], weights["vision_model.encoder.layers.2.mlp.fc1.weight"].T)
    assert "unused/vision_tower/final_norm/scale" in parent.arrays


def test_clip_tower_alone(tmp_path):
    weights = folders.random_weights(folders.clip_vision(TINY_CLIP))
    parent = parents.read_vision_tower(folders.write(tmp_path / "clip", TINY_CLIP, weights))
    assert kept(parent) == set(weights)
    assert not dropped(parent)


@pytest.mark.parametrize("image_size, config", [(224, folders.CLIP_LARGE), (336, folders.CLIP_LARGE_336)])
def test_published_clip_is_the_zoos(image_size, config, tmp_path):
    folder = folders.write_empty(tmp_path / "clip", config, folders.clip_vision(config))
    assert parents.read_vision_tower(folder).config == zoo.clip_large(image_size)


@pytest.mark.parametrize("prefix", ["model.mm_projector", "mm_projector", "base_model.model.model.mm_projector"])
@pytest.mark.parametrize("layers", [("",), (".0", ".2")])
def test_llava_projector(prefix, layers, tmp_path):
    weights = {f"{prefix}{layers[0]}.weight": np.arange(8 * 16.0, dtype=np.float16).reshape(16, 8)}
    weights[f"{prefix}{layers[0]}.bias"] = np.ones(16, np.float16)
    if len(layers) == 2:
        weights[f"{prefix}.2.weight"] = np.arange(16 * 16.0, dtype=np.float16).reshape(16, 16)
        weights[f"{prefix}.2.bias"] = np.ones(16, np.float16)
    safetensors.numpy.save_file(weights | {"model.embed_tokens.weight": np.zeros((3, 16))}, tmp_path / "p.safetensors")
    parent = parents.read_projector(tmp_path / "p.safetensors")
    kind = "linear" if len(layers) == 1 else "mlp2x_gelu"
    assert parent.config == parents.ProjectorConfig(kind, 8, 16)
    assert dropped(parent) == {"model.embed_tokens.weight": "is not of the projector"}
    for number, layer in enumerate(layers, start=1):
        kernel = parent.arrays[f"params/projector/linear_{number}/kernel"]
        np.testing.assert_array_equal(kernel, weights[f"{prefix}{layer}.weight"].T)


def test_projector_of_a_whole_model(golden):
    assert parents.read_projector(golden / "llava-original").config.kind in ("linear", "mlp2x_gelu")
    assert parents.read_projector(golden / "phantom-0.5b").config.kind == "pixel_shuffle"


def test_pickled_files_go_through_the_hook(tmp_path):
    (tmp_path / "mm_projector.bin").write_bytes(b"pickled")
    with pytest.raises(InputError, match=r"mm_projector\.bin: weights are pickled"):
        parents.read_projector(tmp_path / "mm_projector.bin")
    weights = {"model.mm_projector.weight": np.zeros((4, 3), np.float32), "model.mm_projector.bias": np.zeros(4)}
    safetensors.numpy.save_file(weights, tmp_path / "read.safetensors")
    asked = []

    def open_files(path):
        asked.append(path)
        return open_tensors(tmp_path / "read.safetensors")

    parent = parents.read_projector(tmp_path / "mm_projector.bin", open_files=open_files)
    assert asked == [tmp_path / "mm_projector.bin"]
    assert parent.config.input_dim == 3


# ---- bad input


def test_a_language_model_is_no_tower_and_a_tower_no_language_model(tmp_path):
    config = TINY_LANGUAGE["qwen2"]
    llm = folders.write(tmp_path / "llm", config, folders.random_weights(folders.language_model(config)))
    vision = folders.write(
        tmp_path / "vision", TINY_INTERNVIT, folders.random_weights(folders.internvit(TINY_INTERNVIT))
    )
    with pytest.raises(InputError, match="model_type='qwen2': a vision tower is a folder of InternViT or CLIP"):
        parents.read_vision_tower(llm)
    with pytest.raises(InputError, match="model_type='intern_vit_6b': a language model is a folder of Qwen2"):
        parents.read_language_model(vision)
    with pytest.raises(InputError, match="holds no projector"):
        parents.read_projector(llm)
    with pytest.raises(InputError, match="there is no folder"):
        parents.read_vision_tower(tmp_path / "nothing")
    with pytest.raises(InputError, match="there is no "):
        parents.read_projector(tmp_path / "nothing")


@pytest.mark.parametrize(
    "read, config, shapes",
    [
        (parents.read_language_model, TINY_LANGUAGE["internlm2"], folders.language_model(TINY_LANGUAGE["internlm2"])),
        (parents.read_vision_tower, TINY_INTERNVIT, folders.internvit(TINY_INTERNVIT)),
        (parents.read_vision_tower, TINY_CLIP, folders.clip_vision(TINY_CLIP)),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_listed(read, config, shapes, tmp_path):
    weights = folders.random_weights(shapes)
    layer = [name for name in weights if "layers.1." in name and name.endswith("weight")]
    del weights[layer[0]]
    weights[layer[1]] = np.zeros((3, 3), np.float32)
    weights[layer[2] + "_scale"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as error:
        read(folders.write(tmp_path / "parent", config, weights))
    # What no tower has by its name is told apart from what is not of the tower.
    assert all(name in str(error.value) for name in (layer[0], layer[1], layer[2] + "_scale"))
    assert "1 missing" in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scales RoPE by 'yarn'"),
        ({"rope_scaling": folders.PHI3_MINI_128K["rope_scaling"]}, "heads of 4 channels need 2 of each"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"num_attention_heads": 0}, "has no 'num_attention_heads'|does not describe a model that is supported"),
        ({"num_key_value_heads": 3}, "no multiple of 3 key-value heads"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "model_type='mistral'"),
        ({"model_type": "llava", "architectures": None}, "model_type='llava'"),
    ],
)
def test_configs_that_are_not_supported(change, message, tmp_path):
    config = TINY_LANGUAGE["phi3"] | change
    with pytest.raises(InputError, match=message):
        parents.read_language_model(folders.write(tmp_path / "llm", config, {}))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"mm_projector.0.weight": (4, 3), "mm_projector.0.bias": (4,)}, "layers .0: a linear map"),
        ({"mm_projector.weight": (4, 3)}, "1 missing"),
        ({"mm_projector.bias": (4,)}, "has no matrix mm_projector.weight"),
        ({"mlp1.0.weight": (6,), "mlp1.1.weight": (4, 6), "mlp1.3.weight": (4, 4)}, "do not divide by 4"),
        ({"mm_projector.weight": (4, 3), "a.mm_projector.weight": (4, 3)}, "several projectors"),
    ],
)
def test_projectors_that_are_not_complete(tensors, message, tmp_path):
    safetensors.numpy.save_file(folders.random_weights(tensors), tmp_path / "p.safetensors")
    with pytest.raises(InputError, match=message):
        parents.read_projector(tmp_path / "p.safetensors")


def test_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        parents.read_vision_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(InputError, match="has no 'vision_config'"):
        parents.read_vision_tower(tmp_path)
