"""Small random models under the folder names of docs/checkpoints.md, with the files that such a folder comes with."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from phantom_jax.conversion import Parents, convert
from tests import sentencepiece_files
from tests.checkpoints import parent_folders as folders
from tests.checkpoints import peft_folder
from tests.tiny_tokenizers import language_model as byte_level
from tests.tiny_tokenizers import llama

# Eight kv heads, so that a mesh of eight devices splits them.
_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 16, "num_key_value_heads": 8}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "image_size": 28, "patch_size": 7}
_INTERNVIT = folders.INTERNVIT_300M | _VISION | {"num_hidden_layers": 2}
_CLIP = folders.CLIP_LARGE | _VISION | {"num_hidden_layers": 3}
_CLIP_336 = _CLIP | {"image_size": 336, "patch_size": 84}
_SU = {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
_INTERNLM2 = folders.INTERNLM2_18B | _TEXT
_PHANTOMS = {
    "Phantom-0.5B": "Qwen2-0.5B-Instruct",
    "Phantom-1.8B": "internlm2-chat-1_8b",
    "Phantom-3.8B": "Phi-3-mini-128k-instruct",
    "Phantom-7B": "internlm2_5-7b-chat",
}
_OURS = ("phantom_jax_processor.json", "chat_template.jinja", "conversion_report.tsv", "README.md")
_TOWER = "model.vision_tower."


def make_all(place: pathlib.Path) -> None:
    """All of them; what the originals pickle is safetensors still."""
    _parents(place)
    _phantoms(place)
    _llavas(place)
    _adapters(place)


def _parents(place):
    _vision(place / "InternViT-300M-448px", _INTERNVIT, folders.internvit(_INTERNVIT), ml_dtypes.bfloat16)
    for name, config in (("clip-vit-large-patch14", _CLIP), ("clip-vit-large-patch14-336", _CLIP_336)):
        full = {"model_type": "clip", "vision_config": config}
        _vision(place / name, full, folders.full_clip(config), np.float32)
    qwen2, phi3 = byte_level(), llama("prepend", special=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"))
    _text(place / "Qwen2-0.5B-Instruct", folders.QWEN2_05B | _TEXT, qwen2)
    _text(place / "Phi-3-mini-128k-instruct", folders.PHI3_MINI_128K | _TEXT | {"rope_scaling": _SU}, phi3)
    for name in ("internlm2-chat-1_8b", "internlm2_5-7b-chat"):
        size = sentencepiece_files.internlm2(_new(place / name))[1]
        (place / name / "added_tokens.json").unlink()
        settings = json.loads((place / name / "tokenizer_config.json").read_text())
        settings["additional_special_tokens"] = settings["additional_special_tokens"][:2]
        (place / name / "tokenizer_config.json").write_text(json.dumps(settings))
        _weights(place / name, _INTERNLM2 | {"vocab_size": size}, ml_dtypes.bfloat16)
    for name, config in (("vicuna-7b-v1.5", folders.VICUNA_7B), ("llama-65b", folders.LLAMA_65B)):
        (_new(place / name) / "tokenizer.model").write_bytes(sentencepiece_files.train())
        _weights(place / name, config | _TEXT | {"vocab_size": 900}, np.float16)
    _internvl2(place / "InternVL2-2B")


def _phantoms(place):
    for name, parent in _PHANTOMS.items():
        source = Parents(str(place / "InternViT-300M-448px"), str(place / parent))
        _publish(source, place / name, "phantom", "bfloat16")
        if "internlm2" in parent:
            (place / name / "tokenizer.json").unlink()
            sentencepiece_files.internlm2(place / name)


def _llavas(place):
    vicuna = str(place / "vicuna-7b-v1.5")
    linear = Parents(str(place / "clip-vit-large-patch14"), vicuna)
    _publish(linear, place / "my-llava-v1", "llava-original", "float16")
    large = Parents(str(place / "clip-vit-large-patch14-336"), vicuna, projector_kind="mlp2x_gelu")
    _publish(large, place / "llava-1.5-7b-hf", "llava-hf", "float16")
    _publish(large, place / "my-llava-v1.5", "llava-original", "float16")
    tensors = load_file(place / "my-llava-v1.5" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TOWER)}
    save_file(kept, place / "my-llava-v1.5" / "model.safetensors")
    (place / "my-llava-v1.5" / "vision_config.json").unlink()
    shutil.copytree(place / "my-llava-v1.5", place / "llava-v1.5-7b")
    projector = {name: tensor for name, tensor in kept.items() if "mm_projector" in name}
    save_file(projector, _new(place / "pretrain") / "mm_projector.safetensors")


def _adapters(place):
    base = place / "llava-1.5-7b-hf"
    pairs = peft_folder.factors(base, lambda module: module.endswith(("q_proj", "v_proj")), rank=lambda module: 32)
    settings = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": base.name}
    peft_folder.write(place / "my-lora", pairs, rename=peft_folder.in_memory, **settings)
    # As LLaVA's code leaves it, with a factor that got into the tower and changes nothing.
    base, stray = place / "my-llava-v1.5", "base_model.model.model.vision_tower.vision_tower.vision_model.encoder."
    stray += "layers.0.self_attn.q_proj"
    zeros = {f"{stray}.lora_A.weight": np.ones((4, 32), np.float16)}
    zeros[f"{stray}.lora_B.weight"] = np.zeros((32, 4), np.float16)
    pairs = peft_folder.factors(base, lambda module: "layers" in module)
    folder = peft_folder.write(place / "llava-v1.5-7b-lora", pairs, extra=zeros)
    (folder / "config.json").write_text((base / "config.json").read_text())
    (folder / "vision_config.json").write_text(json.dumps(_CLIP_336))
    projector = load_file(place / "pretrain" / "mm_projector.safetensors")
    whole = {peft_folder.PREFIX + name: tensor for name, tensor in projector.items()}
    save_file(whole, folder / "non_lora_trainables.safetensors")


def _new(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    return folder


def _random(shapes, dtype):
    """Of a size that keeps activations near one, so that rounding stays small as it does in a trained model."""
    weights = folders.random_weights(shapes)
    scales = {name: 1 / np.sqrt(max(1, np.prod(shape[1:]))) for name, shape in shapes.items()}
    return {name: np.asarray(weight * scales[name], dtype) for name, weight in weights.items()}


def _weights(folder, config, dtype):
    weights = _random(folders.language_model(config), dtype)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def _vision(folder, config, shapes, dtype):
    folders.write(folder, config, _random(shapes, dtype))


def _text(folder, config, tokenizer):
    """With more rows than tokens, as both have them."""
    tokenizer.save(str(_new(folder) / "tokenizer.json"))
    _weights(folder, config | {"vocab_size": tokenizer.get_vocab_size() + 20}, ml_dtypes.bfloat16)


def _internvl2(folder):
    size = sentencepiece_files.internlm2(_new(folder))[1]
    text = _INTERNLM2 | {"vocab_size": size + len(sentencepiece_files.INTERNVL)}
    shapes = folders.language_model(text, "language_model.") | folders.internvit(_INTERNVIT, "vision_model.")
    joined, width = 4 * _INTERNVIT["hidden_size"], text["hidden_size"]
    shapes |= {"mlp1.0.weight": (joined,), "mlp1.0.bias": (joined,), "mlp1.1.weight": (width, joined)}
    shapes |= {"mlp1.1.bias": (width,), "mlp1.3.weight": (width, width), "mlp1.3.bias": (width,)}
    config = {"model_type": "internvl_chat", "llm_config": text, "vision_config": _INTERNVIT}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_random(shapes, ml_dtypes.bfloat16), folder / "model.safetensors")


def _publish(parents, folder, layout, dtype):
    """A model of the parents, without the files that other publishers do not write."""
    convert(parents, str(folder), layout=layout, dtype=dtype)
    for name in _OURS:
        (folder / name).unlink(missing_ok=True)
