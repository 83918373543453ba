"""The TPU kernel in Pallas' interpreter against the reference, forward and backward."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phantom_jax.ops import splash
from phantom_jax.ops.attention import attention
from phantom_jax.ops.partition import WHOLE
from phantom_jax.sharding.mesh import make_mesh
from tests.ops import packed


def compare(inputs, structure, mesh=None, split=WHOLE):
    scale = inputs[0].shape[-1] ** -0.5
    segments = None if structure is None else structure.segment_ids
    reference = functools.partial(attention, scale=scale, query_structure=structure, key_structure=structure)
    kernel = functools.partial(splash.attend, segment_ids_BL=segments, scale=scale, split=split, interpret=True)
    expected = packed.weighed(reference, inputs)
    if mesh is None:
        ours = packed.weighed(kernel, inputs)
    else:
        with jax.set_mesh(mesh):
            ours = packed.weighed(kernel, inputs)
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    return ours


# Widths of queries and values: vision towers, Phantom-7B with values alone doubled, Phantom-3.8B so, LLaVA.
@pytest.mark.parametrize("widths", [(64, 64), (128, 256), (96, 192), (128, 128)])
def test_causal_order_and_segments_are_the_rule_of_positions(widths):
    head_dim, value_width = widths
    inputs = packed.inputs(head_dim=head_dim, value_width=value_width)
    structure = packed.structure([[50, 60], [130]], 130)
    out, query, key, value = compare(inputs, structure)
    for padding in (out[0, 110:], query[0, 110:], key[0, 110:], value[0, 110:]):
        assert not padding.any()


def test_images_see_everything_but_what_fills_the_last_block():
    compare(packed.inputs(length=100), None)


@pytest.mark.parametrize(
    "mesh, heads, split",
    [
        ({"data": 2, "tensor": 2, "seq": 2}, 4, PartitionSpec("data", "seq", "tensor")),
        ({"fsdp": 2, "tensor": 4}, 8, PartitionSpec("fsdp", None, "tensor")),
        ({"fsdp": 2, "tensor": 4}, 6, PartitionSpec("fsdp", None, None)),
    ],
    ids=["rows, heads and tokens", "kv heads are repeated", "heads stay whole"],
)
def test_a_mesh_changes_nothing(mesh, heads, split):
    inputs = packed.inputs(length=256, heads=heads)
    compare(inputs, packed.structure([[100, 90], [70, 186]], 256), make_mesh(mesh), split)


def test_blocks_pad_little():
    assert splash._block(4096, 1) == 512
    assert splash._block(1025, 1) == 384
    assert splash._block(577, 1) == 128
    assert splash._block(100, 1) == 128
    assert splash._block(4096, 8) == 512
    assert splash._block(1024, 8) == 128
