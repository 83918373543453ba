"""Attention over blocks of scores with its own backward pass (Dao et al., arXiv 2205.14135, algorithms 1 and 4).

Kept for the backward pass are the output and the logarithm of each query's softmax sum; scores are computed again.
One block of everything is the plain algorithm: then nothing loops.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from phantom_jax.ops.structure import Structure, visible

# Large enough to vanish in a softmax, finite so that a row without keys gives zeros and not NaN.
_MASKED = -1e30


def attend(query_BLKGH, key_BSKH, value_BSKE, query_structure, key_structure, *, scale, side, name) -> jax.Array:
    """Grouped-query attention [B, L, K, G, E] float32.

    Args:
      query_BLKGH: G query heads for each key-value head.
      key_BSKH, value_BSKE: in the queries' dtype.
      query_structure, key_structure: who sees whom; both None: everything sees everything.
      scale: factor on the scores.
      side: of a block of scores, None for one block.
      name: under which the backward pass finds what is kept, see `jax.checkpoint_policies`.
    """
    length, keys = query_BLKGH.shape[1], key_BSKH.shape[1]
    sides = (length, keys) if side is None else (min(side, length), min(side, keys))
    if query_structure is None and (length % sides[0] or keys % sides[1]):
        # The padding that fills the last block must not be seen.
        query_structure, key_structure = _one_segment(query_BLKGH), _one_segment(key_BSKH)
    return _attend(query_BLKGH, key_BSKH, value_BSKE, query_structure, key_structure, scale, sides, name)


def _one_segment(x_BL: jax.Array) -> Structure:
    zeros = jnp.zeros(x_BL.shape[:2], jnp.int32)
    return Structure(zeros, zeros + 1, zeros)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(query, key, value, query_structure, key_structure, scale, sides, name):
    return _forward(query, key, value, query_structure, key_structure, scale, sides, name)[0]


def _forward(query, key, value, query_structure, key_structure, scale, sides, name):
    blocked, blocks_of_keys = sides != (query.shape[1], key.shape[1]), _split((key, value, key_structure), sides[1])

    def one_query_block(_, query_block):
        query_BLKGH, structure = query_block
        shape = tuple(query_BLKGH.shape[axis] for axis in (0, 2, 1, 3))
        start = (
            jnp.full(shape, _MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, value.shape[3]), jnp.float32),
        )

        def one_key_block(state, key_block):
            key_BSKH, value_BSKE, key_structure = key_block
            mask = _mask(structure, key_structure)

            def attended(state):
                peak, total, out = state
                scores = _scores(query_BLKGH, key_BSKH, mask, scale)
                new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
                weights_BKLGS = _where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
                keep = jnp.exp(peak - new_peak)
                # bklgs,bske->bklge
                update = _product(weights_BKLGS.astype(value.dtype), value_BSKE, (4, 1), ((0, 1), (0, 2)))
                total = total * keep + jnp.sum(weights_BKLGS, axis=-1)
                return new_peak, total, out * keep[..., None] + update

            return _where_seen(mask if blocked else None, attended, lambda state: state, state), None

        (peak, total, out), _ = _loop(one_key_block, start, blocks_of_keys)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return None, (jnp.swapaxes(out / total[..., None], 1, 2), jnp.swapaxes(peak + jnp.log(total), 1, 2))

    _, blocks = _loop(one_query_block, None, _split((query, query_structure), sides[0]))
    out, log_total = (checkpoint_name(x, name) for x in _join(blocks, query.shape[1]))
    return out, (query, key, value, query_structure, key_structure, out, log_total)


def _backward(scale, sides, name, kept, d_out):
    del name
    query, key, value, query_structure, key_structure, out, log_total = kept
    blocked = sides != (query.shape[1], key.shape[1])
    # The softmax's own gradient: what all weights of a query share.
    shared = jnp.sum(d_out * out, axis=-1)
    blocks_of_queries = _split((query, d_out.astype(value.dtype), log_total, shared, query_structure), sides[0])

    def one_key_block(d_query, key_block):
        key_BSKH, value_BSKE, key_structure = key_block

        def one_query_block(sums, query_block):
            query_BLKGH, d_out_BLKGE, *of_queries, structure = query_block
            log_total_BKLG, shared_BKLG = (jnp.swapaxes(x, 1, 2) for x in of_queries)
            mask = _mask(structure, key_structure)

            def attended(sums):
                scores = _scores(query_BLKGH, key_BSKH, mask, scale)
                weights_BKLGS = _where(mask, jnp.exp(scores - log_total_BKLG[..., None]), 0.0)
                # blkge,bske->bklgs
                d_weights = _product(d_out_BLKGE, value_BSKE, (4, 3), ((0, 2), (0, 2)))
                d_scores_BKLGS = (scale * weights_BKLGS * (d_weights - shared_BKLG[..., None])).astype(key.dtype)
                # bklgs,bskh->bklgh
                d_query = jnp.swapaxes(_product(d_scores_BKLGS, key_BSKH, (4, 1), ((0, 1), (0, 2))), 1, 2)
                # blkgh,bklgs->bkhs
                d_key = _product(query_BLKGH, d_scores_BKLGS, ((1, 3), (2, 3)), ((0, 2), (0, 1)))
                # blkge,bklgs->bkes
                d_value = _product(d_out_BLKGE, weights_BKLGS.astype(value.dtype), ((1, 3), (2, 3)), ((0, 2), (0, 1)))
                return (sums[0] + d_key, sums[1] + d_value), d_query

            def unseen(sums):
                return sums, jnp.zeros(query_BLKGH.shape, jnp.float32)

            return _where_seen(mask if blocked else None, attended, unseen, sums)

        zeros = tuple(jnp.zeros_like(jnp.moveaxis(x, 1, 3), jnp.float32) for x in (key_BSKH, value_BSKE))
        sums, d_blocks = _loop(one_query_block, zeros, blocks_of_queries)
        return d_query + d_blocks, tuple(jnp.moveaxis(x, 3, 1) for x in sums)

    start = jnp.zeros(_split(query, sides[0]).shape, jnp.float32)
    d_query, d_keys = _loop(one_key_block, start, _split((key, value, key_structure), sides[1]))
    d_query = _join(d_query, query.shape[1])
    d_key, d_value = _join(d_keys, key.shape[1])
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


_attend.defvjp(_forward, _backward)


def _product(a, b, contracted, batch) -> jax.Array:
    """Batch axes, then what is left of `a`, then of `b`, float32.

    A CPU transposes the first operand where its rows are summed over: it is never the one of scores.
    """
    contracted = tuple((axes,) if isinstance(axes, int) else axes for axes in contracted)
    return jax.lax.dot_general(a, b, (contracted, batch), preferred_element_type=jnp.float32)


def _mask(query: Structure | None, key: Structure | None) -> jax.Array | None:
    return None if query is None else visible(query, key)[:, None, :, None]


def _where_seen(mask, attended, unseen, operand):
    """`attended` of the operand, or `unseen` of it, which costs nothing, where no query of a block sees any key."""
    if mask is None:
        return attended(operand)
    return jax.lax.cond(jnp.any(mask), attended, unseen, operand)


def _where(mask, x, other):
    return x if mask is None else jnp.where(mask, x, other)


def _scores(query_BLKGH, key_BSKH, mask, scale):
    """[B, K, L, G, S]."""
    return _where(mask, scale * _product(query_BLKGH, key_BSKH, (4, 3), ((0, 2), (0, 2))), _MASKED)


def _split(arrays: Any, side: int) -> Any:
    """[B, L, ...] -> [L / side, B, side, ...], padded with zeros (segment 0)."""

    def one(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % side)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, side, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, arrays)


def _join(blocks: Any, length: int) -> Any:
    """What `_split` split."""

    def one(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(one, blocks)


def _loop(step: Callable[[Any, Any], tuple[Any, Any]], start: Any, blocks: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`; one block is no loop."""
    if jax.tree.leaves(blocks)[0].shape[0] > 1:
        return jax.lax.scan(step, start, blocks)
    state, out = step(start, jax.tree.map(lambda x: x[0], blocks))
    return state, jax.tree.map(lambda x: x[None], out)
