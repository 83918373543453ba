"""One two-way table per family: which published tensor is which of our parameters, and how the one becomes the other.

A row holds a published name, the parameters it maps to (several where the published file packs them) and a
`Transform`. Names and paths carry `{layer}`; import stacks the layers on the first axis, export takes them apart.
Parameters that no computation uses (CLIP's last layer) live in a tree of their own, `unused`.
"""

import dataclasses
import math
from collections.abc import Sequence

from phantom_jax.checkpoints.layout import Layout, View
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig

Shapes = Sequence[tuple[int, ...]]


class Transform:
    """A bijection between one published tensor and our arrays, as a layout; the base class changes nothing."""

    def layout(self, shapes: Shapes) -> Layout:
        """Where the numbers of our arrays, of these shapes, stand in the published tensor."""
        return Layout(shapes[0], (_row_major(shapes[0]),))


@dataclasses.dataclass(frozen=True)
class Reshape(Transform):
    """The same numbers in another shape: heads split off, or axes of size one dropped."""

    published: tuple[int, ...]

    def layout(self, shapes):
        return Layout(self.published, (_row_major(shapes[0]),))


@dataclasses.dataclass(frozen=True)
class Convolution(Transform):
    """PyTorch's patch kernel [D, 3, p, p] and our [p, p, 3, D]."""

    def layout(self, shapes):
        published = shapes[0][::-1]
        published = (published[0], published[1], published[3], published[2])
        width, colors, rows, columns = (axis for axis in _row_major(published).axes)
        return Layout(published, (View(0, (rows, columns, colors, width)),))


@dataclasses.dataclass(frozen=True)
class Linear(Transform):
    """PyTorch's [out, in] and our [*in, *out], of one map or of several one below the other: `qkv`, `gate_up_proj`.

    `inputs` counts the input axes of our arrays, 0 for biases.
    """

    inputs: int = 1

    def layout(self, shapes):
        width = math.prod(shapes[0][: self.inputs])
        views, rows = [], 0
        for shape in shapes:
            inputs, outputs = shape[: self.inputs], shape[self.inputs :]
            axes = (*_row_major(inputs).axes, *_row_major(outputs, width).axes)
            views.append(View(rows * width, axes))
            rows += math.prod(outputs)
        return Layout((rows, width) if self.inputs else (rows,), tuple(views))


@dataclasses.dataclass(frozen=True)
class GroupedQKV(Transform):
    """InternLM2's `wqkv`: per key-value head its query heads, then the key, then the value."""

    def layout(self, shapes):
        (width, heads, head_dim), (_, kv_heads, _), _ = shapes
        groups = heads // kv_heads
        head = head_dim * width
        kv_head = (groups + 2) * head
        axis_in, axis_dim = ((width, 1),), ((head_dim, width),)
        query = View(0, (axis_in, ((kv_heads, kv_head), (groups, head)), axis_dim))
        key, value = (View((groups + n) * head, (axis_in, ((kv_heads, kv_head),), axis_dim)) for n in (0, 1))
        return Layout((kv_heads * (groups + 2) * head_dim, width), (query, key, value))


def _row_major(shape: Sequence[int], unit: int = 1) -> View:
    axes: list[tuple[tuple[int, int], ...]] = []
    for size in reversed(shape):
        axes.insert(0, ((size, unit),))
        unit *= size
    return View(0, tuple(axes))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      name: published name; `{layer}` where there is one tensor a layer.
      paths: our parameters, `collection/module/.../name` with collection `params` or `unused`.
      transform: between the two.
      layers: how many layers `{layer}` runs over; None without layers. Our array stacks them on its first axis.
      first_layer: number of the first of them in the published file.
    """

    name: str
    paths: tuple[str, ...]
    transform: Transform = Transform()
    layers: int | None = None
    first_layer: int = 0

    def names(self) -> list[str]:
        """Published names of all layers."""
        if self.layers is None:
            return [self.name]
        return [self.name.format(layer=self.first_layer + layer) for layer in range(self.layers)]


class _Table:
    """Collects rows under a published and one of our prefixes."""

    def __init__(self, published: str, ours: str, layers: int | None = None, first_layer: int = 0):
        self.rows, self.published, self.ours = [], published, ours
        self.layers, self.first_layer = layers, first_layer

    def add(self, name: str, *paths: str, transform: Transform = Transform()):  # noqa: B008 - stateless
        paths = tuple(f"{self.ours}/{path}" for path in paths)
        self.rows.append(Row(self.published + name, paths, transform, self.layers, self.first_layer))


def _decoder_layers(config: DecoderConfig, layout: str, prefix: str) -> list[Row]:
    table = _Table(prefix + "layers.{layer}.", "params/language_model/layers", config.num_layers)
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    qkv = tuple(f"attention/{name}/kernel" for name in heads)
    attention = "self_attn"
    if layout == "internlm2":
        attention = "attention"
        table.add("attention.wqkv.weight", *qkv, transform=GroupedQKV())
        table.add("attention.wo.weight", "attention/out/kernel", transform=Linear(2))
        for name, path in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            table.add(f"feed_forward.{name}.weight", f"{path}/kernel", transform=Linear())
        table.add("attention_norm.weight", "norm_1/scale")
        table.add("ffn_norm.weight", "norm_2/scale")
    else:
        if layout == "phi3":
            table.add("self_attn.qkv_proj.weight", *qkv, transform=Linear())
            table.add("mlp.gate_up_proj.weight", "gate/kernel", "up/kernel", transform=Linear())
        else:
            for name, count in heads.items():
                letter = name[0]
                table.add(f"self_attn.{letter}_proj.weight", f"attention/{name}/kernel", transform=Linear())
                if config.qkv_bias:
                    bias = Reshape((count * config.head_dim,))
                    table.add(f"self_attn.{letter}_proj.bias", f"attention/{name}/bias", transform=bias)
            for name in ("gate", "up"):
                table.add(f"mlp.{name}_proj.weight", f"{name}/kernel", transform=Linear())
        table.add("self_attn.o_proj.weight", "attention/out/kernel", transform=Linear(2))
        table.add("mlp.down_proj.weight", "down/kernel", transform=Linear())
        table.add("input_layernorm.weight", "norm_1/scale")
        table.add("post_attention_layernorm.weight", "norm_2/scale")
    if config.phantom is not None:
        branches = ["query", "key"] * config.phantom.query_key + ["value"] * config.phantom.value
        for branch in branches:
            for linear in ("linear_q", "linear_k", "linear_v", "linear_o"):
                name, path = f"xattn_{branch}_phantom.{linear}.weight", f"attention/phantom/{branch}/{linear}"
                table.add(f"{attention}.{name}", path, transform=Linear())
        if config.phantom.value and config.phantom.gate == "learned":
            for number, gate in (("1", "gate_plain"), ("2", "gate_phantom")):
                name, path = f"{attention}.gating_phantom_{number}", f"attention/phantom/{gate}"
                table.add(f"{name}.weight", f"{path}/kernel", transform=Reshape((1, config.head_dim)))
                table.add(f"{name}.bias", f"{path}/bias", transform=Reshape((1,)))
    return table.rows


def decoder_rows(config: DecoderConfig, layout: str, prefix: str) -> list[Row]:
    """Rows of a decoder.

    Args:
      config: its sizes.
      layout: `llama` (also Qwen2), `internlm2` or `phi3`: how the published file packs and calls things.
      prefix: what stands before `model.` and the head.
    """
    internlm2 = layout == "internlm2"
    table = _Table(prefix, "params/language_model")
    table.add("model.tok_embeddings.weight" if internlm2 else "model.embed_tokens.weight", "embedding")
    table.add("model.norm.weight", "final_norm/scale")
    if not config.tie_embeddings:
        table.add("output.weight" if internlm2 else "lm_head.weight", "head/kernel", transform=Linear())
    return table.rows + _decoder_layers(config, layout, prefix + "model.")


def internvit_rows(config: VisionTowerConfig, prefix: str) -> list[Row]:
    """Rows of an InternViT tower."""
    width = config.embed_dim
    table = _Table(prefix + "embeddings.", "params/vision_tower")
    table.add("class_embedding", "class_embedding", transform=Reshape((1, 1, width)))
    table.add("position_embedding", "position_embedding", transform=Reshape((1, 1 + config.grid**2, width)))
    table.add("patch_embedding.weight", "patch_kernel", transform=Convolution())
    table.add("patch_embedding.bias", "patch_bias")
    layers = _Table(prefix + "encoder.layers.{layer}.", "params/vision_tower/layers", config.num_layers)
    qkv = ("query", "key", "value")
    layers.add("attn.qkv.weight", *(f"{name}/kernel" for name in qkv), transform=Linear())
    if config.qkv_bias:
        layers.add("attn.qkv.bias", *(f"{name}/bias" for name in qkv), transform=Linear(inputs=0))
    if config.qk_norm:
        layers.add("attn.q_norm.weight", "query_norm/scale", transform=Reshape((width,)))
        layers.add("attn.k_norm.weight", "key_norm/scale", transform=Reshape((width,)))
    layers.add("attn.proj.weight", "out/kernel", transform=Linear(2))
    layers.add("attn.proj.bias", "out/bias")
    for name, path in (("fc1", "up"), ("fc2", "down")):
        layers.add(f"mlp.{name}.weight", f"{path}/kernel", transform=Linear())
        layers.add(f"mlp.{name}.bias", f"{path}/bias")
    for number in ("1", "2"):
        layers.add(f"norm{number}.weight", f"norm_{number}/scale")
        if config.norm == "layer_norm":
            layers.add(f"norm{number}.bias", f"norm_{number}/bias")
        if config.layer_scale:
            layers.add(f"ls{number}", f"layer_scale_{number}")
    return table.rows + layers.rows


def clip_rows(config: VisionTowerConfig, prefix: str) -> list[Row]:
    """Rows of a CLIP tower, with the layers and the norm behind the one it is read at."""
    table = _Table(prefix, "params/vision_tower")
    table.add("embeddings.class_embedding", "class_embedding")
    table.add("embeddings.position_embedding.weight", "position_embedding")
    table.add("embeddings.patch_embedding.weight", "patch_kernel", transform=Convolution())
    # The checkpoint's own spelling.
    table.add("pre_layrnorm.weight", "pre_norm/scale")
    table.add("pre_layrnorm.bias", "pre_norm/bias")
    rows = table.rows + _clip_layers(config, prefix, "params/vision_tower/layers", config.num_layers, 0)
    if config.unused_layers:
        rows += _clip_layers(config, prefix, "unused/vision_tower/layers", config.unused_layers, config.num_layers)
    unused = _Table(prefix, "unused/vision_tower")
    unused.add("post_layernorm.weight", "final_norm/scale")
    unused.add("post_layernorm.bias", "final_norm/bias")
    return rows + unused.rows


def _clip_layers(config, prefix, ours, count, first):
    width = (config.embed_dim,)
    table = _Table(prefix + "encoder.layers.{layer}.", ours, count, first)
    for name, path in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        table.add(f"self_attn.{name}.weight", f"{path}/kernel", transform=Linear())
        table.add(f"self_attn.{name}.bias", f"{path}/bias", transform=Reshape(width))
    table.add("self_attn.out_proj.weight", "out/kernel", transform=Linear(2))
    table.add("self_attn.out_proj.bias", "out/bias")
    for name, path in (("fc1", "up"), ("fc2", "down")):
        table.add(f"mlp.{name}.weight", f"{path}/kernel", transform=Linear())
        table.add(f"mlp.{name}.bias", f"{path}/bias")
    for number in ("1", "2"):
        table.add(f"layer_norm{number}.weight", f"norm_{number}/scale")
        table.add(f"layer_norm{number}.bias", f"norm_{number}/bias")
    return table.rows


def projector_rows(config: ProjectorConfig, names: dict[str, str]) -> list[Row]:
    """Rows of a projector; `names` maps our modules (`norm`, `linear_1`, `linear_2`) to published prefixes."""
    table = _Table("", "params/projector")
    for module, name in names.items():
        if module == "norm":
            table.add(f"{name}.weight", "norm/scale")
            table.add(f"{name}.bias", "norm/bias")
        else:
            table.add(f"{name}.weight", f"{module}/kernel", transform=Linear())
            table.add(f"{name}.bias", f"{module}/bias")
    return table.rows


def phantom_table(config: VisionLanguageConfig, layout: str) -> list[Row]:
    """Phantom as published: InternViT, `vision_proj`, and a Qwen2 (`llama`), InternLM2 or Phi-3 decoder."""
    projector = {"norm": "vision_proj.0", "linear_1": "vision_proj.1", "linear_2": "vision_proj.3"}
    return (
        internvit_rows(config.vision_tower, "vision_model.")
        + projector_rows(config.projector, projector)
        + decoder_rows(config.language_model, layout, "language_model.")
    )


def llava_hf_table(config: VisionLanguageConfig) -> list[Row]:
    """`llava-hf` on disk (the names that all versions of transformers read)."""
    linears = ("linear_1",) if config.projector.kind == "linear" else ("linear_1", "linear_2")
    projector = {name: f"multi_modal_projector.{name}" for name in linears}
    return (
        clip_rows(config.vision_tower, "vision_tower.vision_model.")
        + projector_rows(config.projector, projector)
        + decoder_rows(config.language_model, "llama", "language_model.")
    )


TOWER = "vision_tower.vision_tower.vision_model."
"""Where an original LLaVA has its vision tower, if it does."""


def llava_original_table(config: VisionLanguageConfig, *, tower: bool = True) -> list[Row]:
    """The original LLaVA, with or without the tower inside."""
    projector = {"linear_1": "model.mm_projector"}
    if config.projector.kind == "mlp2x_gelu":
        projector = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    return (
        (clip_rows(config.vision_tower, "model." + TOWER) if tower else [])
        + projector_rows(config.projector, projector)
        + decoder_rows(config.language_model, "llama", "")
    )
