"""Normalisation in float32, whatever the dtype of the activations."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis; scale [D]."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normed * _row(scale, x)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`(x - mean) / std * scale + bias` over the last axis; scale and bias [D]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (normed * _row(scale, x) + _row(bias, x)).astype(x.dtype)


def _row(vector, x):
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)
