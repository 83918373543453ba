"""The key-value cache: static arrays that tokens are written into once, phantom halves included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from phantom_jax.models.phantom import PhantomConfig, PhantomStates
from phantom_jax.ops.quantize import dequantize_heads, quantize_heads
from phantom_jax.ops.structure import Structure


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "key_scale", "value_scale", "phantom"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
      key: [B, S, K, H or 2H], in the dtype of the computation or int8 codes.
      value: [B, S, K, H or 2H], likewise.
      key_scale, value_scale: [B, S, K, 1 or 2] float32, one for each half; None unless the cache is int8.
      phantom: states of the sos token; None before the prompt and without a phantom dimension.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None
    phantom: PhantomStates | None = None

    def write(self, key_BLKH: jax.Array, value_BLKE: jax.Array, start: jax.Array) -> "LayerCache":
        """The cache with tokens written at slots `start`, `start + 1`, ..."""

        def put(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)

        if self.key_scale is None:
            return dataclasses.replace(self, key=put(self.key, key_BLKH), value=put(self.value, value_BLKE))
        key, key_scale = quantize_heads(key_BLKH, self.key_scale.shape[-1])
        value, value_scale = quantize_heads(value_BLKE, self.value_scale.shape[-1])
        return dataclasses.replace(
            self,
            key=put(self.key, key),
            value=put(self.value, value),
            key_scale=put(self.key_scale, key_scale),
            value_scale=put(self.value_scale, value_scale),
        )

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """All keys and values, [B, S, K, H or 2H] each."""
        if self.key_scale is None:
            return self.key.astype(dtype), self.value.astype(dtype)
        return (
            dequantize_heads(self.key, self.key_scale, dtype),
            dequantize_heads(self.value, self.value_scale, dtype),
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "structure", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far: no old token is ever computed again.

    Each layer has buffers of its own, which a compiled loop updates in place.

    Attributes:
      layers: one for each decoder layer.
      structure: [B, S]; segment 0 where nothing was written.
      length: int32 scalar, slots written; all rows write at the same slot, which is why prompts are left padded.
    """

    layers: tuple[LayerCache, ...]
    structure: Structure
    length: jax.Array

    def with_phantom(self, states: tuple[PhantomStates, ...] | None) -> "Cache":
        """The cache with the sos token's states of each layer, where they are known before the prompt."""
        states = (None,) * len(self.layers) if states is None else states
        layers = [dataclasses.replace(layer, phantom=state) for layer, state in zip(self.layers, states, strict=True)]
        return dataclasses.replace(self, layers=tuple(layers))


def empty_cache(
    config,
    batch_size: int,
    slots: int,
    dtype,
    *,
    int8: bool = False,
) -> Cache:
    """A cache of `slots` tokens a row, nothing written.

    Args:
      config: the decoder's. With a phantom dimension keys and values are twice as wide.
      batch_size: rows.
      slots: tokens a row.
      dtype: of keys and values.
      int8: whether to store codes of 8 bits, each head and half with a scale of its own.
    """
    key_halves, value_halves = _halves(config.phantom)
    shape = (batch_size, slots, config.num_kv_heads)

    def layer() -> LayerCache:
        def scale(halves):
            return jnp.zeros((*shape, halves), jnp.float32) if int8 else None

        return LayerCache(
            key=jnp.zeros((*shape, config.head_dim * key_halves), jnp.int8 if int8 else dtype),
            value=jnp.zeros((*shape, config.head_dim * value_halves), jnp.int8 if int8 else dtype),
            key_scale=scale(key_halves),
            value_scale=scale(value_halves),
        )

    def zeros():
        return jnp.zeros((batch_size, slots), jnp.int32)

    layers = tuple(layer() for _ in range(config.num_layers))
    return Cache(layers, Structure(zeros(), zeros(), zeros()), jnp.zeros((), jnp.int32))


def _halves(phantom: PhantomConfig | None) -> tuple[int, int]:
    if phantom is None:
        return 1, 1
    return 1 + phantom.query_key, 1 + phantom.value
