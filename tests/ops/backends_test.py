"""What a backend cannot honour is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.errors import InputError
from phantom_jax.ops import attention as attention_module
from phantom_jax.ops import backends, cudnn
from phantom_jax.ops.attention import attention
from phantom_jax.ops.structure import Structure
from tests.ops import packed


def here(monkeypatch, platform):
    monkeypatch.setattr(backends, "platform", lambda: platform)


def test_kernels_run_on_their_platform_only():
    inputs = packed.inputs(length=8)
    with pytest.raises(InputError, match="'splash' runs on a TPU, and this is compiled for a CPU: set attention_bac"):
        attention(*inputs, scale=1.0, backend="splash")
    with pytest.raises(InputError, match="'cudnn' runs on a GPU, and this is compiled for a CPU"):
        attention(*inputs, scale=1.0, backend="cudnn")
    with pytest.raises(InputError, match="'flash' does not exist here: use one of xla, chunked, splash, cudnn"):
        attention(*inputs, scale=1.0, backend="flash")


def test_the_platform_is_that_of_the_mesh():
    assert backends.platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        assert backends.platform() == "tpu"


def test_cudnn_takes_half_precision_and_short_heads(monkeypatch):
    here(monkeypatch, "gpu")
    with pytest.raises(InputError, match="takes bfloat16 or float16, not float32: set the model's dtype to 'bfloat16'"):
        backends.check_backend("cudnn", jnp.float32)
    backends.check_backend("cudnn", jnp.bfloat16)
    backends.check_cudnn_width(128, "8.0")
    backends.check_cudnn_width(256, "9.0")
    for head_dim, capability in ((256, "8.6"), (264, "9.0"), (100, "10.0")):
        with pytest.raises(InputError, match=f"on a GPU of compute capability {capability}.* have {head_dim}"):
            backends.check_cudnn_width(head_dim, capability)


def test_tokens_lie_as_the_backend_takes_them():
    for name in ("splash", "cudnn"):
        with pytest.raises(InputError, match="as many keys as queries, here 64 and 1: decode"):
            backends.check_tokens(name, 1, 64)
    with pytest.raises(InputError, match="takes whole rows, and the mesh splits them over seq:2"):
        backends.check_tokens("cudnn", 64, 64, 2)
    for name in ("xla", "chunked"):
        backends.check_tokens(name, 1, 64, 2)
    backends.check_tokens("splash", 64, 64, 2)


def test_rows_that_a_backend_can_not_honour_are_refused():
    one, two = packed.structure([[6], [4]], 6), packed.structure([[6], [2, 3]], 6)
    none = jnp.zeros((2, 6), jnp.int32)
    branched = none.at[1, 3:].set(1)
    in_front = jnp.asarray([[0, 0, 1, 1, 1, 1]])
    backends.check_rows("splash", two.segment_ids, none)
    backends.check_rows("cudnn", one.segment_ids, none)
    backends.check_rows("cudnn", none, none)
    backends.check_rows("chunked", two.segment_ids, branched)
    with pytest.raises(InputError, match="'splash' cannot keep branches of a row apart, and row 1 has some"):
        backends.check_rows("splash", one.segment_ids, branched)
    for segments, branches, row in (
        (two.segment_ids, none, 1),
        (one.segment_ids, branched, 1),
        (in_front, none[:1], 0),
    ):
        with pytest.raises(InputError, match=f"'cudnn' cannot keep segments or branches of a row apart, and row {row}"):
            backends.check_rows("cudnn", segments, branches)


def test_a_compiled_program_answers_with_nan_where_it_could_not_ask(monkeypatch):
    here(monkeypatch, "gpu")
    monkeypatch.setattr(attention_module, "check_backend", lambda *_: None)
    monkeypatch.setattr(cudnn.jax.nn, "dot_product_attention", lambda query, *_, **__: query)
    inputs = packed.inputs(length=6, dtype=jnp.bfloat16)
    structure = packed.structure([[6], [2, 3]], 6)

    def attend(structure):
        return attention(*inputs, scale=1.0, query_structure=structure, key_structure=structure, backend="cudnn")

    out = np.asarray(jax.jit(attend)(structure))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all() and out.dtype == np.float32
    with pytest.raises(InputError, match="row 1 has some"):
        attend(structure)
    branches = Structure(
        structure.positions, jnp.ones_like(structure.segment_ids), structure.branch_ids.at[0, 3].set(1)
    )
    assert np.isnan(np.asarray(jax.jit(attend)(branches))[0]).all()
