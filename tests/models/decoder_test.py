import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.models.cache import empty_cache
from phantom_jax.models.decoder import DecoderLayer, _Context
from phantom_jax.models.phantom import PhantomConfig, fold_heads, head_cross_attention
from phantom_jax.ops import rope
from phantom_jax.ops.structure import Structure
from tests.generation.run import unrolled
from tests.models import small


def logits_of(model, params, batch, rope_length=32):
    return np.asarray(small.logits(model, params, batch, rope_length))


@pytest.fixture(scope="module", params=["plain", "phantom"])
def model_and_params(request):
    return small.init(small.CONFIG if request.param == "phantom" else small.with_decoder(phantom=None))


def test_no_token_depends_on_a_later_one(model_and_params):
    model, params = model_and_params
    batch = small.text_batch(small.random_ids(1, 9))
    embeddings = model.apply({"params": params}, batch["token_ids"], method=lambda m, ids: m.language_model.embed(ids))
    structure = Structure(batch["positions"], batch["segment_ids"], jnp.zeros_like(batch["positions"]))

    def hidden(x_BLD):
        return model.apply(
            {"params": params}, x_BLD, method=lambda m, x: m.language_model(x, structure, rope_length=32).hidden
        )

    jacobian = np.asarray(jax.jacobian(lambda x: hidden(x)[0].sum(-1))(embeddings))[:, 0]  # [out, in, D]
    reaches = np.abs(jacobian).sum(-1) > 0
    assert not np.triu(reaches, 1).any()
    assert np.tril(reaches)[np.tril_indices(9)].all()


def test_cached_decoding_equals_the_full_forward_at_every_step(model_and_params):
    model, params = model_and_params
    ids, lengths = small.random_ids(3, 11), [11, 8, 5]
    batch = small.text_batch(ids, lengths, left=True)
    expected = logits_of(model, params, batch)
    cache = empty_cache(model.config.language_model, 3, 16, jnp.float32)
    model, params = unrolled(model, params)

    def run(part, cache):
        output = model.apply({"params": params}, part, rope_length=32, cache=cache, method="hidden_states")
        return model.apply({"params": params}, output.hidden, method="logits"), output.cache

    def columns(start, stop):
        return {name: value[:, start:stop] for name, value in batch.items()}

    logits, cache = run(columns(0, 7), cache)
    pieces = [logits]
    for step in range(7, 11):
        logits, cache = run(columns(step, step + 1), cache)
        pieces.append(logits)
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[real], expected[real], atol=1e-5)


def test_left_padding_equals_right_padding(model_and_params):
    model, params = model_and_params
    ids, lengths = small.random_ids(3, 10), [10, 7, 4]
    left = np.zeros_like(ids)
    right = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        left[row, 10 - length :] = right[row, :length] = ids[row, :length]
    ours = logits_of(model, params, small.text_batch(left, lengths, left=True))
    theirs = logits_of(model, params, small.text_batch(right, lengths))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(ours[row, 10 - length :], theirs[row, :length], atol=1e-5)


def test_branches_equal_separate_rows_and_packed_rows_equal_unpacked(model_and_params):
    model, params = model_and_params
    rng = np.random.default_rng(1)
    start, prefix, first, second = np.array([5]), *(rng.integers(6, 61, n) for n in (4, 3, 5))
    other = np.concatenate([start, rng.integers(6, 61, 6)])
    conversations = [np.concatenate([start, prefix, tail]) for tail in (first, second)]
    separate = [logits_of(model, params, small.text_batch(c[None]))[0] for c in (*conversations, other)]
    row = np.concatenate([start, prefix, first, second, other])
    lengths = [5, 3, 5, 7]
    batch = {
        "token_ids": row[None],
        "positions": np.concatenate([np.arange(5), 5 + np.arange(3), 5 + np.arange(5), np.arange(7)])[None],
        "segment_ids": np.repeat([1, 1, 1, 2], lengths)[None],
        "branch_ids": np.repeat([0, 1, 2, 0], lengths)[None],
    }
    packed = logits_of(model, params, {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()})[0]
    np.testing.assert_allclose(packed[:8], separate[0], atol=1e-5)
    np.testing.assert_allclose(packed[8:13], separate[1][5:], atol=1e-5)
    np.testing.assert_allclose(packed[13:], separate[2], atol=1e-5)


def test_a_vanishing_phantom_branch_is_the_plain_decoder():
    _, params = small.init(small.CONFIG)
    batch = small.text_batch(small.random_ids(2, 9))
    zero = small.with_decoder(phantom=PhantomConfig(eta=0.0))
    plain = small.with_decoder(phantom=None)
    ours = logits_of(small.VisionLanguageModel(zero), params, batch)
    np.testing.assert_allclose(ours, logits_of(small.VisionLanguageModel(plain), params, batch), atol=5e-6)
    with_branch = logits_of(small.VisionLanguageModel(small.CONFIG), params, batch)
    assert np.abs(with_branch - ours).max() > 0.1, "the branch must matter for the test to mean something"


@pytest.mark.parametrize("field", [{"query_key": False}, {"value": False}, {"gate": "equal"}])
def test_each_part_of_the_phantom_dimension_can_be_left_out(field):
    config = small.with_decoder(phantom=PhantomConfig(eta=0.5, **field))
    model, params = small.init(config)
    whole = small.init(small.CONFIG)[1]["language_model"]["layers"]["attention"]["phantom"]
    ours = params["language_model"]["layers"]["attention"]["phantom"]
    missing = {"query_key": {"query", "key"}, "value": {"value", "gate_plain", "gate_phantom"}}
    expected = missing.get(next(iter(field)), {"gate_plain", "gate_phantom"})
    assert set(whole) - set(ours) == expected
    batch = small.text_batch(small.random_ids(2, 9))
    assert np.isfinite(logits_of(model, params, batch)).all()
    cache = empty_cache(config.language_model, 2, 9, jnp.float32)
    scanned = logits_of(model, params, batch)
    model, params = unrolled(model, params)
    output = model.apply({"params": params}, batch, rope_length=32, cache=cache, method="hidden_states")
    cached = model.apply({"params": params}, output.hidden, method="logits")
    np.testing.assert_allclose(cached, scanned, atol=1e-5)


def test_the_scanned_layers_equal_a_loop():
    model, params = small.init(small.CONFIG, keep_layer_inputs=True)
    config = small.CONFIG.language_model
    batch = small.text_batch(small.random_ids(2, 9))
    output = model.apply({"params": params}, batch, rope_length=32, method="hidden_states")
    structure = Structure(batch["positions"], batch["segment_ids"], jnp.zeros_like(batch["positions"]))
    angles = rope.angles(batch["positions"], *rope.frequencies(config.rope, config.head_dim, 32))
    context = _Context(*angles, structure, structure, jnp.zeros((2, 1), jnp.int32), None, None)
    layer = DecoderLayer(config, jnp.float32, "xla", False)
    x = output.layer_inputs[0]
    for index in range(config.num_layers):
        np.testing.assert_allclose(x, output.layer_inputs[index], atol=1e-5)
        weights = jax.tree.map(lambda leaf, index=index: leaf[index], params["language_model"]["layers"])
        x, _ = layer.apply({"params": weights}, x, None, context)
    norm = np.asarray(params["language_model"]["final_norm"]["scale"])
    x = np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + config.norm_epsilon) * norm
    np.testing.assert_allclose(x, output.hidden, atol=1e-5)


def test_bfloat16_keeps_the_phantom_branch():
    """At the published eta: the branch's effect on a layer's output, in bfloat16 against float32."""
    decoder = dataclasses.replace(small.DECODER, num_layers=1, phantom=PhantomConfig(eta=1e-4))
    keys = jax.random.split(jax.random.key(0), 8)
    length, heads, kv_heads, width = 48, 8, 2, 32
    decoder = dataclasses.replace(decoder, num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
    from phantom_jax.models.phantom import PhantomDimension, gather_sos
    from phantom_jax.ops.attention import attention

    query = jax.random.normal(keys[0], (1, length, heads, width))
    key = jax.random.normal(keys[1], (1, length, kv_heads, width))
    value = 0.5 * jax.random.normal(keys[2], (1, length, kv_heads, width))
    zeros = jnp.zeros((1, length), jnp.int32)
    structure = Structure(zeros + jnp.arange(length)[None], zeros + 1, zeros)

    def effect(dtype):
        q, k, v = (x.astype(jnp.bfloat16).astype(dtype) for x in (query, key, value))
        dimension = PhantomDimension(decoder.phantom, width, dtype)

        def both(dimension):
            states = dimension.fold(gather_sos(q, k, v, jnp.zeros((1, 1), jnp.int32)))
            expanded = dimension.expand(q, k, v, states)
            out = attention(*expanded, scale=width**-0.5, query_structure=structure, key_structure=structure)
            return dimension.mix(out) - out[..., :width]

        params = small.meta.unbox(dimension.init(keys[3], method=both))["params"]
        return np.asarray(dimension.apply({"params": params}, method=both), np.float64).ravel()

    ours, exact = effect(jnp.bfloat16), effect(jnp.float32)
    assert ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact) >= 0.99


def test_an_index_chooses_among_several_sos_tokens():
    keys = jax.random.split(jax.random.key(0), 6)
    x, states = jax.random.normal(keys[0], (2, 7, 4, 8)), jax.random.normal(keys[1], (2, 3, 2, 8))
    query, *linears = [jax.random.normal(key, (8, 8)) for key in keys[2:]]
    folded = fold_heads(states, *linears)
    index = np.random.default_rng(0).integers(0, 3, (2, 7))
    ours = head_cross_attention(x, folded, query, jnp.asarray(index))
    for row, column in np.ndindex(2, 7):
        one = fold_heads(states[row : row + 1, index[row, column]][:, None], *linears)
        expected = head_cross_attention(x[row : row + 1, column : column + 1], one, query)[0, 0]
        np.testing.assert_allclose(ours[row, column], expected, atol=1e-5)
    with pytest.raises(ValueError, match="3 sos tokens a row need an index"):
        head_cross_attention(x, folded, query)


def test_packed_conversations_may_begin_with_tokens_of_their_own():
    """Two conversations in a row, each served by its own first token, equal the two in rows of their own."""
    model, params = small.init(small.CONFIG)
    first, second = small.random_ids(1, 6, seed=1), small.random_ids(1, 5, seed=2)

    def hidden(token_ids, positions, segments, **sos):
        structure = Structure(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, np.zeros_like(segments))))

        def run(model, ids):
            decoder = model.language_model
            return decoder(decoder.embed(ids), structure, rope_length=32, **sos).hidden

        return np.asarray(model.apply({"params": params}, jnp.asarray(token_ids), method=run))[0]

    row = np.concatenate([first, second], axis=1)
    positions, segments = np.r_[np.arange(6), np.arange(5)][None], np.r_[np.full(6, 1), np.full(5, 2)][None]
    packed = hidden(row, positions, segments, sos_positions=jnp.array([[0, 6]]), sos_index=jnp.asarray(segments - 1))
    alone = [hidden(ids, np.arange(ids.shape[1])[None], np.ones_like(ids)) for ids in (first, second)]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)
    served_by_one = hidden(row, positions, segments)
    assert np.abs(served_by_one - packed).max() > 1e-3, "another first token must matter"


def test_every_parameter_has_logical_axis_names():
    model = small.VisionLanguageModel(small.CONFIG)
    batch = small.text_batch(small.random_ids(1, 4)) | {
        "pixels": jnp.zeros((1, 1, 16, 16, 3)),
        "image_slots": jnp.full((1, 4), -1, jnp.int32),
        "targets": jnp.zeros((1, 4), jnp.int32),
    }
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, rope_length=8, method="score"))["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda node: isinstance(node, small.meta.AxisMetadata))
    assert len(leaves) > 40
    for leaf in leaves:
        assert isinstance(leaf, small.meta.AxisMetadata) and len(leaf.names) == leaf.value.ndim
        assert None not in leaf.names and len(set(leaf.names)) == len(leaf.names), leaf.names
