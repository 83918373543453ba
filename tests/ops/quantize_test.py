import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.layouts import QUANTIZATIONS
from phantom_jax.ops import quantize
from phantom_jax.ops.quantize import NF4_LEVELS, QuantizedTensor

# (layers, inputs, outputs): whole blocks, blocks over two input axes, input axes that must be filled up, and more than
# one block of 256 block magnitudes.
SHAPES = [((), (128,), (3, 8)), ((2,), (4, 32), (10,)), ((3,), (50,), (6,)), ((2, 2), (3, 30), (2, 75))]
POSITIVE = np.concatenate([10.0 ** (e - 6) * (0.1 + 0.9 * (np.arange(2**e) + 0.5) / 2**e) for e in range(7)])
BLOCK_LEVELS = np.concatenate([-POSITIVE[::-1], [0], POSITIVE, [1]])
KINDS = pytest.mark.parametrize("kind", QUANTIZATIONS)


def random_kernel(layers, inputs, outputs, seed=0):
    """Heavy tails, so that blocks and channels differ in size."""
    return np.random.default_rng(seed).standard_t(4, (*layers, *inputs, *outputs)).astype(np.float32)


def quantized(kernel, kind, layers, inputs) -> QuantizedTensor:
    return quantize.quantize(jnp.asarray(kernel), kind, inputs=len(inputs), layers=len(layers))


def by_rows(kernel, layers, inputs):
    """[layers, outputs, inputs] with every group of axes flattened."""
    return kernel.reshape(math.prod(layers), math.prod(inputs), -1).swapaxes(1, 2)


def block_magnitudes(rows):
    """The largest magnitude of each block of 64: [layers, outputs, inputs] to [layers, outputs, blocks]."""
    padded = np.pad(np.abs(rows), ((0, 0), (0, 0), (0, -rows.shape[-1] % 64)))
    return padded.reshape(*rows.shape[:2], -1, 64).max(axis=-1)


def nf4_parts(tensor, rows):
    """Codes [layers, outputs, padded inputs] and block magnitudes [layers, outputs, blocks], one number at a time."""
    layers, outputs, _ = rows.shape
    packed = np.asarray(tensor.codes).reshape(layers, -1, 32, outputs)
    codes = np.concatenate([packed // 16, packed % 16], axis=2).reshape(layers, -1, outputs).swapaxes(1, 2)
    block_codes = np.asarray(tensor.block_codes).reshape(layers, -1, outputs).swapaxes(1, 2)
    scales, mean = np.asarray(tensor.scales).reshape(layers, -1), np.asarray(tensor.block_mean).reshape(-1)
    magnitudes = np.zeros(block_codes.shape)
    for index in np.ndindex(block_codes.shape):
        layer, output, block = index
        group = (output * block_codes.shape[2] + block) // 256
        magnitudes[index] = BLOCK_LEVELS[block_codes[index]] * scales[layer, group] + mean[layer]
    return codes, magnitudes


@pytest.mark.parametrize("layers, inputs, outputs", SHAPES)
def test_int8_is_off_by_half_a_step_of_its_channel(layers, inputs, outputs):
    kernel = random_kernel(layers, inputs, outputs)
    tensor = quantized(kernel, "int8", layers, inputs)
    back = quantize.dequantize(tensor, jnp.float32)
    assert tensor.shape == back.shape == kernel.shape
    assert tensor.codes.dtype == jnp.int8
    rows, steps = by_rows(kernel, layers, inputs), np.asarray(tensor.scales).reshape(math.prod(layers), -1, 1)
    np.testing.assert_allclose(steps[..., 0] * 127, np.abs(rows).max(axis=-1), rtol=1e-6)
    error = np.abs(by_rows(np.asarray(back), layers, inputs) - rows)
    assert (error <= 0.5001 * steps).all()
    assert np.abs(np.asarray(tensor.codes, int)).max() == 127


@pytest.mark.parametrize("layers, inputs, outputs", SHAPES)
def test_nf4_takes_the_nearest_level_of_each_block(layers, inputs, outputs):
    kernel = random_kernel(layers, inputs, outputs)
    tensor = quantized(kernel, "nf4", layers, inputs)
    assert tensor.shape == kernel.shape
    rows = by_rows(kernel, layers, inputs)
    codes, magnitudes = nf4_parts(tensor, rows)
    exact = block_magnitudes(rows)
    size = rows.shape[-1]
    scaled = rows / np.repeat(exact, 64, axis=-1)[..., :size]
    nearest = np.abs(scaled[..., None] - NF4_LEVELS).argmin(axis=-1)
    np.testing.assert_array_equal(codes[..., :size], nearest)
    assert (codes[..., size:] == 7).all(), "what fills a block up is the level 0"
    # The magnitudes lose at most half the widest gap of their own levels.
    deviations = np.abs(exact - exact.mean(axis=(1, 2), keepdims=True)).max(axis=(1, 2), keepdims=True)
    loss = np.abs(magnitudes - exact)
    assert (loss <= 0.5001 * np.diff(BLOCK_LEVELS).max() * deviations).all()
    back = quantize.dequantize(tensor, jnp.float32)
    expected = NF4_LEVELS[codes[..., :size]] * np.repeat(magnitudes, 64, axis=-1)[..., :size]
    back_rows = by_rows(np.asarray(back), layers, inputs)
    np.testing.assert_allclose(back_rows, expected, rtol=1e-6, atol=1e-7)
    bound = 0.5001 * np.diff(NF4_LEVELS).max() * exact + loss
    assert (np.abs(back_rows - rows) <= np.repeat(bound, 64, axis=-1)[..., :size]).all()


def test_the_levels_of_block_magnitudes():
    assert (np.diff(BLOCK_LEVELS) > 0).all()
    ours = quantize.block_level(jnp.arange(256, dtype=jnp.uint8))
    np.testing.assert_allclose(ours, BLOCK_LEVELS, rtol=0, atol=2e-7)
    np.testing.assert_allclose(ours, BLOCK_LEVELS, rtol=3e-6)
    assert (ours[127], ours[255]) == (0, 1)


def test_normal_weights_lose_what_these_types_are_known_to_lose():
    kernel = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
    for kind, low, high in (("int8", 0.006, 0.009), ("nf4", 0.08, 0.1)):
        error = np.asarray(quantize.dequantize(quantized(kernel, kind, (), (512,)), jnp.float32)) - kernel
        assert low < error.std() / kernel.std() < high


@KINDS
def test_a_slice_is_the_tensor_of_its_layer(kind):
    kernel = random_kernel((3,), (50,), (2, 3))
    whole = quantized(kernel, kind, (3,), (50,))
    for index in range(3):
        ours = jax.tree.map(lambda leaf, index=index: leaf[index], whole)
        alone = quantized(kernel[index], kind, (), (50,))
        assert ours.shape == alone.shape == (50, 2, 3)
        assert jax.tree.structure(ours) == jax.tree.structure(alone)
        jax.tree.map(np.testing.assert_array_equal, ours, alone)


@KINDS
def test_scanning_over_layers_equals_a_loop(kind):
    kernel = random_kernel((4,), (6, 12), (6, 12)) / 9
    tensor = quantized(kernel, kind, (4,), (6, 12))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 12)), jnp.float32)
    scanned, _ = jax.lax.scan(lambda x, layer: (quantize.matmul(x, layer, jnp.float32), None), x, tensor)
    for layer in quantize.dequantize(tensor, jnp.float32):
        x = jnp.tensordot(x, layer, axes=2)
    np.testing.assert_allclose(scanned, x, rtol=1e-4, atol=1e-4)


@KINDS
@pytest.mark.parametrize("inputs, outputs", [((128,), (3, 8)), ((4, 20), (10,))])
def test_products_equal_those_with_the_dequantised_kernel(kind, inputs, outputs):
    tensor = quantized(random_kernel((), inputs, outputs), kind, (), inputs)
    x = np.random.default_rng(1).normal(size=(2, 3, *inputs)).astype(np.float32)
    expected = np.tensordot(x, np.asarray(quantize.dequantize(tensor, jnp.float32)), axes=len(inputs))
    ours = quantize.matmul(jnp.asarray(x), tensor, jnp.float32)
    assert ours.shape == (2, 3, *outputs)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
    half = quantize.matmul(jnp.asarray(x), tensor, jnp.bfloat16, jnp.float32)
    assert half.dtype == jnp.float32
    assert quantize.matmul(jnp.asarray(x), tensor, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_allclose(half, expected, atol=0.01 * np.abs(expected).max())


def test_int8_codes_are_exact_in_bfloat16():
    tensor = quantized(random_kernel((), (64,), (7,)), "int8", (), (64,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.bfloat16)
    half = quantize.matmul(x, tensor, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(half, quantize.matmul(x, tensor, jnp.float32), rtol=1e-5, atol=1e-5)


@KINDS
def test_gradients_pass_through_to_the_input(kind):
    tensor = quantized(random_kernel((), (50,), (6,)), kind, (), (50,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 50)), jnp.float32)
    ours = jax.grad(lambda x: jnp.square(quantize.matmul(x, tensor, jnp.float32)).sum())(x)
    kernel = quantize.dequantize(tensor, jnp.float32)
    np.testing.assert_allclose(ours, 2 * (x @ kernel) @ kernel.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind, bytes_a_weight", [("int8", 1.01), ("nf4", 0.53)])
def test_bytes(kind, bytes_a_weight):
    kernel = jax.ShapeDtypeStruct((2, 896, 4864), jnp.bfloat16)
    tensor = jax.eval_shape(lambda kernel: quantize.quantize(kernel, kind, inputs=1, layers=1), kernel)
    assert tensor.shape == kernel.shape
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensor))
    assert total <= bytes_a_weight * math.prod(kernel.shape)


@KINDS
def test_zeros_stay_zeros(kind):
    kernel = random_kernel((2,), (64,), (5,))
    kernel[0, :, 2] = 0
    kernel[1] = 0
    back = np.asarray(quantize.dequantize(quantized(kernel, kind, (2,), (64,)), jnp.float32))
    assert (back[kernel == 0] == 0).all()
    assert np.isfinite(back).all()


@KINDS
def test_bfloat16_is_quantised_as_the_numbers_it_holds(kind):
    kernel = jnp.asarray(random_kernel((), (64,), (5,)), jnp.bfloat16)
    ours, theirs = quantized(kernel, kind, (), (64,)), quantized(kernel.astype(jnp.float32), kind, (), (64,))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert quantize.dequantize(ours, jnp.bfloat16).dtype == jnp.bfloat16


@KINDS
def test_a_kernel_on_the_host_becomes_the_same_codes(kind):
    kernel = random_kernel((2,), (64,), (5,))
    jax.tree.map(
        np.testing.assert_array_equal,
        quantize.quantize(kernel, kind, inputs=1, layers=1),
        quantized(kernel, kind, (2,), (64,)),
    )


def test_wrong_input_is_refused():
    kernel = jnp.ones((2, 64, 5))
    with pytest.raises(ValueError, match="quantised to 'int4': use one of int8, nf4"):
        quantize.quantize(kernel, "int4", inputs=1, layers=1)
    with pytest.raises(ValueError, match=r"\(2, 64, 5\) has no 1 layer axes, 2 input axes and an output"):
        quantize.quantize(kernel, "int8", inputs=2, layers=1)
    tensor = quantize.quantize(kernel, "int8", inputs=1, layers=1)
    with pytest.raises(ValueError, match=r"\(3, 64\) cannot be contracted with \(2, 64, 5\)"):
        quantize.matmul(jnp.ones((3, 64)), tensor, jnp.float32)
    one = jax.tree.map(lambda leaf: leaf[0], tensor)
    with pytest.raises(ValueError, match=r"\(3, 60\) cannot be contracted with \(64, 5\) over the axes \(64,\)"):
        quantize.matmul(jnp.ones((3, 60)), one, jnp.float32)


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_are_off_by_half_a_step_of_their_part(parts):
    rows = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    rows[..., 8:] *= 1e-4
    codes, steps = quantize.quantize_heads(jnp.asarray(rows), parts)
    assert (codes.shape, codes.dtype) == (rows.shape, jnp.int8)
    assert (steps.shape, steps.dtype) == ((2, 5, 3, parts), jnp.float32)
    back = np.asarray(quantize.dequantize_heads(codes, steps, jnp.float32))
    halves = np.abs(rows).reshape(2, 5, 3, parts, -1).max(axis=-1) / 127
    np.testing.assert_allclose(steps, halves, rtol=1e-6)
    assert (np.abs(back - rows) <= 0.5001 * np.repeat(halves, 16 // parts, axis=-1)).all()
    small = np.abs(back[..., 8:] - rows[..., 8:]).max() / np.abs(rows[..., 8:]).max()
    assert small < 0.005 if parts == 2 else small == 1, "a step of its own is what keeps a small half"


def test_rows_of_zeros_stay_zeros():
    rows = jnp.zeros((2, 3, 8)).at[0, 0, :4].set(1.0)
    for parts in (1, 2):
        codes, steps = quantize.quantize_heads(rows, parts)
        np.testing.assert_allclose(quantize.dequantize_heads(codes, steps, jnp.float32), rows, rtol=1e-6)
    with pytest.raises(ValueError, match="rows of 8 numbers do not divide into 3 parts"):
        quantize.quantize_heads(rows, 3)
