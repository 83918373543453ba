"""The same NF4 as bitsandbytes: codes and numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional

from phantom_jax.models.quantization import quantize_linear
from phantom_jax.ops import quantize

SHAPES = pytest.mark.parametrize("outputs, inputs", [(96, 128), (300, 896), (7, 64)])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def both(outputs, inputs, dtype):
    """Weights as bitsandbytes has them, [outputs, inputs], what it makes of them, and our tensor of their transpose."""
    weights = 0.02 * np.random.default_rng(0).standard_t(4, (outputs, inputs)).astype(np.float32)
    theirs = torch.as_tensor(weights).to(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(theirs, blocksize=64, quant_type="nf4", compress_statistics=True)
    kernel = jnp.asarray(weights.T).astype(dtype)
    return theirs, packed, state, quantize.quantize(kernel, "nf4", inputs=1)


def block_levels():
    return np.asarray(quantize.block_level(jnp.arange(256, dtype=jnp.uint8)))


def in_their_order(ours):
    """Our bytes and block codes as bitsandbytes lays them out: outputs outermost, neighbours in one byte."""
    packed = np.asarray(ours.codes)
    codes = np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1, *ours.output_shape).T
    return (codes[:, ::2] << 4 | codes[:, 1::2]).ravel(), np.asarray(ours.block_codes).T.flatten()


def test_the_levels_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(quantize.NF4_LEVELS, functional.get_4bit_type("nf4", device="cpu").numpy())
    # Both are computed in float32, on different ways.
    np.testing.assert_allclose(block_levels(), functional.create_dynamic_map().numpy(), rtol=3e-6)


@SHAPES
@DTYPES
def test_codes_are_equal(outputs, inputs, dtype):
    _, packed, _, ours = both(outputs, inputs, dtype)
    np.testing.assert_array_equal(in_their_order(ours)[0], packed.numpy().ravel())


@SHAPES
@DTYPES
def test_block_magnitudes_take_the_same_levels(outputs, inputs, dtype):
    """Both choose the nearest of 256 levels; on a CPU bitsandbytes first rounds to a grid of 2^16 points."""
    theirs, _, state, ours = both(outputs, inputs, dtype)
    np.testing.assert_allclose(ours.block_mean, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.scales, state.state2.absmax.numpy(), rtol=1e-6)
    deviations = theirs.float().numpy().reshape(-1, 64)
    deviations = np.abs(deviations).max(axis=1) - state.offset.numpy()
    relative = deviations / np.repeat(np.asarray(ours.scales), 256)[: deviations.size]
    our_codes, their_codes = in_their_order(ours)[1], state.absmax.numpy().ravel()
    distance = [np.abs(block_levels()[codes] - relative) for codes in (our_codes, their_codes)]
    assert (distance[0] <= distance[1] + 1e-6).all()
    assert (distance[1] <= distance[0] + 2**-15 + 1e-6).all()
    assert (our_codes == their_codes).mean() > 0.99


@SHAPES
@DTYPES
def test_bitsandbytes_reads_our_tensor_as_we_do(outputs, inputs, dtype):
    theirs, _, state, ours = both(outputs, inputs, dtype)
    codes, block_codes = in_their_order(ours)
    second = functional.QuantState(
        absmax=torch.as_tensor(np.array(ours.scales)), code=state.state2.code, blocksize=256, dtype=torch.float32
    )
    read = functional.dequantize_4bit(
        torch.as_tensor(codes).reshape(-1, 1),
        functional.QuantState(
            absmax=torch.as_tensor(block_codes),
            shape=theirs.shape,
            code=state.code,
            blocksize=64,
            quant_type="nf4",
            dtype=torch.float32,
            offset=torch.as_tensor(np.array(ours.block_mean)),
            state2=second,
        ),
    )
    np.testing.assert_allclose(quantize.dequantize(ours, jnp.float32).T, read.numpy(), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    "path, shape",
    [
        ("language_model/layers/attention/query/kernel", (3, 128, 4, 24)),
        ("vision_tower/layers/out/kernel", (3, 4, 32, 96)),
        ("language_model/layers/down/kernel", (3, 896, 300)),
    ],
)
def test_stacked_kernels_are_those_of_their_layers(path, shape):
    """As training makes them: each layer's codes, block magnitudes and numbers are bitsandbytes' of its matrix."""
    kernel = 0.02 * np.random.default_rng(1).standard_t(4, shape).astype(np.float32)
    ours = quantize_linear(path, jnp.asarray(kernel), "nf4")
    values = quantize.dequantize(ours, jnp.float32)
    assert ours.shape == shape
    inputs = int(np.prod(ours.input_shape))
    for layer in range(shape[0]):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], ours)
        theirs = torch.as_tensor(np.ascontiguousarray(kernel[layer].reshape(inputs, -1).T))
        packed, state = functional.quantize_4bit(theirs, blocksize=64, quant_type="nf4", compress_statistics=True)
        whole = one.codes.reshape(*one.codes.shape[:2], -1), one.block_codes.reshape(one.block_codes.shape[0], -1)
        flat = dataclasses.replace(one, codes=whole[0], block_codes=whole[1], output_shape=whole[1].shape[1:])
        codes, block_codes = in_their_order(flat)
        np.testing.assert_array_equal(codes, packed.numpy().ravel())
        np.testing.assert_allclose(one.scales, state.state2.absmax.numpy(), rtol=1e-6)
        same = block_codes == state.absmax.numpy().ravel()
        assert same.mean() > 0.97
        state.dtype = torch.float32
        expected = functional.dequantize_4bit(packed, state).numpy()
        error = np.abs(np.asarray(values[layer]).reshape(inputs, -1).T - expected)
        assert (error.reshape(-1, 64)[same] <= 1e-6 * np.abs(expected).max()).all()


@SHAPES
@DTYPES
def test_dequantised_weights_are_equal(outputs, inputs, dtype):
    """To the levels of block magnitudes in the middle of which the two may choose differently."""
    _, packed, state, ours = both(outputs, inputs, dtype)
    state.dtype = torch.float32
    expected = functional.dequantize_4bit(packed, state).numpy()
    error = np.abs(np.asarray(quantize.dequantize(ours, jnp.float32)).T - expected)
    same = in_their_order(ours)[1] == state.absmax.numpy().ravel()
    assert (error.reshape(-1, 64)[same] <= 1e-6 * np.abs(expected).max()).all()
    widest = np.diff(block_levels()).max() * np.asarray(ours.scales).max()
    assert error.max() <= 1.001 * widest
