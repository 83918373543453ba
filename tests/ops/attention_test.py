import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phantom_jax.ops.attention import attention
from phantom_jax.ops.partition import WHOLE
from phantom_jax.ops.structure import Structure, visible
from phantom_jax.sharding.mesh import make_mesh


def random_inputs(length=37, value_width=12, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    query = jax.random.normal(keys[0], (2, length, 6, 8))
    key = jax.random.normal(keys[1], (2, length, 3, 8))
    value = jax.random.normal(keys[2], (2, length, 3, value_width))
    return query, key, value


def packed_structure(length=37):
    """Row 0: two segments, the second with two branches, then padding; row 1: left padded."""
    segment = np.zeros((2, length), np.int32)
    position = np.zeros((2, length), np.int32)
    branch = np.zeros((2, length), np.int32)
    segment[0, :10], position[0, :10] = 1, np.arange(10)
    segment[0, 10:30], branch[0, 15:22], branch[0, 22:30] = 2, 1, 2
    position[0, 10:22], position[0, 22:30] = np.arange(12), np.arange(5, 13)
    segment[1, 9:], position[1, 9:] = 1, np.arange(length - 9)
    return Structure(jnp.asarray(position), jnp.asarray(segment), jnp.asarray(branch))


def naive(query, key, value, mask, scale):
    """One head, one query at a time."""
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, i, n in np.ndindex(*query.shape[:3]):
        kv = n * key.shape[2] // query.shape[2]
        allowed = np.flatnonzero(mask[b, i])
        if len(allowed):
            scores = key[b, allowed, kv] @ query[b, i, n] * scale
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights / weights.sum() @ value[b, allowed, kv]
    return out


def test_structure_says_who_sees_whom():
    structure = packed_structure()
    mask = np.asarray(visible(structure, structure))
    assert not mask[0, 12, :10].any(), "segments do not mix"
    assert mask[0, 25, 10:15].all() and not mask[0, 25, 15:22].any(), "a branch sees the prefix, not its sibling"
    assert not mask[0, 16, 17:].any(), "nothing is seen before it comes"
    assert not mask[0, 30:].any() and not mask[:, :, 30:][0].any() and not mask[1, :, :9].any(), "padding is alone"


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_backends_equal_a_naive_loop(backend):
    query, key, value = random_inputs()
    structure = packed_structure()
    out = attention(
        query, key, value, scale=0.3, query_structure=structure, key_structure=structure, backend=backend, chunk=8
    )
    mask = np.asarray(visible(structure, structure))
    np.testing.assert_allclose(out, naive(*map(np.asarray, (query, key, value)), mask, 0.3), atol=2e-6)
    full = attention(query, key, value, scale=0.3, backend=backend, chunk=8)
    everything = np.ones((2, 37, 37), bool)
    np.testing.assert_allclose(full, naive(*map(np.asarray, (query, key, value)), everything, 0.3), atol=2e-6)


def test_chunked_gradients_equal_xla():
    inputs = random_inputs()
    structure = packed_structure()
    weight = jax.random.normal(jax.random.key(9), (2, 37, 6, 12))

    def loss(inputs, backend):
        out = attention(
            *inputs, scale=0.3, query_structure=structure, key_structure=structure, backend=backend, chunk=8
        )
        return (out * weight).sum()

    expected = jax.grad(loss)(inputs, "xla")
    for ours, theirs in zip(jax.grad(loss)(inputs, "chunked"), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_gradients_where_whole_blocks_are_padding(backend):
    query, key, value = random_inputs(length=24)
    zeros = jnp.zeros((2, 24), jnp.int32)
    structure = Structure(zeros + jnp.arange(24)[None], zeros + (jnp.arange(24) < 5)[None], zeros)
    alone = Structure(*(leaf[:, :5] for leaf in (structure.positions, structure.segment_ids, zeros)))

    def loss(inputs, structure):
        out = attention(
            *inputs, scale=0.3, query_structure=structure, key_structure=structure, backend=backend, chunk=8
        )
        return jnp.sum(jnp.sin(out))

    padded = jax.grad(loss)((query, key, value), structure)
    expected = jax.grad(loss)(tuple(x[:, :5] for x in (query, key, value)), alone)
    for ours, theirs in zip(padded, expected, strict=True):
        np.testing.assert_allclose(ours[:, :5], theirs, atol=1e-6)
        np.testing.assert_array_equal(ours[:, 5:], 0)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_devices_share_rows_tokens_and_heads(backend, dtype, tolerance):
    inputs = [x.astype(dtype) for x in random_inputs(length=38)]
    structure = packed_structure(38)
    weight = jax.random.normal(jax.random.key(9), (2, 38, 6, 12))

    def loss(inputs, split):
        options = {"query_structure": structure, "key_structure": structure, "backend": backend, "chunk": 8}
        return (attention(*inputs, scale=0.3, split=split, **options) * weight).sum()

    expected = jax.grad(loss)(inputs, WHOLE)
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 2, "seq": 2})):
        ours = jax.jit(jax.grad(lambda inputs: loss(inputs, PartitionSpec("data", "seq", "tensor"))))(inputs)
    for gradient, other in zip(ours, expected, strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(other, np.float32), rtol=tolerance, atol=tolerance
        )


def array_shapes(jaxpr):
    """Shapes of every value in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from array_shapes(inner)


@pytest.mark.parametrize("backend, square", [("xla", True), ("chunked", False)])
def test_chunked_holds_no_square_array_forward_or_backward(backend, square):
    inputs = random_inputs(length=96)
    zeros = jnp.zeros((2, 96), jnp.int32)
    structure = Structure(zeros + jnp.arange(96)[None], zeros + 1, zeros)

    def loss(inputs):
        return attention(
            *inputs, scale=0.3, query_structure=structure, key_structure=structure, backend=backend, chunk=16
        ).sum()

    shapes = list(array_shapes(jax.make_jaxpr(jax.grad(loss))(inputs).jaxpr))
    scores = [shape for shape in shapes if np.prod(shape) >= 2 * 6 * 96 * 96 and shape.count(96) != 1]
    assert bool(scores) == square


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    query, key, value = random_inputs(length=5)
    zeros = jnp.zeros((2, 5), jnp.int32)
    nothing = Structure(zeros, zeros, zeros)
    for backend in ("xla", "chunked"):

        def loss(inputs, backend=backend):
            return attention(
                *inputs, scale=1.0, query_structure=nothing, key_structure=nothing, backend=backend, chunk=4
            ).sum()

        value_and_gradient = jax.value_and_grad(loss)((query, key, value))
        assert value_and_gradient[0] == 0
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(value_and_gradient))


def test_what_cannot_be_honoured_is_refused():
    query, key, value = random_inputs()
    structure = packed_structure()
    with pytest.raises(ValueError, match="5 query heads are no multiple of 3"):
        attention(query[:, :, :5], key, value, scale=1.0)
    with pytest.raises(ValueError, match="for queries and keys, or for neither"):
        attention(query, key, value, scale=1.0, query_structure=structure)
    with pytest.raises(ValueError, match="query structure .* does not fit"):
        attention(query[:, :3], key, value, scale=1.0, query_structure=structure, key_structure=structure)
    with pytest.raises(ValueError, match="do not fit"):
        attention(query, key[..., :4], value, scale=1.0)
