import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phantom_jax.batch import IGNORE
from phantom_jax.ops import cross_entropy
from phantom_jax.sharding.mesh import make_mesh
from tests.ops.attention_test import array_shapes

ROWS, LENGTH, EMBED, VOCAB = 8, 22, 16, 96
WHOLE = PartitionSpec(None, None)


def logits_of(embedding_VD, hidden_BLD):
    return jnp.einsum("bld,vd->blv", hidden_BLD, embedding_VD, preferred_element_type=jnp.float32)


def in_full(embedding, hidden, targets):
    """The definition, with the logits of all tokens."""
    log_probs = jax.nn.log_softmax(logits_of(embedding, hidden))
    chosen = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[:, :, None], axis=2)[:, :, 0]
    correct = jnp.argmax(log_probs, axis=2) == targets
    return jnp.where(targets == IGNORE, 0.0, chosen), correct | (targets == IGNORE)


def in_chunks(embedding, hidden, targets, tokens=16, split=WHOLE):
    """Of so many tokens on a device: 2 of each of the 8 rows, where all are on one."""
    return cross_entropy.target_scores(
        logits_of, embedding, hidden, targets, vocabulary=VOCAB, split=split, most_logits=tokens * VOCAB
    )


def loss_and_gradients(scores):
    def loss(embedding, hidden, targets):
        log_probs, correct = scores(embedding, hidden, targets)
        return jnp.sum(log_probs * jnp.sin(jnp.arange(log_probs.size)).reshape(log_probs.shape)), (log_probs, correct)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    embedding = 0.3 * jax.random.normal(keys[0], (VOCAB, EMBED))
    hidden = jax.random.normal(keys[1], (ROWS, LENGTH, EMBED))
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB)
    likely = jnp.argmax(logits_of(embedding, hidden), axis=2)
    targets = jnp.where(jnp.arange(LENGTH) % 3 == 0, likely, targets)
    return embedding, hidden, targets.at[:, :4].set(IGNORE)


@pytest.fixture(scope="module")
def expected(inputs):
    return jax.jit(loss_and_gradients(in_full))(*inputs)


def assert_equal(ours, expected):
    for got, wanted in zip(jax.tree.leaves(ours[0][1]), jax.tree.leaves(expected[0][1]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    for got, wanted in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


def test_chunks_equal_the_full_form(inputs, expected):
    ours = jax.jit(loss_and_gradients(in_chunks))(*inputs)
    assert_equal(ours, expected)
    correct = np.asarray(ours[0][1][1])
    assert correct[:, :4].all() and correct[:, ::3].all() and not correct.all()


def test_of_equal_logits_the_first_is_the_answer():
    hidden = jnp.ones((1, 2, EMBED))
    embedding = jnp.zeros((VOCAB, EMBED)).at[5].set(1.0).at[9].set(1.0)
    _, correct = in_chunks(embedding, hidden, jnp.asarray([[5, 9]]))
    assert correct.tolist() == [[True, False]]


def test_no_more_logits_than_a_chunk_forward_and_backward(inputs):
    for scores, limit in ((in_full, ROWS * LENGTH), (in_chunks, 16)):
        shapes = list(array_shapes(jax.make_jaxpr(loss_and_gradients(scores))(*inputs).jaxpr))
        logits = [shape for shape in shapes if shape[-1:] == (VOCAB,) and len(shape) > 2]
        assert max(map(np.prod, logits)) == limit * VOCAB


@pytest.mark.parametrize(
    "mesh, embedding_spec",
    [
        ({"data": 2, "fsdp": 4}, PartitionSpec("fsdp", None)),
        ({"data": 2, "fsdp": 4}, PartitionSpec(None, "fsdp")),
        ({"fsdp": 2, "tensor": 2, "seq": 2}, PartitionSpec("tensor", "fsdp")),
    ],
    ids=["vocabulary over fsdp", "embedding over fsdp", "vocabulary over tensor, tokens over seq"],
)
def test_hidden_states_and_logits_stay_where_they_are(inputs, expected, mesh, embedding_spec):
    mesh = make_mesh(mesh)
    split = PartitionSpec(("data", "fsdp"), "seq")
    tokens = NamedSharding(mesh, split)
    embedding = NamedSharding(mesh, embedding_spec)
    placed = jax.device_put(inputs, (embedding, tokens, tokens))
    function = loss_and_gradients(functools.partial(in_chunks, tokens=2, split=split))
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, out_shardings=(None, (embedding, tokens)))
        program = jitted.lower(*placed).compile()
        assert_equal(program(*placed), expected)
    collectives = re.findall(r"= \(?(\w+)\[([\d,]*)\].*? (all-gather|all-to-all|collective-permute)", program.as_text())
    # The embedding comes together, once: its parts along fsdp, and those alone where the vocabulary is over tensor.
    assert len(collectives) == 1
    shape = sorted(int(size) for size in collectives[0][1].split(","))
    assert collectives[0][2] == "all-gather" and shape == [EMBED, VOCAB // mesh.shape["tensor"]]
