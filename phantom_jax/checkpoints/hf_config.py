"""Hugging Face `config.json` to our model configuration and back.

Phantom and LLaVA say the same things in three vocabularies. What a published file holds beyond what we read is kept
in `Published.config` and written back, so that nothing of it is lost.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from phantom_jax.errors import InputError
from phantom_jax.layouts import PUBLISHED_LAYOUTS, check_name
from phantom_jax.models import zoo
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.rope import RopeConfig
from phantom_jax.sizes import MOST_LAYERS, MOST_PIXELS, check_positive, check_size

LANGUAGE_MODELS = ("qwen2", "internlm2", "phi3", "llama")
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM", "phi3": "Phi3ForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Published:
    """How a model looks outside: which of the layouts, and what its files said that we do not interpret.

    Attributes:
      format: one of `layouts.PUBLISHED_LAYOUTS`.
      language_model: `qwen2`, `internlm2`, `phi3` or `llama`.
      config: the `config.json` it came from; empty for a model that was made here.
      vision_config: the tower's own file beside it (original LLaVA).
      tower_inside: whether the file holds the vision tower; only an original LLaVA may leave it out.
      generation_config: the `generation_config.json` beside it.
    """

    format: str
    language_model: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vision_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tower_inside: bool = True
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def publish(config: VisionLanguageConfig, layout: str | None = None) -> Published:
    """How a model that was made here, or came from another layout, looks outside.

    Args:
      config: the model.
      layout: one of `layouts.PUBLISHED_LAYOUTS`; by default the one that fits its projector.
    """
    if layout is None:
        fitting = {"pixel_shuffle": "phantom", "linear": "llava-original", "mlp2x_gelu": "llava-hf"}
        layout = fitting[config.projector.kind]
    if layout != "phantom":
        return Published(layout, "llama")
    # Each decoder's published code has something that the others lack.
    if config.language_model.qkv_bias:
        return Published(layout, "qwen2")
    return Published(layout, "phi3" if config.language_model.rope.kind in ("su", "longrope") else "internlm2")


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Token ids that generation needs.

    Attributes:
      image: stands where an image token's features go.
      eos: any of them ends an answer.
      pad: fills rows.
    """

    image: int
    eos: tuple[int, ...]
    pad: int = 0

    def __post_init__(self):
        ids = {"image": (self.image,), "eos": self.eos, "pad": (self.pad,)}
        for name, values in ids.items():
            # -1 is how old configs say that there is no padding.
            least = -1 if name == "pad" else 0
            if not values or any(type(value) is not int or not least <= value < 2**31 for value in values):
                raise ValueError(f"the {name} token is {values!r:.100}: token ids are whole numbers from 0 on")


def need(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise InputError(f"{where} has no {key!r}: the file is not complete, take it from the published checkpoint")
    return config[key]


def _size(config: Mapping[str, Any], key: str, where: str, *most: int) -> int:
    return check_size(where, key, need(config, key, where), *most)


_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}

# ---- decoder


def _read_rope(config: Mapping[str, Any], where: str) -> RopeConfig:
    new = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or new.get("rope_theta") or 10_000.0
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or new.get("rope_type") or "default"
    scaling = {**new, **scaling}
    length = config.get("max_position_embeddings") or config.get("max_sequence_length") or 2048
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if kind not in ("default", "linear", "dynamic", "su", "longrope"):
        raise InputError(f"{where} scales RoPE by {kind!r}: default, linear, dynamic, su and longrope are supported")
    return RopeConfig(
        theta=float(check_positive(where, "rope_theta", theta)),
        kind=kind,
        factor=float(scaling.get("factor") or 1.0),
        max_length=check_size(where, "max_position_embeddings", length, 2**31 - 1),
        original_max_length=int(original) if original else None,
        short_factor=tuple(map(float, scaling.get("short_factor") or ())),
        long_factor=tuple(map(float, scaling.get("long_factor") or ())),
    )


def read_decoder(config: Mapping[str, Any], kind: str, phantom: PhantomConfig | None, where: str) -> DecoderConfig:
    heads, width = (_size(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    rope = _read_rope(config, where)
    if window and window < rope.max_length:
        raise InputError(f"{where} has sliding_window={window}: attention over a window is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where} has hidden_act={config['hidden_act']!r}: only silu is supported")
    turned = config.get("partial_rotary_factor") or 1.0
    if turned != 1.0:
        raise InputError(
            f"{where} has partial_rotary_factor={turned}: heads that are rotated in part are not supported"
        )
    for key in ("attention_bias", "mlp_bias", "bias"):
        if config.get(key):
            raise InputError(f"{where} has {key}=true: decoders with these biases are not supported")
    return DecoderConfig(
        vocab_size=_size(config, "vocab_size", where),
        embed_dim=width,
        num_layers=_size(config, "num_hidden_layers", where, MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        mlp_dim=_size(config, "intermediate_size", where),
        norm_epsilon=check_positive(where, "rms_norm_eps", config.get("rms_norm_eps", 1e-6), 1),
        qkv_bias=kind == "qwen2",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=rope,
        phantom=phantom,
    )


def _write_decoder(config: DecoderConfig, kind: str, old: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.kind in ("linear", "dynamic"):
        scaling = {"type": rope.kind, "factor": rope.factor}
    elif rope.kind in ("su", "longrope"):
        scaling = {
            "type": rope.kind,
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
    out: dict[str, Any] = {
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": rope.max_length,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_heads != config.embed_dim or "head_dim" in old:
        out["head_dim"] = config.head_dim
    if rope.original_max_length is not None:
        out["original_max_position_embeddings"] = rope.original_max_length
    if "rope_parameters" in old:
        out["rope_parameters"] = {"rope_theta": rope.theta, "rope_type": rope.kind, **(scaling or {})}
    else:
        out["rope_theta"] = rope.theta
        out["rope_scaling"] = scaling if not old.get("rope_scaling") else {**old["rope_scaling"], **(scaling or {})}
    if kind in _ARCHITECTURES:
        out["architectures"] = [_ARCHITECTURES[kind]]
    if kind == "internlm2":
        out["bias"] = False
    return out


# ---- vision


def _tower_sizes(config: Mapping[str, Any], where: str) -> dict[str, int]:
    return {
        "embed_dim": _size(config, "hidden_size", where),
        "num_heads": _size(config, "num_attention_heads", where),
        "mlp_dim": _size(config, "intermediate_size", where),
        "patch_size": _size(config, "patch_size", where, MOST_PIXELS),
        "image_size": _size(config, "image_size", where, MOST_PIXELS),
    }


def read_internvit(config: Mapping[str, Any]) -> VisionTowerConfig:
    where = "vision_config of config.json"
    return VisionTowerConfig(
        **_tower_sizes(config, where),
        num_layers=_size(config, "num_hidden_layers", where, MOST_LAYERS),
        norm=config.get("norm_type", "layer_norm"),
        norm_epsilon=check_positive(where, "layer_norm_eps", config.get("layer_norm_eps", 1e-6), 1),
        activation=config.get("hidden_act", "gelu"),
        qkv_bias=bool(config.get("qkv_bias", True)),
        qk_norm=bool(config.get("qk_normalization", False)),
    )


def read_clip(config: Mapping[str, Any], feature_layer: int) -> VisionTowerConfig:
    where = "the CLIP vision config"
    layers = _size(config, "num_hidden_layers", where, MOST_LAYERS)
    computed = layers + 1 + feature_layer if feature_layer < 0 else feature_layer
    if not 0 < computed <= layers:
        raise InputError(f"vision feature layer {feature_layer} lies outside the tower's {layers} layers")
    return VisionTowerConfig(
        **_tower_sizes(config, where),
        num_layers=computed,
        norm_epsilon=check_positive(where, "layer_norm_eps", config.get("layer_norm_eps", 1e-5), 1),
        activation=config.get("hidden_act", "quick_gelu"),
        patch_bias=False,
        layer_scale=False,
        pre_norm=True,
        unused_layers=layers - computed,
    )


def _write_vision(config: VisionTowerConfig, clip: bool) -> dict[str, Any]:
    out = {
        "model_type": "clip_vision_model" if clip else "intern_vit_300m",
        "hidden_act": config.activation,
        "hidden_size": config.embed_dim,
        "image_size": config.image_size,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_epsilon,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers + config.unused_layers,
        "patch_size": config.patch_size,
    }
    if not clip:
        out |= {"norm_type": config.norm, "qk_normalization": config.qk_norm, "qkv_bias": config.qkv_bias}
    return out


# ---- whole models


def architectures(config: Mapping[str, Any]) -> list[Any]:
    """The classes that a config names; a list of None where it names none."""
    found = config.get("architectures")
    return found if isinstance(found, list) and found and isinstance(found[0], str) else [None]


def detect_format(config: Mapping[str, Any]) -> str:
    """Which published layout a `config.json` describes, told by its content: both LLaVAs say `model_type: llava`."""
    kind = config.get("model_type")
    if kind == "phantom":
        return "phantom"
    if kind in ("llava", "llava_llama"):
        original = "mm_vision_tower" in config or "LlavaLlamaForCausalLM" in architectures(config)
        return "llava-original" if original else "llava-hf"
    if kind == "internvl_chat":
        raise InputError(
            "config.json has model_type='internvl_chat', an InternVL2: it is a parent of a Phantom, give its folder to "
            "convert as --vision, --llm and --projector"
        )
    raise InputError(
        f"config.json has model_type={kind!r}: checkpoints of Phantom (phantom), llava-hf and the original LLaVA "
        "(llava, llava_llama) are supported; of a language model and a tower `convert --llm= --vision=` makes one"
    )


def read(
    config: Mapping[str, Any],
    vision_config: Mapping[str, Any] | None = None,
    tower: VisionTowerConfig | None = None,
) -> tuple[VisionLanguageConfig, Published, TokenIds]:
    """Reads a `config.json`.

    Args:
      config: its content.
      vision_config: content of `vision_config.json` beside it, for an original LLaVA.
      tower: the vision tower of an original LLaVA, where that comes from elsewhere.

    Raises:
      InputError: it describes something else, or something that is not supported.
    """
    layout = detect_format(config)
    if config.get("quantization_config"):
        raise InputError(
            f"config.json has quantization_config={config['quantization_config']!r:.100}: weights in few bits of other "
            "libraries are not supported, take the 16-bit model"
        )
    try:
        if layout == "phantom":
            return _read_phantom(config)
        if layout == "llava-hf":
            return _read_llava_hf(config)
        return _read_llava_original(config, vision_config, tower)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"config.json does not describe a {layout} model that is supported: {error}") from error


def eos_ids(*values: Any) -> tuple[int, ...]:
    for value in values:
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (int(value),)
    raise InputError("config.json has no 'eos_token_id': without it no answer would end, take it from the checkpoint")


def _read_phantom(config):
    text = need(config, "llm_config", "config.json")
    kind = text.get("model_type")
    if kind not in _ARCHITECTURES:
        by_architecture = {architecture: name for name, architecture in _ARCHITECTURES.items()}
        kind = by_architecture.get(architectures(text)[0])
    if kind is None:
        raise InputError(f"llm_config has model_type={text.get('model_type')!r}: use one of {list(_ARCHITECTURES)}")
    vision = read_internvit(need(config, "vision_config", "config.json"))
    decoder = read_decoder(text, kind, PhantomConfig(), "llm_config of config.json")
    shuffle = round(1 / config.get("downsample_ratio", 0.5))
    projector = ProjectorConfig("pixel_shuffle", vision.embed_dim, decoder.embed_dim, shuffle)
    tokens = TokenIds(
        image=need(config, "image_token_index", "config.json"),
        eos=eos_ids(config.get("eos_token_id"), text.get("eos_token_id")),
        pad=next((c["pad_token_id"] for c in (config, text) if c.get("pad_token_id") is not None), 0),
    )
    return VisionLanguageConfig(vision, projector, decoder), Published("phantom", kind, config), tokens


def _read_llava_hf(config):
    # transformers leaves out of these what equals its own defaults.
    text = {**_LLAMA_DEFAULTS, **need(config, "text_config", "config.json")}
    if text.get("model_type", "llama") != "llama":
        raise InputError(f"text_config has model_type={text['model_type']!r}: only llama is supported in LLaVA")
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise InputError(f"vision_feature_select_strategy={strategy!r}: only 'default' (no class token) is supported")
    activation = config.get("projector_hidden_act", "gelu")
    if activation not in ("gelu", "linear"):
        raise InputError(f"projector_hidden_act={activation!r}: only 'gelu' and 'linear' are supported")
    vision = read_clip(need(config, "vision_config", "config.json"), config.get("vision_feature_layer", -2))
    decoder = read_decoder(text, "llama", None, "text_config of config.json")
    kind = "linear" if activation == "linear" else "mlp2x_gelu"
    projector = ProjectorConfig(kind, vision.embed_dim, decoder.embed_dim)
    image = config.get("image_token_index", config.get("image_token_id"))
    if image is None:
        raise InputError("config.json has no 'image_token_index': take it from the published checkpoint")
    pad = next((c["pad_token_id"] for c in (config, text) if c.get("pad_token_id") is not None), 0)
    tokens = TokenIds(image, eos_ids(config.get("eos_token_id"), text.get("eos_token_id"), 2), pad)
    return VisionLanguageConfig(vision, projector, decoder), Published("llava-hf", "llama", config), tokens


def _read_llava_original(config, vision_config, tower):
    feature = config.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise InputError(f"mm_vision_select_feature={feature!r}: only 'patch' (no class token) is supported")
    layer = config.get("mm_vision_select_layer", -2)
    name = str(config.get("mm_vision_tower"))
    if tower is not None:
        if layer != -1 - tower.unused_layers:
            raise InputError(f"mm_vision_select_layer={layer}: a tower that is given is read at -2")
        if "clip-vit-large-patch14" in name and ("336" in name) != (tower.image_size == 336):
            raise InputError(f"the model reads images with {name}, the tower that is given is for {tower.image_size}")
        vision = tower
    elif vision_config:
        vision = read_clip(vision_config.get("vision_config", vision_config), layer)
    elif "clip-vit-large-patch14" in name and layer == -2:
        vision = zoo.clip_large(336 if "336" in name else 224)
    else:
        raise InputError(f"mm_vision_tower={name!r} is not known here: put its vision_config.json beside config.json")
    decoder = read_decoder(config, "llama", None, "config.json")
    kind = config.get("mm_projector_type", "linear")
    if kind not in ("linear", "mlp2x_gelu"):
        raise InputError(f"mm_projector_type={kind!r}: linear and mlp2x_gelu are supported")
    projector = ProjectorConfig(kind, vision.embed_dim, decoder.embed_dim)
    # The original splices features in at a sentinel outside the vocabulary; on our side slots say where they go, so
    # any id of the vocabulary serves as the placeholder.
    tokens = TokenIds(decoder.vocab_size - 3, eos_ids(config.get("eos_token_id"), 2), config.get("pad_token_id") or 0)
    published = Published("llava-original", "llama", config, vision_config or {})
    return VisionLanguageConfig(vision, projector, decoder), published, tokens


def write(
    config: VisionLanguageConfig, published: Published, tokens: TokenIds, dtype: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `config.json` of a model, and the `vision_config.json` beside it (original LLaVA alone).

    Args:
      config: the model.
      published: which layout; fields of its own config that we do not interpret are kept.
      tokens: special ids.
      dtype: of the saved tensors, by PyTorch's name.

    Raises:
      InputError: the layout cannot express the model.
    """
    check_expressible(config, published)
    old = copy.deepcopy(dict(published.config))
    clip = published.format != "phantom"
    vision = _write_vision(config.vision_tower, clip)
    eos = list(tokens.eos) if len(tokens.eos) > 1 else tokens.eos[0]
    text_key = {"phantom": "llm_config", "llava-hf": "text_config", "llava-original": None}[published.format]
    text = _write_decoder(config.language_model, published.language_model, old.get(text_key, {}) if text_key else old)
    if published.format == "phantom":
        new = {
            "model_type": "phantom",
            "architectures": ["PhantomForCausalLM"],
            "downsample_ratio": 1 / config.projector.shuffle,
            "force_image_size": config.vision_tower.image_size,
            "image_token_index": tokens.image,
            "eos_token_id": eos,
            "ignore_index": -100,
            "torch_dtype": dtype,
        }
    elif published.format == "llava-hf":
        new = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": tokens.image,
            "projector_hidden_act": "linear" if config.projector.kind == "linear" else "gelu",
            "vision_feature_layer": -1 - config.vision_tower.unused_layers,
            "vision_feature_select_strategy": "default",
        }
        # Newer files say `dtype`; either is read.
        new["dtype" if "dtype" in old else "torch_dtype"] = dtype if old.get("dtype", dtype) else None
    else:
        text.pop("model_type")
        new = text | {
            "model_type": old.get("model_type", "llava"),
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_hidden_size": config.vision_tower.embed_dim,
            "mm_vision_select_layer": -1 - config.vision_tower.unused_layers,
            "mm_vision_select_feature": "patch",
            "use_mm_proj": True,
            "eos_token_id": eos,
            "torch_dtype": dtype,
        }
        if "mm_vision_tower" not in old:
            size = config.vision_tower.image_size
            new["mm_vision_tower"] = "openai/clip-vit-large-patch14" + ("-336" if size == 336 else "")
        if config.projector.kind != "linear" or "mm_projector_type" in old:
            new["mm_projector_type"] = config.projector.kind
    if text_key:
        new[text_key] = {**old.get(text_key, {}), **text}
        new["vision_config"] = {**old.get("vision_config", {}), **vision}
    if "pad_token_id" not in old:
        new["pad_token_id"] = tokens.pad
    beside = {**published.vision_config, **vision} if published.format == "llava-original" else None
    whole = {**old, **new}
    # Parts may name a dtype of their own, and it is no longer true after a cast.
    for part in (whole, *(value for value in whole.values() if isinstance(value, dict))):
        part |= {key: dtype for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)}
        # It names code that does not come with the weights.
        part.pop("auto_map", None)
    return whole, beside


def check_expressible(config: VisionLanguageConfig, published: Published) -> None:
    """Raises an `InputError` where a layout cannot express a model."""
    decoder, layout = config.language_model, published.format
    check_name("format", layout, PUBLISHED_LAYOUTS)
    expected = ("pixel_shuffle",) if layout == "phantom" else ("linear", "mlp2x_gelu")
    if config.projector.kind not in expected:
        raise InputError(f"{layout} holds a {' or '.join(expected)} projector, the model has {config.projector.kind!r}")
    if layout == "phantom" and decoder.phantom != PhantomConfig():
        raise InputError(
            f"the phantom layout has no field for {decoder.phantom}: its code fixes {PhantomConfig()}; save as 'ours'"
        )
    if layout != "phantom" and decoder.phantom is not None:
        raise InputError(f"{layout} has no phantom dimension, the model has one: save as 'phantom' or 'ours'")
    if decoder.qkv_bias != (published.language_model == "qwen2"):
        raise InputError(
            f"{published.language_model} and qkv_bias={decoder.qkv_bias} do not go together: qwen2 alone has it"
        )
