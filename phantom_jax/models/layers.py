"""The two parameterised pieces every module is made of: dense projections over named axes, and norms."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from phantom_jax import axes
from phantom_jax.models.partitioning import gather_kernel, gathered_again
from phantom_jax.ops import norm
from phantom_jax.ops.linear import LowRankKernel, linear
from phantom_jax.ops.quantize import QuantizedTensor


def scaled_normal(fan_in: int, gain: float = 1.0) -> Any:
    """Normal of standard deviation `gain / sqrt(fan_in)`; the fan-in is given because kernels have several axes."""
    return nn.initializers.normal(gain * fan_in**-0.5)


class Dense(nn.Module):
    """Linear map of the last `len(input_shape)` axes to `output_shape`, with logical axis names.

    Initialisation gives a float kernel; where the parameters hold a `QuantizedTensor` or a `LowRankKernel` in its
    place, that is used.

    Attributes:
      input_shape, output_shape: sizes of the contracted and of the new axes.
      input_axes, output_axes: logical axis names of the kernel [*input_shape, *output_shape].
      use_bias: whether a bias [*output_shape] is added.
      dtype: of the computation; parameters keep their own.
      gain: factor on the initial standard deviation 1 / sqrt(fan-in).
      output_dtype: of the accumulation and the result, where `dtype` would lose too much (logits).
    """

    input_shape: Sequence[int]
    output_shape: Sequence[int]
    input_axes: Sequence[str]
    output_axes: Sequence[str]
    use_bias: bool = False
    dtype: Any = jnp.float32
    gain: float = 1.0
    output_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, outputs = tuple(self.input_shape), tuple(self.output_shape)
        # Asked for first: `param` compares the leaves it finds with the shape of a float kernel.
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, QuantizedTensor | LowRankKernel):
            init = nn.with_logical_partitioning(
                scaled_normal(math.prod(inputs), self.gain), (*self.input_axes, *self.output_axes)
            )
            kernel = self.param("kernel", init, (*inputs, *outputs), jnp.float32)

        def product(x, kernel):
            kernel = gather_kernel(kernel, self.input_axes, self.output_axes, self.dtype)
            return linear(x, kernel, len(inputs), self.dtype, self.output_dtype)

        y = gathered_again(product)(x, kernel)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.output_axes))
            bias = self.param("bias", bias_init, outputs, jnp.float32).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - len(outputs)) + outputs)
        return y


class RMSNorm(nn.Module):
    """RMSNorm over the last axis with a learned scale."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (axes.NORM,))
        return norm.rms_norm(x, self.param("scale", init, x.shape[-1:], jnp.float32), self.epsilon)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with a learned scale and bias."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (axes.NORM,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axes.NORM,))
        scale = self.param("scale", ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", zeros, x.shape[-1:], jnp.float32)
        return norm.layer_norm(x, scale, bias, self.epsilon)


def cast_weights(params: Any, dtype: Any) -> Any:
    """Parameters whose kernels and tables have the dtype of the computation, as every use of them casts them.

    Vectors and scales stay: norms and gates compute in float32. Quantised kernels stay.
    """

    def cast(path, leaf):
        stays = isinstance(leaf, QuantizedTensor) or leaf.ndim < 2 or path[-1].key == "scale"
        return leaf if stays else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
