"""Folders of parents as they are published: names and shapes written out, contents random or none at all."""

import json
import math
import struct

import numpy as np
import safetensors.numpy

QWEN2_05B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "vocab_size": 151936,
}
INTERNLM2_18B = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "bias": False,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "vocab_size": 92544,
}
INTERNLM25_7B = INTERNLM2_18B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
PHI3_MINI_128K = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "hidden_act": "silu",
    "vocab_size": 32064,
}
# Old: neither num_key_value_heads nor rope_theta.
VICUNA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "vocab_size": 32000,
}
# Older: max_sequence_length, and no pad token is -1.
LLAMA_65B = {
    "model_type": "llama",
    "architectures": ["LLaMAForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "max_sequence_length": 2048,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": -1,
    "hidden_act": "silu",
    "vocab_size": 32000,
}
LLAMA2_70B = VICUNA_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
}
INTERNVIT_300M = {
    "model_type": "intern_vit_6b",
    "architectures": ["InternVisionModel"],
    "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "layer_norm_eps": 1e-06,
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
    "hidden_act": "gelu",
}
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-05,
    "hidden_act": "quick_gelu",
}
CLIP_LARGE_336 = CLIP_LARGE | {"image_size": 336}

# Sizes at which every axis of a tensor differs from the others where it can.
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_VISION = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_VISION |= {"image_size": 28, "patch_size": 7}


def language_model(config: dict, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads, head = config.get("num_key_value_heads", heads), width // heads
    query, both = heads * head, (heads + 2 * kv_heads) * head
    shapes = {}
    if config["model_type"] == "internlm2":
        shapes |= {"model.tok_embeddings.weight": (vocab, width), "output.weight": (vocab, width)}
        layer = {
            "attention.wqkv.weight": (both, width),
            "attention.wo.weight": (width, query),
            "feed_forward.w1.weight": (mlp, width),
            "feed_forward.w3.weight": (mlp, width),
            "feed_forward.w2.weight": (width, mlp),
            "attention_norm.weight": (width,),
            "ffn_norm.weight": (width,),
        }
    else:
        shapes["model.embed_tokens.weight"] = (vocab, width)
        if not config.get("tie_word_embeddings"):
            shapes["lm_head.weight"] = (vocab, width)
        layer = {
            "self_attn.o_proj.weight": (width, query),
            "mlp.down_proj.weight": (width, mlp),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        if config["model_type"] == "phi3":
            layer |= {"self_attn.qkv_proj.weight": (both, width), "mlp.gate_up_proj.weight": (2 * mlp, width)}
        else:
            layer |= {"mlp.gate_proj.weight": (mlp, width), "mlp.up_proj.weight": (mlp, width)}
            for letter, size in (("q", query), ("k", kv_heads * head), ("v", kv_heads * head)):
                layer[f"self_attn.{letter}_proj.weight"] = (size, width)
                if config["model_type"] == "qwen2":
                    layer[f"self_attn.{letter}_proj.bias"] = (size,)
    shapes["model.norm.weight"] = (width,)
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {prefix + name: shape for name, shape in shapes.items()}


def internvit(config: dict, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    width, mlp, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, 1 + (config["image_size"] // patch) ** 2, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
    }
    layer = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layer |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp), "norm1": (width,), "norm2": (width,)}
    for number in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"encoder.layers.{number}.{name}.weight"] = shape
            shapes[f"encoder.layers.{number}.{name}.bias"] = shape[:1]
        shapes |= {f"encoder.layers.{number}.{name}": (width,) for name in ("ls1", "ls2")}
    return {prefix + name: shape for name, shape in shapes.items()}


def clip_vision(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    width, patch = config["hidden_size"], config["patch_size"]
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.position_embedding.weight": (1 + (config["image_size"] // patch) ** 2, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {f"vision_model.{name}": shape for name, shape in (shapes | _clip_layers(config)).items()}


def full_clip(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole CLIP of old: with the text model, the two projections and tables of positions."""
    width, vocab, length = config["hidden_size"], 30, 7
    text = {
        "embeddings.token_embedding.weight": (vocab, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    shapes = {f"text_model.{name}": shape for name, shape in (text | _clip_layers(config)).items()}
    shapes |= {"logit_scale": (), "text_projection.weight": (5, width), "visual_projection.weight": (5, width)}
    return shapes | clip_vision(config)


def _clip_layers(config):
    width, mlp = config["hidden_size"], config["intermediate_size"]
    layer = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    layer |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp), "layer_norm1": (width,), "layer_norm2": (width,)}
    shapes = {}
    for number in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"encoder.layers.{number}.{name}.weight"] = shape
            shapes[f"encoder.layers.{number}.{name}.bias"] = shape[:1]
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]], dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, config: dict, weights: dict[str, np.ndarray]):
    """A folder with `config.json` and `model.safetensors`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def write_empty(folder, config: dict, shapes: dict[str, tuple[int, ...]]):
    """The same with bfloat16 tensors of no content, which take no room on the disk whatever their size."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes.items():
        stop = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return folder
