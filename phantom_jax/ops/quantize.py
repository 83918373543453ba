"""Weights in 8 and 4 bits: symmetric int8 and NF4 with doubly quantised scales; and int8 rows for a key-value cache.

NF4 (QLoRA, arXiv 2305.14314, section 3) stores each weight as one of 16 levels, the quantiles of a normal distribution,
times the largest magnitude of its block of 64. Those magnitudes are quantised again: their mean is taken off and the
rest is stored in 8 bits with one float32 scale for each block of 256. That is 4.127 bits a weight. Blocks, codes and
packing are those of bitsandbytes, which stores a kernel as [outputs, inputs], row after row.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("int8", "nf4")

NF4_BLOCK = 64
SCALE_BLOCK = 256

# QLoRA, appendix E.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _scale_levels() -> np.ndarray:
    """The 256 levels of the dynamic 8-bit type of bitsandbytes (arXiv 1511.04561), signed: 0, 1 and, for each of
    seven powers of ten, the centres of 1, 2, 4, ... 64 equal parts of its upper nine tenths."""
    magnitudes = [
        10.0 ** (exponent - 6) * (0.1 + 0.9 * (np.arange(2**exponent) + 0.5) / 2**exponent) for exponent in range(7)
    ]
    positive = np.concatenate(magnitudes)
    return np.concatenate([-positive[::-1], [0.0], positive, [1.0]]).astype(np.float32)


SCALE_LEVELS = _scale_levels()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "block_codes", "block_mean"],
    meta_fields=["kind", "input_shape", "output_shape"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A kernel [*layers, *inputs, *outputs] in few bits.

    Every array begins with the layer axes and the static fields do not mention them, so that slicing, scanning and
    stacking all leaves along axis 0 gives the tensor of one layer, of a part or of all.

    Attributes:
      codes: int8 [*layers, *inputs, *outputs]; NF4 uint8 [*layers, *outputs, padded inputs / 2], two weights a byte,
        the first one in the upper half, inputs flattened and filled up with zeros to whole blocks of 64.
      scales: float32. int8: the step of each output channel, [*layers, *outputs]. NF4: the largest deviation in each
        block of 256 block magnitudes, [*layers, ceil(blocks / 256)], the blocks counted over outputs and inputs.
      block_codes: NF4 uint8 [*layers, *outputs, padded inputs / 64], `SCALE_LEVELS` of the deviations of the block
        magnitudes from their mean; None for int8.
      block_mean: NF4 float32 [*layers]; None for int8.
      kind: `int8` or `nf4`.
      input_shape, output_shape: sizes of the kernel's contracted and new axes.
    """

    codes: jax.Array
    scales: jax.Array
    block_codes: jax.Array | None
    block_mean: jax.Array | None
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        if self.kind == "int8":
            return self.scales.shape[: self.scales.ndim - len(self.output_shape)]
        return self.block_mean.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that this stands for."""
        return (*self.layer_shape, *self.input_shape, *self.output_shape)


def quantize(kernel: jax.Array, kind: str, *, inputs: int, layers: int = 0) -> QuantizedTensor:
    """Quantises a kernel, one layer after another: only one layer at a time is copied, and moved where it is on a host.

    Args:
      kernel: [*layers, *inputs, *outputs], any float dtype; the arithmetic is float32.
      kind: `int8` (one step for each output channel, absmax / 127) or `nf4`.
      inputs: how many axes are contracted.
      layers: how many axes in front are stacked kernels.

    Raises:
      ValueError: the kind is unknown or the kernel has too few axes.
    """
    if kind not in KINDS:
        raise ValueError(f"weights cannot be quantised to {kind!r}: use one of {', '.join(KINDS)}")
    if inputs < 1 or kernel.ndim <= layers + inputs:
        raise ValueError(f"a kernel {kernel.shape} has no {layers} layer axes, {inputs} input axes and an output")
    if layers == 0:
        return _TO_KIND[kind](kernel, inputs)
    parts = [quantize(kernel[index], kind, inputs=inputs, layers=layers - 1) for index in range(len(kernel))]
    return _stack(parts)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(tensor: QuantizedTensor, dtype) -> jax.Array:
    """The kernel [*layers, *inputs, *outputs] that the codes stand for; products in float32, rounded once."""

    def one_layer(tensor):
        if tensor.kind == "int8":
            steps = tensor.scales.reshape((1,) * len(tensor.input_shape) + tensor.output_shape)
            return (tensor.codes.astype(jnp.float32) * steps).astype(dtype)
        rows = _nf4_rows(tensor, dtype)
        outputs = len(tensor.output_shape)
        return jnp.moveaxis(rows, range(outputs), range(-outputs, 0))

    for _ in tensor.layer_shape:
        one_layer = jax.vmap(one_layer)
    return one_layer(tensor)


def matmul(x: jax.Array, tensor: QuantizedTensor, dtype, output_dtype=None) -> jax.Array:
    """Contracts x [..., *inputs] with a kernel of one layer.

    int8: the codes enter the product as they are, exact in every dtype, and each output channel is multiplied by its
    step afterwards. NF4: the kernel is made whole, in `dtype`, for the product.

    Args:
      x: [..., *inputs].
      tensor: without layer axes.
      dtype: of the factors; the accumulation is float32.
      output_dtype: of the result, `dtype` where None.

    Returns:
      [..., *outputs].

    Raises:
      ValueError: the last axes of x are not the tensor's inputs, or the tensor has layer axes.
    """
    contracted = len(tensor.input_shape)
    if tensor.layer_shape or x.shape[x.ndim - contracted :] != tensor.input_shape:
        raise ValueError(f"x {x.shape} cannot be contracted with {tensor.shape} over the axes {tensor.input_shape}")
    x_axes = tuple(range(x.ndim - contracted, x.ndim))
    if tensor.kind == "int8":
        kernel, kernel_axes = tensor.codes.astype(dtype), tuple(range(contracted))
    else:
        outputs = len(tensor.output_shape)
        kernel, kernel_axes = _nf4_rows(tensor, dtype), tuple(range(outputs, outputs + contracted))
    y = jax.lax.dot_general(
        x.astype(dtype), kernel, ((x_axes, kernel_axes), ((), ())), preferred_element_type=jnp.float32
    )
    if tensor.kind == "int8":
        y = y * tensor.scales.reshape((1,) * (x.ndim - contracted) + tensor.output_shape)
    return y.astype(output_dtype or dtype)


def quantize_heads(x: jax.Array, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    """Rows in int8, each of the `parts` equal parts of the last axis with a step of its own.

    Keys of a phantom decoder are [k, eta y]: with one step for both, the second half would round to nothing.

    Args:
      x: [..., H], any float dtype.
      parts: into how many equal parts H is cut.

    Returns:
      codes int8 [..., H] and steps float32 [..., parts]; zeros where a part is zero.

    Raises:
      ValueError: H does not divide into the parts.
    """
    if x.shape[-1] % parts:
        raise ValueError(f"rows of {x.shape[-1]} numbers do not divide into {parts} parts")
    codes, steps = _absmax_codes(x.reshape(*x.shape[:-1], parts, -1), (-1,))
    return codes.reshape(x.shape), steps[..., 0]


def dequantize_heads(codes: jax.Array, steps: jax.Array, dtype) -> jax.Array:
    """The inverse of `quantize_heads`, up to half a step: [..., H] in `dtype`."""
    parts = codes.reshape(*steps.shape, -1).astype(jnp.float32)
    return (parts * steps[..., None]).reshape(codes.shape).astype(dtype)


def _absmax_codes(x, axes):
    """int8 codes of x and their float32 steps, the axes kept with size 1."""
    x = x.astype(jnp.float32)
    steps = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127
    return jnp.round(x / jnp.where(steps == 0, 1, steps)).astype(jnp.int8), steps


@functools.partial(jax.jit, static_argnames="inputs")
def _to_int8(kernel, inputs):
    codes, steps = _absmax_codes(kernel, tuple(range(inputs)))
    output_shape = kernel.shape[inputs:]
    return QuantizedTensor(codes, steps.reshape(output_shape), None, None, "int8", kernel.shape[:inputs], output_shape)


def _midpoints(levels):
    return (levels[1:] + levels[:-1]) / 2


def _reciprocal(x):
    return 1 / jnp.maximum(x, jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, static_argnames="inputs")
def _to_nf4(kernel, inputs):
    input_shape, output_shape = kernel.shape[:inputs], kernel.shape[inputs:]
    size = math.prod(input_shape)
    rows = kernel.astype(jnp.float32).reshape(size, -1).T
    blocks = jnp.pad(rows, ((0, 0), (0, -size % NF4_BLOCK))).reshape(len(rows), -1, NF4_BLOCK)
    magnitudes = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * _reciprocal(magnitudes)[..., None]
    # Fifteen comparisons fuse into one pass without temporaries; a binary search takes six times the memory.
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in _midpoints(NF4_LEVELS))
    codes = codes[..., ::2] << 4 | codes[..., 1::2]
    mean = jnp.mean(magnitudes)
    deviations = (magnitudes - mean).reshape(-1)
    groups = jnp.pad(deviations, (0, -deviations.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scales = jnp.max(jnp.abs(groups), axis=-1)
    block_codes = jnp.searchsorted(_midpoints(SCALE_LEVELS), groups * _reciprocal(scales)[:, None]).astype(jnp.uint8)
    block_codes = block_codes.reshape(-1)[: deviations.size]
    return QuantizedTensor(
        codes.reshape(*output_shape, -1),
        scales,
        block_codes.reshape(*output_shape, -1),
        mean,
        "nf4",
        input_shape,
        output_shape,
    )


_TO_KIND = {"int8": _to_int8, "nf4": _to_nf4}


@jax.jit
def _stack(tensors):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)


def _nf4_rows(tensor, dtype):
    """The kernel of one layer with its outputs in front: [*outputs, *inputs]."""
    block_codes = tensor.block_codes.reshape(-1)
    scales = jnp.repeat(tensor.scales, SCALE_BLOCK)[: block_codes.size]
    magnitudes = jnp.asarray(SCALE_LEVELS)[block_codes] * scales + tensor.block_mean
    codes = jnp.stack([tensor.codes >> 4, tensor.codes & 15], axis=-1).reshape(-1, NF4_BLOCK)
    rows = (jnp.asarray(NF4_LEVELS)[codes] * magnitudes[:, None]).astype(dtype)
    rows = rows.reshape(math.prod(tensor.output_shape), -1)[:, : math.prod(tensor.input_shape)]
    return rows.reshape(*tensor.output_shape, *tensor.input_shape)
