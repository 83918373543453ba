"""What cuDNN is called with: the same call through XLA must be attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phantom_jax.ops import cudnn
from phantom_jax.ops.attention import attention
from phantom_jax.ops.partition import WHOLE
from phantom_jax.sharding.mesh import make_mesh
from tests.ops import packed


@pytest.fixture
def calls(monkeypatch):
    """JAX's function, computed by XLA; keeps the shapes and arguments of its calls."""
    real, kept = jax.nn.dot_product_attention, []

    def record(query, key, value, *, implementation, **arguments):
        assert implementation == "cudnn" and not {"mask", "bias"} & arguments.keys()
        kept.append((query.shape, key.shape, value.shape, arguments["is_causal"]))
        return real(query, key, value, implementation="xla", **arguments)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return kept


@pytest.mark.parametrize("value_width, heads, kv_heads", [(16, 4, 2), (32, 8, 4), (24, 8, 4), (8, 4, 2)])
def test_values_of_any_width_are_heads_of_the_keys_width(calls, value_width, heads, kv_heads):
    inputs = packed.inputs(length=20, value_width=value_width)
    structure = packed.structure([[20], [13]], 20)
    real = structure.segment_ids > 0
    reference = functools.partial(attention, scale=0.3, query_structure=structure, key_structure=structure)
    expected = packed.weighed(reference, inputs)
    ours = packed.weighed(functools.partial(cudnn.attend, real_BL=real, scale=0.3, split=WHOLE), inputs)
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert calls[0] == ((2, 20, heads, 16), (2, 20, kv_heads, 16), (2, 20, kv_heads, 16), True)


def test_images_see_everything(calls):
    inputs = packed.inputs(length=20)
    np.testing.assert_allclose(
        cudnn.attend(*inputs, None, scale=0.3, split=WHOLE), attention(*inputs, scale=0.3), atol=1e-5
    )
    assert calls[0][3] is False


def test_each_device_calls_it_for_its_rows_and_heads(calls):
    inputs = packed.inputs(length=20, heads=8, value_width=32)
    real = jnp.ones((2, 20), bool)
    structure = packed.structure([[20], [20]], 20)
    expected = attention(*inputs, scale=0.3, query_structure=structure, key_structure=structure)
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        out = jax.jit(
            functools.partial(cudnn.attend, real_BL=real, scale=0.3, split=PartitionSpec("data", None, "tensor"))
        )(*inputs)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # 2 of 8 heads and 1 of 2 kv heads, which is held twice; the wide values double both.
    assert calls == [((1, 20, 4, 16), (1, 20, 2, 16), (1, 20, 2, 16), True)]
