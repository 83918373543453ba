"""One linear map for kernels of floats, in few bits, and with a low-rank change beside them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from phantom_jax.ops.quantize import QuantizedTensor, dequantize, matmul


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "a", "b", "dropout_key"],
    meta_fields=["scaling", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class LowRankKernel:
    """A kernel W that acts as W + scaling A B (Hu et al., arXiv 2106.09685), of one layer or stacked.

    Every array begins with the layer axes, so that slicing all leaves along axis 0 gives the kernel of one layer.

    Attributes:
      kernel: [*layers, *inputs, *outputs], floats or a `QuantizedTensor`.
      a: [*layers, *inputs, r].
      b: [*layers, r, *outputs].
      dropout_key: keys [*layers] of the mask on A's input; None: nothing is dropped.
      scaling: alpha / r.
      dropout: share of A's inputs that is dropped where there is a key.
    """

    kernel: jax.Array | QuantizedTensor
    a: jax.Array
    b: jax.Array
    dropout_key: jax.Array | None
    scaling: float
    dropout: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape


# Up to so many rows a product is bound by reading the codes.
_FEW_ROWS = 128

Kernel = jax.Array | QuantizedTensor | LowRankKernel


def linear(x: jax.Array, kernel: Kernel, inputs: int, dtype: Any, output_dtype: Any = None) -> jax.Array:
    """Contracts the last axes of x with the first ones of a kernel of one layer.

    With low-rank factors y = x W + scaling (drop(x) A) B; A and B, whatever they are kept in, are rounded to `dtype`,
    and the product with A, which has the fewest numbers, comes first. Codes of quantised kernels have no gradient.

    Args:
      x: [..., *inputs].
      kernel: [*inputs, *outputs].
      inputs: how many axes are contracted.
      dtype: of the factors.
      output_dtype: of the accumulation and the result, `dtype` where None.

    Returns:
      [..., *outputs].
    """
    x = x.astype(dtype)
    if isinstance(kernel, LowRankKernel):
        y = linear(x, kernel.kernel, inputs, dtype, output_dtype)
        dropped = x if kernel.dropout_key is None else _drop(x, kernel.dropout, kernel.dropout_key)
        change = _contract(_contract(dropped, kernel.a.astype(dtype), inputs), kernel.b.astype(dtype), 1, output_dtype)
        return y + kernel.scaling * change
    if isinstance(kernel, QuantizedTensor):
        return _quantized(x, kernel, dtype, output_dtype)
    return _contract(x, kernel.astype(dtype), inputs, output_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(x, kernel, inputs, output_dtype=None):
    """The product of floats, with a backward pass of its own for the order of its operands.

    A CPU transposes the first operand where rows are summed over. Of the kernel's gradient that is the smaller one
    here, while the derivative of the product would take the gradient of the outputs, and compute it once more.
    """
    return _contract_forward(x, kernel, inputs, output_dtype)[0]


def _contract_forward(x, kernel, inputs, output_dtype):
    dimensions = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    y = jax.lax.dot_general(x, kernel, (dimensions, ((), ())), preferred_element_type=output_dtype)
    return y, (x, kernel)


def _contract_backward(inputs, output_dtype, kept, dy):
    x, kernel = kept
    rows = tuple(range(x.ndim - inputs))
    first, second = (x, dy) if x.size <= dy.size else (dy, x)
    d_kernel = jax.lax.dot_general(first, second, ((rows, rows), ((), ())), preferred_element_type=output_dtype)
    if first is dy:
        outputs = kernel.ndim - inputs
        d_kernel = jnp.transpose(d_kernel, (*range(outputs, kernel.ndim), *range(outputs)))
    return _input_gradient(dy, kernel, inputs).astype(x.dtype), d_kernel.astype(kernel.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


def _input_gradient(dy, kernel, inputs):
    outputs = kernel.ndim - inputs
    dimensions = (tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(inputs, kernel.ndim)))
    return jax.lax.dot_general(dy, kernel, (dimensions, ((), ())), preferred_element_type=dy.dtype)


def _drop(x, rate, key):
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _quantized(x, tensor, dtype, output_dtype):
    """The product of training keeps the codes for the backward pass and makes floats of them again.

    Differentiated as it stands, it would keep the floats of every layer: the memory that quantising saved. With many
    rows, one product with an NF4 kernel that was made whole first is also the faster one.
    """
    return _quantized_forward(x, tensor, dtype, output_dtype)[0]


def _quantized_forward(x, tensor, dtype, output_dtype):
    rows = x.size // math.prod(tensor.input_shape)
    if tensor.kind == "int8" or rows <= _FEW_ROWS:
        y = matmul(x, tensor, dtype, output_dtype)
    else:
        y = _contract(x, dequantize(tensor, dtype), len(tensor.input_shape), output_dtype)
    return y, tensor


def _quantized_backward(dtype, output_dtype, tensor, dy):
    del output_dtype
    return _input_gradient(dy, dequantize(tensor, dtype), len(tensor.input_shape)).astype(dtype), None


_quantized.defvjp(_quantized_forward, _quantized_backward)


def low_rank_product(a: jax.Array, b: jax.Array, layers: int) -> jax.Array:
    """A B in float32: [*layers, *inputs, r] and [*layers, r, *outputs] to [*layers, *inputs, *outputs]."""
    shape = (*a.shape[:-1], *b.shape[layers + 1 :])
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    lead, rank = a.shape[:layers], a.shape[-1]
    a = a.reshape(*lead, math.prod(a.shape[layers:-1]), rank)
    b = b.reshape(*lead, rank, math.prod(b.shape[layers + 1 :]))
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(shape)
