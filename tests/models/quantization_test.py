import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.errors import InputError
from phantom_jax.models.layers import Dense
from phantom_jax.models.quantization import check_kind, quantize_kernel
from phantom_jax.ops.quantize import QuantizedTensor, dequantize
from phantom_jax.trees import flatten, unflatten
from tests.generation.run import run, unrolled
from tests.models import small

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])
KERNELS = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")} | {
    f"{name}/kernel" for name in ("gate", "up", "down")
}


@functools.cache
def float_model():
    return small.init(small.CONFIG)


@functools.cache
def quantized(kind):
    return made_small(float_model()[1], kind)


def made_small(params, kind):
    return unflatten({path: quantize_kernel(path, leaf, kind) for path, leaf in flatten(params).items()})


def made_whole(params):
    return unflatten(
        {
            path: dequantize(leaf, jnp.float32) if isinstance(leaf, QuantizedTensor) else leaf
            for path, leaf in flatten(params).items()
        }
    )


def unstacked(params):
    """The same parameters with layers of their own, `layers_0`, `layers_1`, ..."""
    language_model = dict(params["language_model"])
    layers = language_model.pop("layers")
    for index in range(small.DECODER.num_layers):
        language_model[f"layers_{index}"] = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
    return {**params, "language_model": language_model}


@KINDS
def test_the_kernels_of_the_layers_are_quantised_and_nothing_else(kind):
    before, after = flatten(float_model()[1]), flatten(quantized(kind))
    assert list(before) == list(after)
    changed = {path for path, leaf in after.items() if isinstance(leaf, QuantizedTensor)}
    assert changed == {f"language_model/layers/{name}" for name in KERNELS}
    for path, leaf in after.items():
        assert leaf.shape == before[path].shape
        if path in changed:
            assert leaf.kind == kind
        else:
            assert leaf is before[path]
    assert after["language_model/layers/attention/out/kernel"].input_shape == (4, 8)


@KINDS
def test_layers_of_their_own_are_quantised_as_stacked_ones(kind):
    ours = made_small(unstacked(float_model()[1]), kind)
    theirs = unstacked(quantized(kind))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("kind, bound", [("int8", 0.03), ("nf4", 0.4)])
def test_logits_are_those_of_the_dequantised_model_and_near_the_float_ones(kind, bound):
    model, params = float_model()
    batch = small.text_batch(small.random_ids(4, 16), [16, 12, 9, 5])
    real = np.asarray(batch["segment_ids"]) > 0
    exact, ours, whole = (
        np.asarray(small.logits(model, tree, batch))[real]
        for tree in (params, quantized(kind), made_whole(quantized(kind)))
    )
    np.testing.assert_allclose(ours, whole, rtol=0, atol=2e-5)
    error = np.sqrt(np.mean(np.square(ours - exact))) / exact.std()
    assert bound / 3 < error < bound


def test_greedy_answers_are_those_of_the_dequantised_model():
    model, _ = float_model()
    batch = small.text_batch(small.random_ids(3, 9), [9, 7, 4], left=True)
    ours, theirs = (
        run(*unrolled(model, tree), batch, eos=(1,))[0] for tree in (quantized("nf4"), made_whole(quantized("nf4")))
    )
    np.testing.assert_array_equal(ours, theirs)


@KINDS
def test_one_dense_layer_without_a_scan(kind):
    """What the unrolled layers of a decoder do: a quantised kernel, its bias beside it."""
    dense = Dense((32,), (4, 8), ("a",), ("b", "c"), use_bias=True)
    query = unstacked(quantized(kind))["language_model"]["layers_1"]["attention"]["query"]
    query = query | {"bias": jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 32)), jnp.float32)
    ours, whole = (dense.apply({"params": tree}, x) for tree in (query, made_whole(query)))
    np.testing.assert_allclose(ours, whole, atol=1e-5)
    half = dense.clone(dtype=jnp.bfloat16).apply({"params": query}, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.02 * np.abs(whole).max())


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(InputError, match="quantised to 'fp4': use one of int8, nf4"):
        check_kind("fp4")
    with pytest.raises(InputError, match="kernel is quantised to int8 already"):
        made_small(quantized("int8"), "nf4")
