"""One vision transformer for InternViT and CLIP."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from phantom_jax import axes
from phantom_jax.models.layers import Dense, LayerNorm, RMSNorm, scaled_normal
from phantom_jax.models.partitioning import constrain, gather, split_of
from phantom_jax.models.remat import KEY, MIXED, QUERY, VALUE, rematerialized
from phantom_jax.ops import image as image_ops
from phantom_jax.ops import norm as norm_ops
from phantom_jax.ops.attention import attention
from phantom_jax.sizes import MOST_LAYERS, MOST_PIXELS, check_positive, check_size


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig:
    """A vision transformer; the defaults are InternViT-300M-448px.

    Attributes:
      embed_dim, num_layers, num_heads, mlp_dim: sizes; `num_layers` counts the layers that are computed.
      patch_size, image_size: pixels; `image_size` fixes the stored position grid, other sizes resize it.
      norm: `layer_norm` or `rms_norm`, with `norm_epsilon`.
      activation: `gelu` (exact) or `quick_gelu` (x * sigmoid(1.702 x)).
      qkv_bias, patch_bias: which biases exist.
      qk_norm: RMSNorm of queries and keys over all heads together, before they are split.
      layer_scale: learned scale [D] of each residual branch.
      pre_norm: LayerNorm between the embeddings and the first layer (CLIP).
      unused_layers: layers that a published checkpoint holds behind the computed ones (CLIP read at its penultimate
        layer: 1). They are kept with the checkpoint and never computed.
    """

    embed_dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    patch_size: int = 14
    image_size: int = 448
    norm: str = "layer_norm"
    norm_epsilon: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    patch_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = True
    pre_norm: bool = False
    unused_layers: int = 0

    def __post_init__(self):
        where = "the vision tower"
        for name in ("embed_dim", "num_heads", "mlp_dim"):
            check_size(where, name, getattr(self, name))
        check_size(where, "num_layers", self.num_layers, MOST_LAYERS)
        check_size(where, "image_size", self.image_size, MOST_PIXELS)
        check_size(where, "patch_size", self.patch_size, self.image_size)
        check_positive(where, "norm_epsilon", self.norm_epsilon, 1)
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"vision norm {self.norm!r} does not exist: use layer_norm or rms_norm")
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"vision activation {self.activation!r} does not exist: use gelu or quick_gelu")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"vision embed_dim {self.embed_dim} is no multiple of {self.num_heads} heads")

    @property
    def grid(self) -> int:
        """Patches along one side of an image of `image_size`."""
        return self.image_size // self.patch_size


def _activation(name: str):
    if name == "quick_gelu":
        return lambda x: x * jax.nn.sigmoid(1.702 * x)
    return functools.partial(jax.nn.gelu, approximate=False)


def _constrain(x_BPD):
    return constrain(x_BPD, (axes.ACTIVATION_TILES, None, axes.ACTIVATION_EMBED))


class HeadNorm(nn.Module):
    """RMSNorm over all heads [N, H] of a token at once, as InternViT's qk-norm does it."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BPNH):
        shape = x_BPNH.shape[-2:]
        init = nn.with_logical_partitioning(nn.initializers.ones, (axes.VISION_HEADS, axes.HEAD_DIM))
        scale = self.param("scale", init, shape, jnp.float32)
        flat = x_BPNH.reshape(*x_BPNH.shape[:-2], -1)
        return norm_ops.rms_norm(flat, scale.reshape(-1), self.epsilon).reshape(x_BPNH.shape)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer: attention and MLP, each with an optional LayerScale."""

    config: VisionTowerConfig
    dtype: Any = jnp.float32
    attention_backend: str = "xla"

    @nn.compact
    def __call__(self, x_BPD: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        heads, head_dim = config.num_heads, config.embed_dim // config.num_heads
        norm = RMSNorm if config.norm == "rms_norm" else LayerNorm
        depth_gain = (2 * config.num_layers) ** -0.5

        def residual_scale(name, y):
            if not config.layer_scale:
                return y
            init = nn.with_logical_partitioning(nn.initializers.ones, (axes.NORM,))
            scale = self.param(name, init, (config.embed_dim,), jnp.float32)
            return y * scale.astype(y.dtype)[None, None, :]

        def project(name):
            projected = Dense(
                (config.embed_dim,),
                (heads, head_dim),
                (axes.VISION_EMBED,),
                (axes.VISION_HEADS, axes.HEAD_DIM),
                config.qkv_bias,
                self.dtype,
                name=name,
            )(y)
            return checkpoint_name(projected, name)

        y = norm(config.norm_epsilon, name="norm_1")(x_BPD)
        query, key, value = map(project, (QUERY, KEY, VALUE))
        if config.qk_norm:
            query = HeadNorm(config.norm_epsilon, name="query_norm")(query)
            key = HeadNorm(config.norm_epsilon, name="key_norm")(key)
        y = attention(
            query,
            key,
            value,
            split=split_of((axes.ACTIVATION_TILES, None, axes.VISION_HEADS), query.shape[:3]),
            scale=head_dim**-0.5,
            backend=self.attention_backend,
        ).astype(self.dtype)
        y = Dense(
            (heads, head_dim),
            (config.embed_dim,),
            (axes.VISION_HEADS, axes.HEAD_DIM),
            (axes.VISION_EMBED,),
            True,
            self.dtype,
            depth_gain,
            name="out",
        )(y)
        x_BPD = x_BPD + residual_scale("layer_scale_1", checkpoint_name(y, MIXED))
        y = norm(config.norm_epsilon, name="norm_2")(x_BPD)
        y = Dense(
            (config.embed_dim,),
            (config.mlp_dim,),
            (axes.VISION_EMBED,),
            (axes.VISION_MLP,),
            True,
            self.dtype,
            name="up",
        )(y)
        y = _activation(config.activation)(y)
        y = Dense(
            (config.mlp_dim,),
            (config.embed_dim,),
            (axes.VISION_MLP,),
            (axes.VISION_EMBED,),
            True,
            self.dtype,
            depth_gain,
            name="down",
        )(y)
        return _constrain(x_BPD + residual_scale("layer_scale_2", y)), None


class VisionTower(nn.Module):
    """Images to token features.

    Call with pixels [B, H, W, 3] float, normalised; returns [B, 1 + P, D] with the class token first, in raster order,
    without a final norm (InternViT has none, and CLIP is read before its own).
    """

    config: VisionTowerConfig
    dtype: Any = jnp.float32
    attention_backend: str = "xla"
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        config, patch = self.config, self.config.patch_size
        batch, height, width, channels = pixels_BHWC.shape
        if height % patch or width % patch:
            raise ValueError(f"images of {width} x {height} pixels do not divide into patches of {patch}")
        rows, columns = height // patch, width // patch

        def parameter(name, init, names, shape):
            stored = self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)
            return gather(stored.astype(self.dtype), names) if len(shape) > 1 else stored.astype(self.dtype)

        kernel = parameter(
            "patch_kernel",
            scaled_normal(patch * patch * channels),
            (axes.PATCH_ROW, axes.PATCH_COLUMN, axes.CHANNELS, axes.VISION_EMBED),
            (patch, patch, channels, config.embed_dim),
        )
        pixels_BHWC = constrain(pixels_BHWC, (axes.ACTIVATION_TILES, None, None, None))
        patches = pixels_BHWC.astype(self.dtype).reshape(batch, rows, patch, columns, patch, channels)
        x_BPD = jnp.einsum("brpcqk,pqkd->brcd", patches, kernel).reshape(batch, rows * columns, config.embed_dim)
        if config.patch_bias:
            bias = parameter("patch_bias", nn.initializers.zeros, (axes.VISION_EMBED,), (config.embed_dim,))
            x_BPD = x_BPD + bias[None, None, :]
        small = nn.initializers.normal(0.02)
        token = parameter("class_embedding", small, (axes.VISION_EMBED,), (config.embed_dim,))
        positions = parameter(
            "position_embedding", small, (axes.POSITION, axes.VISION_EMBED), (1 + config.grid**2, config.embed_dim)
        )
        grid = positions[1:].reshape(config.grid, config.grid, config.embed_dim)
        grid = image_ops.resize_grid(grid, rows, columns).reshape(rows * columns, config.embed_dim)
        token = jnp.broadcast_to((token + positions[0])[None, None, :], (batch, 1, config.embed_dim))
        x_BPD = _constrain(jnp.concatenate([token, x_BPD + grid[None]], axis=1))
        if config.pre_norm:
            x_BPD = LayerNorm(config.norm_epsilon, name="pre_norm")(x_BPD)
        layers = nn.scan(
            rematerialized(VisionLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )
        x_BPD, _ = layers(config, self.dtype, self.attention_backend, name="layers")(x_BPD)
        return x_BPD
