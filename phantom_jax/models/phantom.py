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
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from phantom_jax import axes
from phantom_jax.ops.backends import platform


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
        if not math.isfinite(self.eta):
            raise ValueError(f"phantom eta is {self.eta}: it must be a finite number")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["query", "key", "value"], meta_fields=[])
@dataclasses.dataclass
class SosStates:
    """What the start-of-sequence tokens of one layer project to, after rotation.

    Attributes:
      query: [B, S, N, H] for S sos tokens a row.
      key, value: [B, S, K, H].
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class HeadStates:
    """What the tokens of one branch attend to: functions of the sos token and of the weights, not of the token.

    Attributes:
      keys: [B, S, G, H], GELU(s W_k) for S sos tokens a row of G heads each.
      values: [B, S, G, H], GELU(s W_v) W_o: W_o is linear and the softmax sums to one, so it moves inside the sum.
    """

    keys: jax.Array
    values: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["query", "key", "value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PhantomStates:
    """The states of each branch of one layer; None where a branch does not exist.

    A first token that never changes makes them constants of the weights: then B is 1 and serves every row.
    """

    query: HeadStates | None
    key: HeadStates | None
    value: HeadStates | None


def gather_sos(query_BLNH, key_BLKH, value_BLKH, sos_positions_BS) -> SosStates:
    """States of the tokens that stand at row indices `sos_positions_BS` [B, S] int32."""
    index = sos_positions_BS[:, :, None, None]
    take = functools.partial(jnp.take_along_axis, indices=index, axis=1)
    return SosStates(take(query_BLNH), take(key_BLKH), take(value_BLKH))


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def fold_heads(sos_BSGH: jax.Array, linear_k, linear_v, linear_o) -> HeadStates:
    """What tokens attend to in one branch; the linears are [H, H], input axis first."""
    keys = _gelu(jnp.einsum("bsgh,hd->bsgd", sos_BSGH, linear_k))
    values = _gelu(jnp.einsum("bsgh,hd->bsgd", sos_BSGH, linear_v))
    return HeadStates(keys, jnp.einsum("bsgd,de->bsge", values, linear_o))


def head_cross_attention(x_BLNH, states: HeadStates, linear_q, sos_index_BL=None) -> jax.Array:
    """y = GELU(softmax(GELU(x W_q) keys^T / sqrt(H)) values): each head of each token attends over the sos's heads.

    Args:
      x_BLNH: what is expanded.
      states: of the row's sos tokens; of all rows at once where its B is 1.
      linear_q: [H, H], input axis first.
      sos_index_BL: which of the S sos tokens serves each token; None where S is 1.

    Returns:
      [B, L, N, H] in x's dtype; the softmax is float32.
    """
    batch, _, _, width = x_BLNH.shape
    flat = _is_flat_faster() and sos_index_BL is None
    x = x_BLNH.reshape(-1, width) if flat else x_BLNH
    a = _gelu(jnp.einsum("...h,hd->...d", x, linear_q))
    if sos_index_BL is not None:
        index = sos_index_BL[:, :, None, None]
        keys, values = (jnp.take_along_axis(x, index, axis=1) for x in (states.keys, states.values))
        rows, axes_of_states = "bln", "blgd"
    elif states.keys.shape[1] != 1:
        raise ValueError(f"{states.keys.shape[1]} sos tokens a row need an index per token")
    elif states.keys.shape[0] == 1:
        keys, values = states.keys[0, 0], states.values[0, 0]
        rows, axes_of_states = "m" if flat else "bln", "gd"
    else:
        keys, values = states.keys[:, 0], states.values[:, 0]
        rows, axes_of_states = "bm" if flat else "bln", "bgd"
        a = a.reshape(batch, -1, width) if flat else a
    scores = jnp.einsum(f"{rows}d,{axes_of_states}->{rows}g", a, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * width**-0.5, axis=-1).astype(x_BLNH.dtype)
    return _gelu(jnp.einsum(f"{rows}g,{axes_of_states}->{rows}d", weights, values)).reshape(x_BLNH.shape)


def _is_flat_faster() -> bool:
    """Whether rows, tokens and heads should be one axis: products of matrices take half the time then on a CPU.

    Over several devices that axis would mix some that are split differently.
    """
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


class HeadCrossAttention(nn.Module):
    """Parameters of one branch: four linear maps [H, H] shared over heads, normal with deviation 0.02 as released."""

    head_dim: int
    dtype: Any = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axes.HEAD_DIM, axes.HEAD_DIM_OUT))
        shape = (self.head_dim, self.head_dim)
        self.linear_q, self.linear_k, self.linear_v, self.linear_o = (
            self.param(name, init, shape, jnp.float32) for name in ("linear_q", "linear_k", "linear_v", "linear_o")
        )

    def fold(self, sos_BSGH: jax.Array) -> HeadStates:
        return fold_heads(sos_BSGH, *(x.astype(self.dtype) for x in (self.linear_k, self.linear_v, self.linear_o)))

    def __call__(self, x_BLNH: jax.Array, states: HeadStates, sos_index_BL: jax.Array | None) -> jax.Array:
        return head_cross_attention(x_BLNH, states, self.linear_q.astype(self.dtype), sos_index_BL)


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

    def fold(self, sos: SosStates) -> PhantomStates:
        """What the tokens of each branch attend to."""
        query_key, value = self.config.query_key, self.config.value
        return PhantomStates(
            query=self.query.fold(sos.query) if query_key else None,
            key=self.key.fold(sos.key) if query_key else None,
            value=self.value.fold(sos.value) if value else None,
        )

    def expand(self, query_BLNH, key_BLKH, value_BLKH, states: PhantomStates, sos_index_BL=None):
        """Returns ([q, eta y_q], [k, eta y_k], [v, y_v]), each twice as wide where its branch exists."""
        if self.config.query_key:
            y_query = self.query(query_BLNH, states.query, sos_index_BL)
            y_key = self.key(key_BLKH, states.key, sos_index_BL)
            query_BLNH = jnp.concatenate([query_BLNH, self.config.eta * y_query], axis=-1)
            key_BLKH = jnp.concatenate([key_BLKH, self.config.eta * y_key], axis=-1)
        if self.config.value:
            value_BLKH = jnp.concatenate([value_BLKH, self.value(value_BLKH, states.value, sos_index_BL)], axis=-1)
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
