"""The phantom dimension (Phantom, arXiv 2409.14713, section 3, equations 1 to 3, as the released operators compute it).

Per layer, with query q, key k, value v after rotation, and the states q*, k*, v* of one start-of-sequence token:

    y_q = X_q(q, q*)    y_k = X_k(k, k*)    y_v = X_v(v, v*)         cross attention over the sos token's HEADS
    scores = (q . k + eta^2 y_q . y_k) / sqrt(H)                     [q, eta y_q] . [k, eta y_k]
    o = softmax(scores) v        o_y = softmax(scores) y_v           one attention with values [v, y_v]
    w = sigmoid(g_1(o) - g_2(o + eta o_y))
    out = o + (1 - w) eta o_y

which equals the released form, values [v, v + eta y_v] and w o_1 + (1 - w) o_2. There, in bfloat16, `v + 1e-4 y_v`
rounds to v and the branch is lost; here eta is applied after attention in float32. Attention over the heads is what
makes the expansion depend on the token: one key token per head would make every softmax 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from phantom_jax import axes


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """The phantom dimension's open questions as configuration.

    Attributes:
      eta: weight of the phantom branches; the released code fixes 1e-4.
      query_key: whether queries and keys get a phantom half (their part of the score is eta^2).
      value: whether values get one.
      gate: `learned` is the paper's softmax of two linear maps; `equal` is the constant 1/2.
    """

    eta: float = 1e-4
    query_key: bool = True
    value: bool = True
    gate: str = "learned"

    def __post_init__(self):
        if self.gate not in ("learned", "equal"):
            raise ValueError(f"phantom gate {self.gate!r} does not exist: use learned or equal")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["query", "key", "value"], meta_fields=[])
@dataclasses.dataclass
class SosStates:
    """What the start-of-sequence tokens project to, after rotation; with a leading layer axis for a whole decoder.

    Attributes:
      query: [B, S, N, H] for S sos tokens a row.
      key, value: [B, S, K, H].
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array


def gather_sos(query_BLNH, key_BLKH, value_BLKH, sos_positions_BS) -> SosStates:
    """States of the tokens that stand at row indices `sos_positions_BS` [B, S] int32."""
    index = sos_positions_BS[:, :, None, None]
    take = functools.partial(jnp.take_along_axis, indices=index, axis=1)
    return SosStates(take(query_BLNH), take(key_BLKH), take(value_BLKH))


def head_cross_attention(x_BLNH, sos_BSGH, linear_q, linear_k, linear_v, linear_o, sos_index_BL=None) -> jax.Array:
    """y = GELU(softmax(a b^T / sqrt(H)) c W_o): each head of each token attends over the G heads of its sos token.

    Args:
      x_BLNH: what is expanded.
      sos_BSGH: states of the row's sos tokens.
      linear_q, linear_k, linear_v, linear_o: [H, H], input axis first; an exact GELU follows each.
      sos_index_BL: which of the S sos tokens serves each token; None where S is 1.

    Returns:
      [B, L, N, H] in x's dtype; the softmax is float32.
    """
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    a = gelu(jnp.einsum("blnh,hd->blnd", x_BLNH, linear_q))
    b = gelu(jnp.einsum("bsgh,hd->bsgd", sos_BSGH, linear_k))
    c = gelu(jnp.einsum("bsgh,hd->bsgd", sos_BSGH, linear_v))
    if sos_index_BL is None:
        if sos_BSGH.shape[1] != 1:
            raise ValueError(f"{sos_BSGH.shape[1]} sos tokens a row need an index per token")
        scores = jnp.einsum("blnd,bgd->blng", a, b[:, 0], preferred_element_type=jnp.float32)
        c_gather, equation = c[:, 0], "blng,bgd->blnd"
    else:
        index = sos_index_BL[:, :, None, None]
        scores = jnp.einsum(
            "blnd,blgd->blng", a, jnp.take_along_axis(b, index, axis=1), preferred_element_type=jnp.float32
        )
        c_gather, equation = jnp.take_along_axis(c, index, axis=1), "blng,blgd->blnd"
    weights = jax.nn.softmax(scores * x_BLNH.shape[-1] ** -0.5, axis=-1).astype(x_BLNH.dtype)
    return gelu(jnp.einsum("blnd,de->blne", jnp.einsum(equation, weights, c_gather), linear_o))


class HeadCrossAttention(nn.Module):
    """Parameters of one branch: four linear maps [H, H] shared over heads, normal with deviation 0.02 as released."""

    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLNH: jax.Array, sos_BSGH: jax.Array, sos_index_BL: jax.Array | None) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axes.HEAD_DIM, axes.HEAD_DIM_OUT))
        shape = (self.head_dim, self.head_dim)
        linears = [
            self.param(name, init, shape, jnp.float32).astype(self.dtype)
            for name in ("linear_q", "linear_k", "linear_v", "linear_o")
        ]
        return head_cross_attention(x_BLNH, sos_BSGH, *linears, sos_index_BL)


class Gate(nn.Module):
    """One linear map of a head's output to a gate logit, float32; zero bias and deviation 0.02 as released."""

    @nn.compact
    def __call__(self, x_BLNH: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axes.HEAD_DIM,))
        kernel = self.param("kernel", kernel_init, x_BLNH.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ()), (), jnp.float32)
        return jnp.einsum("blnh,h->bln", x_BLNH, kernel.astype(jnp.float32)) + bias.astype(jnp.float32)


class PhantomDimension(nn.Module):
    """Expands queries, keys and values before attention, and mixes the two halves of its output after it."""

    config: PhantomConfig
    head_dim: int
    dtype: Any = jnp.float32

    def setup(self):
        branch = functools.partial(HeadCrossAttention, self.head_dim, self.dtype)
        if self.config.query_key:
            self.query, self.key = branch(), branch()
        if self.config.value:
            self.value = branch()
        if self.config.gate == "learned":
            self.gate_plain, self.gate_phantom = Gate(), Gate()

    def expand(self, query_BLNH, key_BLKH, value_BLKH, sos: SosStates, sos_index_BL=None):
        """Returns ([q, eta y_q], [k, eta y_k], [v, y_v]), each twice as wide where its branch exists."""
        if self.config.query_key:
            y_query = self.query(query_BLNH, sos.query, sos_index_BL)
            y_key = self.key(key_BLKH, sos.key, sos_index_BL)
            query_BLNH = jnp.concatenate([query_BLNH, self.config.eta * y_query], axis=-1)
            key_BLKH = jnp.concatenate([key_BLKH, self.config.eta * y_key], axis=-1)
        if self.config.value:
            value_BLKH = jnp.concatenate([value_BLKH, self.value(value_BLKH, sos.value, sos_index_BL)], axis=-1)
        return query_BLNH, key_BLKH, value_BLKH

    def mix(self, out_BLNE: jax.Array) -> jax.Array:
        """The gated sum [B, L, N, H] of the two halves of attention's float32 output."""
        if not self.config.value:
            return out_BLNE
        plain, phantom = jnp.split(out_BLNE.astype(jnp.float32), 2, axis=-1)
        phantom = self.config.eta * phantom
        if self.config.gate == "equal":
            return plain + 0.5 * phantom
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its precision where the gate is nearly closed.
        closed = jax.nn.sigmoid(self.gate_phantom(plain + phantom) - self.gate_plain(plain))
        return plain + closed[..., None] * phantom
