"""Rows of several conversations for the tests of the attention kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.ops.structure import Structure


def inputs(rows=2, length=130, heads=4, kv_heads=2, head_dim=16, value_width=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (rows, length, heads, head_dim), dtype)
    key = jax.random.normal(keys[1], (rows, length, kv_heads, head_dim), dtype)
    value = jax.random.normal(keys[2], (rows, length, kv_heads, value_width), dtype)
    return query, key, value


def structure(lengths, length):
    """Conversations of these lengths in each row, positions counted in each, padding behind them."""
    segment, position = np.zeros((2, len(lengths), length), np.int32)
    for row, parts in enumerate(lengths):
        start = 0
        for number, part in enumerate(parts):
            segment[row, start : start + part] = number + 1
            position[row, start : start + part] = np.arange(part)
            start += part
    return Structure(jnp.asarray(position), jnp.asarray(segment), jnp.zeros_like(segment))


def weighed(function, inputs):
    """A jitted function's output and the gradients of a sum that weighs every value of it differently."""

    def loss(inputs):
        out = function(*inputs)
        return jnp.sum(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape) * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]
