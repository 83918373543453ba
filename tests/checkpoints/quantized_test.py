"""Kernels that are quantised while they are written: once each layer, and as all at once."""

import collections

import jax
import ml_dtypes
import numpy as np
import pytest

from phantom_jax import verification
from phantom_jax.checkpoints import orbax_stream, quantized
from phantom_jax.checkpoints.arrays import StoredArray
from phantom_jax.errors import InputError
from phantom_jax.models.quantization import quantize_kernel
from phantom_jax.ops.quantize import QuantizedTensor, dequantize
from phantom_jax.trees import flatten, unflatten

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])
LAYERS = 9
PREFIX = "params/language_model/layers/"
SHAPES = {
    "attention/query/kernel": (LAYERS, 96, 4, 16),
    "attention/out/kernel": (LAYERS, 4, 16, 96),
    "gate/kernel": (LAYERS, 96, 130),
    "down/kernel": (LAYERS, 130, 96),
}
OTHERS = {"attention/norm/scale": (LAYERS, 96), "attention/query/bias": (LAYERS, 4, 16)}


def params(read_layers=None):
    """Lazy arrays by path; `read_layers` counts how often a layer of a kernel is read."""

    def leaf(name, shape):
        rng = np.random.default_rng(len(name))
        array = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

        def read(box):
            if read_layers is not None and name in SHAPES:
                read_layers.update((name, layer) for layer in range(box[0].start, box[0].stop))
            return array[box]

        return StoredArray(shape, array.dtype, read, len(shape) - 1)

    flat = {PREFIX + name: leaf(name, shape) for name, shape in (SHAPES | OTHERS).items()}
    return flat | {"params/language_model/embedding": np.ones((7, 96), np.float32)}


@pytest.fixture
def quantisations(monkeypatch):
    """Shapes and number of the arrays that are quantised."""
    counted, quantize = collections.Counter(), quantized.quantize

    def counting(kernel, *arguments, **named):
        if isinstance(kernel, np.ndarray):
            counted[kernel.shape] += 1
        return quantize(kernel, *arguments, **named)

    monkeypatch.setattr(quantized, "quantize", counting)
    return counted


EACH_ONCE = {(name, layer): 1 for name in SHAPES for layer in range(LAYERS)}
EACH_SHAPE = {shape[1:]: LAYERS for shape in SHAPES.values()}


@KINDS
@pytest.mark.parametrize("block", [1 << 25, 2000])
def test_every_layer_is_quantised_once(kind, block, tmp_path, monkeypatch, quantisations):
    monkeypatch.setattr(orbax_stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(verification, "_BLOCK_BYTES", block)
    read_layers = collections.Counter()
    fields, found_kind = quantized.split_fields(quantized.quantized(params(read_layers), kind))
    assert found_kind == kind and not quantisations and not read_layers
    orbax_stream.save(tmp_path / "saved", unflatten(fields))
    assert quantisations == EACH_SHAPE and read_layers == EACH_ONCE
    # Once more for the comparison, with a cache that is new.
    quantisations.clear()
    read_layers.clear()
    again = quantized.quantized(params(read_layers), kind)
    assert verification.differences(again, orbax_stream.load(tmp_path / "saved")) == []
    assert quantisations == EACH_SHAPE and read_layers == EACH_ONCE


@KINDS
def test_the_same_as_all_at_once(kind):
    lazy = quantized.quantized(params(), kind)
    for path, array in params().items():
        name = path.removeprefix(PREFIX)
        if name not in SHAPES:
            np.testing.assert_array_equal(lazy[path], array)
            continue
        whole = quantize_kernel(path.removeprefix("params/"), np.asarray(array), kind)
        assert isinstance(lazy[path], QuantizedTensor) and lazy[path].shape == whole.shape == SHAPES[name]
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, lazy[path]), whole)
        near = np.asarray(dequantize(whole, np.float32)) - np.asarray(array, np.float32)
        assert np.abs(near).max() < (0.03 if kind == "int8" else 0.6)


@KINDS
def test_fields_by_path_and_back(kind):
    flat = quantized.quantized(params(), kind)
    fields, found = quantized.split_fields(flat)
    names = {"int8": {"codes", "scales"}, "nf4": {"codes", "scales", "block_codes", "block_mean"}}[kind]
    made = {path for path in fields if quantized.in_kernel(path)}
    assert made == {f"{PREFIX}{kernel}/{name}" for kernel in SHAPES for name in names}
    shapes = {path: array.shape for path, array in params().items()}
    joined = quantized.join_fields(fields, found, shapes, "folder")
    assert flatten(joined) == flatten(flat)
    gone = f"{PREFIX}gate/kernel/scales"
    with pytest.raises(InputError, match=f"folder has {gone} of shape None, which is not how {kind} kernels"):
        quantized.join_fields({path: array for path, array in fields.items() if path != gone}, kind, shapes, "folder")


@KINDS
def test_blocks_hold_every_number_once(kind):
    fields, _ = quantized.split_fields(quantized.quantized(params(), kind))
    seen = {path: np.zeros(array.shape, int) for path, array in fields.items()}
    layers = []
    for path, box in quantized.blocks(fields, 3000):
        seen[path][box] += 1
        if quantized.in_kernel(path):
            layers.append((path.rpartition("/")[0], box[0].start))
            assert box[0].stop == box[0].start + 1
    for path, times in seen.items():
        np.testing.assert_array_equal(times, 1, err_msg=path)
    # No layer comes back after another one.
    assert len([key for key, before in zip(layers, [None, *layers], strict=False) if key != before]) == len(EACH_ONCE)


def test_what_is_quantised_is_not_quantised_again():
    with pytest.raises(InputError, match="the weights are quantised to nf4 already"):
        quantized.quantized(quantized.quantized(params(), "nf4"), "int8")
    mixed = quantized.quantized(params(), "nf4")
    mixed[f"{PREFIX}up/kernel"] = quantized.quantized(params(), "int8")[f"{PREFIX}gate/kernel"]
    with pytest.raises(InputError, match="kernels are quantised to int8 and nf4: quantise all to one"):
        quantized.split_fields(mixed)
