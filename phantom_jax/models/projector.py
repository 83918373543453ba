"""From vision features to the decoder's embedding space."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from phantom_jax import axes
from phantom_jax.models.layers import Dense, LayerNorm
from phantom_jax.sizes import check_size


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Which projector.

    Attributes:
      kind: `pixel_shuffle` (Phantom: space to depth, LayerNorm, Linear, exact GELU, Linear), `linear` (LLaVA v1 and the
        scaling study) or `mlp2x_gelu` (LLaVA v1.5).
      vision_dim: width of the vision features.
      embed_dim: width of the decoder.
      shuffle: side of the square of patches that `pixel_shuffle` joins into one token (2 for the ratio 0.5).
    """

    kind: str
    vision_dim: int
    embed_dim: int
    shuffle: int = 1

    def __post_init__(self):
        for name in ("vision_dim", "embed_dim", "shuffle"):
            check_size("the projector", name, getattr(self, name))
        if self.kind not in ("pixel_shuffle", "linear", "mlp2x_gelu"):
            raise ValueError(f"projector {self.kind!r} does not exist: use pixel_shuffle, linear or mlp2x_gelu")

    @property
    def input_dim(self) -> int:
        return self.vision_dim * self.shuffle**2


def pixel_shuffle(x_BPD: jax.Array, side: int) -> jax.Array:
    """Joins squares of side x side patches of a square grid: [B, P, D] -> [B, P / side^2, side^2 D], row-major."""
    batch, patches, width = x_BPD.shape
    grid = round(patches**0.5)
    if grid * grid != patches or grid % side:
        raise ValueError(f"{patches} patches are no square grid that divides by {side}")
    x = x_BPD.reshape(batch, grid // side, side, grid // side, side, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, patches // side**2, side**2 * width)


class Projector(nn.Module):
    """Vision features [B, P, Dv] without class token to image tokens [B, P / shuffle^2, D]."""

    config: ProjectorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        config = self.config

        def dense(size_in, axis_in, name):
            return Dense((size_in,), (config.embed_dim,), (axis_in,), (axes.EMBED,), True, self.dtype, name=name)

        if config.kind == "linear":
            return dense(config.input_dim, axes.PROJECTOR_IN, "linear_1")(x_BPD)
        if config.kind == "pixel_shuffle":
            x_BPD = LayerNorm(1e-5, name="norm")(pixel_shuffle(x_BPD, config.shuffle))
        x_BPD = dense(config.input_dim, axes.PROJECTOR_IN, "linear_1")(x_BPD)
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        # The kernel's input axis has a name of its own: one mesh axis cannot shard both axes of a square kernel.
        return dense(config.embed_dim, axes.PROJECTOR_IN, "linear_2")(gelu(x_BPD))
