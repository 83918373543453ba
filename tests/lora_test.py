"""Low-rank factors on a small Phantom, and what they cost."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.lora import Lora, factor_paths
from phantom_jax.models.linears import layer_axes, linear_inputs, match_linears
from phantom_jax.models.quantization import quantize_linear
from phantom_jax.ops.quantize import QuantizedTensor, dequantize
from phantom_jax.training.state import merge, split, start_phase
from phantom_jax.trees import flatten, unflatten
from tests.models import small


@functools.cache
def model_and_params():
    model, params = small.init(small.CONFIG)
    kernels = match_linears(("**", "**/head/**"), flatten(params), what="lora.patterns")
    return model, params, Lora(tuple(sorted(kernels)), rank=3, alpha=6.0, dropout=0.2)


@functools.cache
def factors():
    """Factors that change something."""
    _, params, lora = model_and_params()
    flat = flatten(lora.init(params, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(flat))
    noise = {path: 0.1 * jax.random.normal(key, flat[path].shape) for path, key in zip(flat, keys, strict=True)}
    return unflatten({path: leaf + noise[path] for path, leaf in flat.items()})


def batch():
    return small.text_batch(small.random_ids(2, 12), [12, 9])


def test_factors_that_begin_change_nothing_and_others_do_as_merged_ones():
    (model, params, lora), rows = model_and_params(), batch()
    logits = jax.jit(lambda params: model.apply({"params": params}, rows, rope_length=12))
    plain = logits(params)
    begun = merge(params, lora.init(params, jax.random.key(0)))
    np.testing.assert_array_equal(logits(lora.attach(begun)), plain)
    changed = merge(params, factors())
    with_factors = logits(lora.attach(changed))
    np.testing.assert_allclose(with_factors, logits(lora.merge(changed)), rtol=0, atol=1e-4)
    assert np.abs(with_factors - plain).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, lora.detach(changed), params)


def test_each_layer_and_kernel_drops_inputs_of_its_own():
    _, params, lora = model_and_params()
    attached = flatten(lora.attach(merge(params, factors()), jax.random.key(3)))
    keys = [np.asarray(jax.random.key_data(attached[path].dropout_key)).reshape(-1, 2) for path in lora.kernels]
    assert [len(key) for key in keys] == [
        attached[path].kernel.shape[0] if layer_axes(path) else 1 for path in lora.kernels
    ]
    assert len({tuple(key) for key in np.concatenate(keys)}) == sum(map(len, keys))
    assert flatten(lora.attach(merge(params, factors())))[lora.kernels[0]].dropout_key is None


def test_dropout_is_decided_by_its_key():
    (model, params, lora), rows = model_and_params(), batch()
    changed = merge(params, factors())

    @jax.jit
    def logits(key):
        return model.apply({"params": lora.attach(changed, key)}, rows, rope_length=12)

    first, again, other = (np.asarray(logits(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_a_begins_uniform_and_a_further_kernel_leaves_the_others():
    _, params, lora = model_and_params()
    flat, shapes = flatten(lora.init(params, jax.random.key(0))), flatten(params)
    for path in lora.kernels:
        a, b = (flat[factor] for factor in factor_paths(path))
        layers = layer_axes(path)
        fan_in = math.prod(shapes[path].shape[layers : layers + linear_inputs(path)])
        assert a.dtype == b.dtype == jnp.float32 and not b.any()
        bound = fan_in**-0.5
        assert 0.8 * bound < np.abs(a).max() <= bound and abs(float(a.std()) - bound / 3**0.5) < 0.2 * bound
        assert a.shape[-1] == b.shape[layers] == 3
    few = Lora(lora.kernels[2:4], 3)
    for path, leaf in flatten(few.init(params, jax.random.key(0))).items():
        np.testing.assert_array_equal(leaf, flat[path])


def test_a_rank_above_the_sides_of_a_kernel_is_allowed():
    _, params, _ = model_and_params()
    wide = Lora(("language_model/layers/attention/key/kernel",), rank=500, alpha=500.0)
    merged = wide.merge(merge(params, wide.init(params, jax.random.key(0))))
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def quantized(kind):
    _, params, lora = model_and_params()
    return unflatten(
        {
            path: quantize_linear(path, leaf, kind) if path in lora.kernels else leaf
            for path, leaf in flatten(params).items()
        }
    )


def test_training_on_codes_is_training_on_what_they_stand_for():
    """Tower, projector, decoder and head: losses and gradients of the factors in float32."""
    model, _, lora = model_and_params()
    codes = quantized("nf4")
    floats = jax.tree.map(
        lambda leaf: dequantize(leaf, jnp.float32) if isinstance(leaf, QuantizedTensor) else leaf,
        codes,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor),
    )
    pixels = jax.random.normal(jax.random.key(0), (2, 1, *[small.CONFIG.vision_tower.image_size] * 2, 3))
    slots = jnp.where(jnp.arange(12) < small.CONFIG.tokens_per_tile, jnp.arange(12), -1)
    whole = batch() | {"pixels": pixels, "image_slots": jnp.broadcast_to(slots, (2, 12))}
    whole |= {"targets": jnp.roll(whole["token_ids"], -1, axis=1)}

    @jax.jit
    def run(factors, params):
        def loss(factors):
            attached = lora.attach(merge(params, factors))
            return -jnp.mean(model.apply({"params": attached}, whole, rope_length=12, method="score").log_probs)

        return jax.value_and_grad(loss)(factors)

    (loss, gradients), (expected, expected_gradients) = run(factors(), codes), run(factors(), floats)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, gradient in flatten(gradients).items():
        other = flatten(expected_gradients)[path]
        assert np.abs(other).max() > 0, path
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-5 * np.abs(other).max(), err_msg=path)


def test_only_factors_have_an_optimiser_and_the_base_is_small():
    _, params, lora = model_and_params()
    patterns = ("projector/norm/**",)

    def begin(params):
        return start_phase(
            params,
            patterns=patterns,
            init_optimizer=lambda trainable: jax.tree.map(jnp.zeros_like, trainable),
            compute_dtype=jnp.bfloat16,
            lora=lora,
            key=jax.random.key(0),
        )

    state = jax.eval_shape(begin, quantized("nf4"))
    assert set(flatten(state.optimizer_state)) == set(flatten(state.trainable))
    names = {factor for path in lora.kernels for factor in factor_paths(path)}
    assert set(flatten(state.trainable)) == names | set(flatten(split(params, patterns)[0]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    codes = {path: leaf for path, leaf in flatten(state.frozen).items() if isinstance(leaf, QuantizedTensor)}
    assert set(codes) == set(lora.kernels)
    # What a cast of the frozen tree must not touch.
    assert all(leaf.scales.dtype == jnp.float32 for leaf in codes.values())


def test_nf4_takes_at_most_0_53_bytes_a_weight():
    """As stored, scales and means included, at the widths of a 7B model's layers."""
    for path, shape in (
        ("language_model/layers/down/kernel", (1, 11_008, 4096)),
        ("language_model/layers/attention/query/kernel", (1, 4096, 32, 128)),
        ("vision_tower/layers/out/kernel", (1, 16, 64, 1024)),
    ):
        form = jax.eval_shape(
            lambda x, path=path: quantize_linear(path, x, "nf4"), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        )
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(form))
        assert 0.5 < stored / math.prod(shape) <= 0.53, path
