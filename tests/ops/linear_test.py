import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.ops.linear import LowRankKernel, linear, low_rank_product
from phantom_jax.ops.quantize import QuantizedTensor, dequantize, quantize

INPUTS, OUTPUTS, RANK = (4, 32), (6,), 3


@functools.cache
def arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (2, 5, *INPUTS), (*INPUTS, *OUTPUTS), (*INPUTS, RANK), (RANK, *OUTPUTS), (2, 5, *OUTPUTS)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def kernel_of(kind):
    kernel = arrays()[1]
    return kernel if kind == "float" else quantize(kernel, kind, inputs=2)


def in_floats(kernel):
    return dequantize(kernel, jnp.float32) if isinstance(kernel, QuantizedTensor) else kernel


@pytest.mark.parametrize("kind", ["float", "int8", "nf4"])
def test_value_and_gradients_are_those_of_the_formula(kind):
    x, _, a, b, weights = arrays()
    kernel = kernel_of(kind)

    def ours(x, a, b):
        return jnp.sum(weights * linear(x, LowRankKernel(kernel, a, b, None, 0.7, 0.5), 2, jnp.float32))

    def formula(x, a, b):
        whole = in_floats(kernel) + 0.7 * jnp.einsum("ihr,ro->iho", a, b)
        return jnp.sum(weights * jnp.einsum("blih,iho->blo", x, whole))

    (value, gradients), (expected, expected_gradients) = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))(x, a, b) for function in (ours, formula)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(jax.jit(ours)(x, a, b), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("repeats", [1, 40])
def test_a_product_is_the_same_with_and_without_a_gradient(kind, repeats):
    """To the bit, for few rows and for many: a reference without a gradient is what training compares with."""
    x, kernel = jnp.tile(arrays()[0], (1, repeats, 1, 1)).astype(jnp.bfloat16), kernel_of(kind)

    def product(x):
        return linear(x, kernel, 2, jnp.bfloat16)

    def loss(x):
        y = product(x)
        return jnp.sum(y.astype(jnp.float32)), y

    np.testing.assert_array_equal(jax.jit(product)(x), jax.jit(jax.grad(loss, has_aux=True))(x)[1])


def test_the_backward_pass_keeps_codes_and_no_floats():
    """Over a scan of layers: what it holds of each kernel is less than a byte a weight."""
    layers, width = 4, 128
    stacked = quantize(jax.random.normal(jax.random.key(0), (layers, width, width)), "nf4", inputs=1, layers=1)
    x = jnp.ones((2, width))

    def run(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(linear(x, kernel, 1, jnp.float32)), None), x, kernels)[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: run(x, stacked), x)[1], x))
    floats = sum(leaf.size for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating))
    # Activations [layers, 2, width] and the scales of the codes.
    assert floats <= 2 * layers * 2 * width + 2 * stacked.scales.size + 2 * layers, [leaf.shape for leaf in kept]
    whole = dequantize(stacked, jnp.float32)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: run(x, whole), x)[1], x))
    assert sum(leaf.size for leaf in kept) >= whole.size


def test_factors_and_inputs_are_rounded_to_the_dtype_of_the_computation():
    x, kernel, a, b, _ = arrays()
    low = LowRankKernel(kernel, a, b, None, 2.0, 0.0)
    y = linear(x, low, 2, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and linear(x, low, 2, jnp.bfloat16, jnp.float32).dtype == jnp.float32
    whole = kernel + 2 * low_rank_product(a, b, 0)
    expected = np.asarray(jnp.einsum("blih,iho->blo", x, whole))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=0.02 * np.abs(expected).max())
    assert low.shape == kernel.shape


def test_dropout_of_the_inputs_of_a():
    """The share that is dropped, what is left scaled, one mask a key, and nothing of it in the plain product."""
    rate, count = 0.25, 20_000
    x, kernel = jnp.ones((count, 8)), jnp.zeros((8, 8))
    factors = LowRankKernel(kernel, jnp.eye(8), jnp.eye(8), jax.random.key(1), 1.0, rate)
    y = np.asarray(linear(x, factors, 1, jnp.float32))
    values, counts = np.unique(y.round(5), return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], atol=1e-5)
    share = counts[0] / y.size
    assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size)
    again, other = (
        np.asarray(linear(x, dataclasses.replace(factors, dropout_key=jax.random.key(seed)), 1, jnp.float32))
        for seed in (1, 2)
    )
    np.testing.assert_array_equal(again, y)
    assert (other != y).mean() > 0.3
    plain = LowRankKernel(jnp.eye(8), jnp.eye(8), jnp.zeros((8, 8)), jax.random.key(1), 1.0, rate)
    np.testing.assert_array_equal(linear(x, plain, 1, jnp.float32), x)


def test_stacked_products():
    a, b = jax.random.normal(jax.random.key(0), (3, 4, 5, 2)), jax.random.normal(jax.random.key(1), (3, 2, 6, 7))
    expected = np.einsum("lijr,lrop->lijop", a, b)
    np.testing.assert_allclose(low_rank_product(a, b, 1), expected, rtol=1e-5, atol=1e-5)
