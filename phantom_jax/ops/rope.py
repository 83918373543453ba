"""Rotary position embeddings: default, linear, dynamic-NTK and su (longrope)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Attributes:
      theta: base of the geometric frequencies.
      kind: `default`, `linear`, `dynamic` (NTK), `su` or `longrope` (two names of one function).
      factor: stretch of `linear` and `dynamic`.
      max_length: longest length that the model promises; beyond it `dynamic` raises theta.
      original_max_length: length of pre-training; beyond it `su` takes the long factors.
      short_factor, long_factor: [H / 2] divisors of the frequencies for `su`.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    max_length: int = 2048
    original_max_length: int | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ("default", "linear", "dynamic", "su", "longrope"):
            raise ValueError(f"unknown rope kind {self.kind!r}: use default, linear, dynamic, su or longrope")
        if self.kind in ("su", "longrope") and self.original_max_length is None:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_length")


def frequencies(config: RopeConfig, head_dim: int, rope_length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H / 2] float32 and the factor on cosine and sine.

    Args:
      config: which rotation.
      head_dim: H.
      rope_length: longest single conversation in tokens, prompt and new tokens; `dynamic` and `su` derive from it.
        It is static, so that no key is rotated by one set of factors and its query by another.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    theta, attention_factor, divisor = config.theta, 1.0, np.ones_like(exponents)
    if config.kind == "linear":
        divisor = divisor * config.factor
    elif config.kind == "dynamic" and rope_length > config.max_length:
        stretch = config.factor * rope_length / config.max_length - (config.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    elif config.kind in ("su", "longrope"):
        original = config.original_max_length
        divisor = np.asarray(config.long_factor if rope_length > original else config.short_factor, np.float64)
        if divisor.shape != exponents.shape:
            raise ValueError(f"rope kind {config.kind!r} needs {len(exponents)} factors, got {len(divisor)}")
        scale = config.max_length / original
        if scale > 1:
            attention_factor = math.sqrt(1 + math.log(scale) / math.log(original))
    return (1.0 / (divisor * theta**exponents)).astype(np.float32), attention_factor


def canonical_length(config: RopeConfig, rope_length: int) -> int:
    """The shortest length with the same frequencies: what is static should not differ where nothing depends on it."""
    if config.kind == "dynamic":
        return max(rope_length, config.max_length)
    if config.kind in ("su", "longrope"):
        return min(rope_length, config.original_max_length + 1) if rope_length > config.original_max_length else 1
    return 1


def angles(positions_BL: jax.Array, inverse_frequencies: np.ndarray, factor: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, L, 1, H / 2] in float32, computed once for all layers."""
    angle = positions_BL.astype(jnp.float32)[:, :, None, None] * inverse_frequencies[None, None, None, :]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BLNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates the two halves of each head against each other (the layout of all Hugging Face decoders here)."""
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BLNH.dtype)
