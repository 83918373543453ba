"""Adapter folders as PEFT and LLaVA write them, made from the published weights of a base alone."""

import json
import re

import numpy as np
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."
LINEAR = re.compile(
    r"(.*\.)?(layers\.\d+\..*(_proj|fc[12]|attn\.(qkv|proj)|wqkv|wo|w[123]|linear_[qkvo]|gating_phantom_[12])|lm_head|output|"
    r"vision_proj\.[13]|mm_projector(\.[02])?|multi_modal_projector\.linear_[12])"
)
IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.vision_model.": "model.vision_tower.",
}
"""How transformers 5.23 calls what `llava-hf` has on disk."""


def in_memory(name):
    for old, new in IN_MEMORY.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def weights(base):
    """The published tensors of a base."""
    return load_file(base / "model.safetensors")


def linears(base):
    """Weights [out, in] of the linear maps, by published module."""
    found = {}
    for name, weight in weights(base).items():
        module = name.removesuffix(".weight")
        if module != name and LINEAR.fullmatch(module):
            found[module] = weight
    return found


def factors(base, choose=lambda module: True, rank=lambda module: 4, seed=0, *, tower=False):
    """Random A [r, in] and B [out, r] by published module, with those of the vision tower or without."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for module, weight in linears(base).items():
        if choose(module) and (tower or not re.search("vision_(tower|model)", module)):
            r = rank(module)
            a = rng.normal(size=(r, weight.shape[1])).astype(weight.dtype)
            pairs[module] = (a, rng.normal(size=(weight.shape[0], r)).astype(weight.dtype))
    return pairs


def write(folder, pairs, *, rename=lambda name: name, infix="", others=None, extra=None, **settings):
    """Writes a PEFT folder.

    Args:
      folder: a new one.
      pairs: factors by published module.
      rename: from a published name to PEFT's.
      infix: an adapter's name behind `lora_A`, with its dot.
      others: whole parameters by published name.
      extra: more tensors by full name.
      **settings: of `adapter_config.json`, over what fits.
    """
    folder.mkdir()
    tensors = dict(extra or {})
    for module, (a, b) in pairs.items():
        name = PREFIX + rename(module)
        tensors |= {f"{name}.lora_A{infix}.weight": a, f"{name}.lora_B{infix}.weight": b}
    tensors |= {PREFIX + rename(name): tensor for name, tensor in (others or {}).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": sorted({rename(module) for module in pairs}),
        "base_model_name_or_path": "some/base",
    } | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
