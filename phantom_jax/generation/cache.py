"""Allocation of the static key-value cache."""

import jax.numpy as jnp

from phantom_jax.models.decoder import Cache, DecoderConfig
from phantom_jax.ops.attention import Structure


def empty_cache(config: DecoderConfig, batch_size: int, slots: int, dtype) -> Cache:
    """A cache of `slots` tokens a row, nothing written. With a phantom dimension keys and values are twice as wide."""
    phantom = config.phantom
    key_width = config.head_dim * (2 if phantom is not None and phantom.query_key else 1)
    value_width = config.head_dim * (2 if phantom is not None and phantom.value else 1)
    shape = (config.num_layers, batch_size, slots, config.num_kv_heads)
    zeros = jnp.zeros((batch_size, slots), jnp.int32)
    return Cache(
        key=jnp.zeros((*shape, key_width), dtype),
        value=jnp.zeros((*shape, value_width), dtype),
        structure=Structure(zeros, zeros, zeros),
        length=jnp.zeros((), jnp.int32),
    )
