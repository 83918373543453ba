"""Weights in 8 and 4 bits: symmetric int8 and NF4 with doubly quantised scales; and int8 rows for a key-value cache.

NF4 (QLoRA, arXiv 2305.14314, section 3) stores each weight as one of 16 levels, the quantiles of a normal distribution,
times the largest magnitude of its block of 64. Those magnitudes are quantised again: their mean is taken off and the
rest is stored in 8 bits with one float32 scale for each block of 256. That is 4.127 bits a weight. Blocks and codes are
those of bitsandbytes, which stores a kernel as [outputs, inputs], row after row; the layout of the arrays is our own.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.layouts import QUANTIZATIONS

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


def block_level(codes: jax.Array) -> jax.Array:
    """Levels in -1 to 1 of uint8 codes, float32: the signed dynamic type of bitsandbytes (arXiv 1511.04561).

    0 is code 127 and 1 is code 255. The k-th code to either side of 0, with 2^e the largest power of two in k, is the
    centre of the (k - 2^e)-th of 2^e equal parts of 10^(e - 7) to 10^(e - 6) but for the lowest tenth of the latter.
    Computed: a table of 256 numbers is slow to read on a TPU, and is read early and held in float32 by a decoding loop.
    """
    signed = codes.astype(jnp.float32) - 127
    k = jnp.abs(signed)
    level = jnp.zeros_like(k)
    for exponent in range(7):
        part = 0.9 / 2**exponent
        level = jnp.where(k >= 2**exponent, 10.0 ** (exponent - 6) * (part * (k + 0.5) - 0.8), level)
    return jnp.where(signed == 128, 1.0, jnp.sign(signed) * level)


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
      codes: int8 [*layers, *inputs, *outputs]; NF4 uint8 [*layers, blocks, 32, *outputs], the inputs flattened and
        filled up with zeros to whole blocks of 64. The i-th of the 32 bytes of a block holds weight i in its upper and
        weight 32 + i in its lower half: neighbours in one byte would have to be interleaved, which a TPU pads 64 times.
      scales: float32. int8: the step of each output channel, [*layers, *outputs]. NF4: the largest deviation in each
        block of 256 block magnitudes, [*layers, ceil(blocks / 256)], the blocks of one output after those of another.
      block_codes: NF4 uint8 [*layers, blocks, *outputs], `block_level` of the deviations of the block
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
    if kind not in QUANTIZATIONS:
        raise ValueError(f"weights cannot be quantised to {kind!r}: use one of {', '.join(QUANTIZATIONS)}")
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
        kernel = jnp.concatenate(_nf4_halves(tensor, dtype), axis=1).reshape(-1, *tensor.output_shape)
        return kernel[: math.prod(tensor.input_shape)].reshape(*tensor.input_shape, *tensor.output_shape)

    for _ in tensor.layer_shape:
        one_layer = jax.vmap(one_layer)
    return one_layer(tensor)


def matmul(x: jax.Array, tensor: QuantizedTensor, dtype, output_dtype=None) -> jax.Array:
    """Contracts x [..., *inputs] with a kernel of one layer.

    int8: the codes enter the product as they are, exact in every dtype, and each output channel is multiplied by its
    step afterwards. NF4: levels times block magnitudes, rounded to `dtype`, are the factors, in two products, one for
    each half of the bytes. A compiler can form the factors inside the product; a TPU's does, a CPU's does not.

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
    rows = x.shape[: x.ndim - contracted]
    x = x.astype(dtype)
    if tensor.kind == "int8":
        y = _contract(x, tensor.codes.astype(dtype), contracted)
        y = y * tensor.scales.reshape((1,) * len(rows) + tensor.output_shape)
    else:
        size = math.prod(tensor.input_shape)
        x = jnp.pad(x.reshape(*rows, size), [(0, 0)] * len(rows) + [(0, -size % NF4_BLOCK)])
        x_halves = jnp.moveaxis(x.reshape(*rows, -1, 2, NF4_BLOCK // 2), -2, 0)
        halves = zip(x_halves, _nf4_halves(tensor, dtype), strict=True)
        y = sum(_contract(x_half, kernel_half, 2) for x_half, kernel_half in halves)
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
    size, outputs = math.prod(input_shape), math.prod(output_shape)
    padded = jnp.pad(kernel.astype(jnp.float32).reshape(size, outputs), ((0, -size % NF4_BLOCK), (0, 0)))
    blocks = padded.reshape(-1, NF4_BLOCK, outputs)
    magnitudes = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks * _reciprocal(magnitudes)[:, None]
    # Fifteen comparisons fuse into one pass without temporaries; a binary search takes six times the memory.
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in _midpoints(NF4_LEVELS))
    codes = codes[:, : NF4_BLOCK // 2] << 4 | codes[:, NF4_BLOCK // 2 :]
    mean = jnp.mean(magnitudes)
    deviations = (magnitudes - mean).T.reshape(-1)
    groups = jnp.pad(deviations, (0, -deviations.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scales = jnp.max(jnp.abs(groups), axis=1)
    levels = block_level(jnp.arange(256, dtype=jnp.uint8))
    block_codes = jnp.searchsorted(_midpoints(levels), groups * _reciprocal(scales)[:, None]).astype(jnp.uint8)
    block_codes = block_codes.reshape(-1)[: deviations.size].reshape(outputs, -1).T
    return QuantizedTensor(
        codes.reshape(*codes.shape[:2], *output_shape),
        scales,
        block_codes.reshape(-1, *output_shape),
        mean,
        "nf4",
        input_shape,
        output_shape,
    )


_TO_KIND = {"int8": _to_int8, "nf4": _to_nf4}


@jax.jit
def _stack(tensors):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)


def _contract(x, kernel, axes):
    """float32 product over the last axes of x and the first ones of the kernel."""
    dimensions = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    return jax.lax.dot_general(x, kernel, (dimensions, ((), ())), preferred_element_type=jnp.float32)


def _nf4_halves(tensor, dtype):
    """The first and the last 32 weights of every block of one layer, each [blocks, 32, *outputs]."""
    outputs = tensor.output_shape
    scales = jnp.repeat(tensor.scales, SCALE_BLOCK)[: tensor.block_codes.size].reshape(*outputs, -1)
    magnitudes = block_level(tensor.block_codes) * jnp.moveaxis(scales, -1, 0) + tensor.block_mean
    halves = tensor.codes >> 4, tensor.codes & 15
    return [(_nf4_level(codes) * magnitudes[:, None]).astype(dtype) for codes in halves]


def _nf4_level(codes):
    # A tree of choices, one bit after another: a TPU is slow at reading tables.
    levels = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        odd = (codes >> bit & 1) == 1
        levels = [jnp.where(odd, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]
