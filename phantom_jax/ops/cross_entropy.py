"""Log-probabilities of targets without the logits of a whole batch, which would be its largest array by far."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from phantom_jax.batch import IGNORE
from phantom_jax.ops.partition import mesh_axes

_MOST_TOKENS = 1024
_MOST_LOGITS = 2**27  # half a GiB in float32


def target_scores(
    logits: Callable[[Any, jax.Array], jax.Array],
    weights: Any,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    *,
    vocabulary: int,
    split: PartitionSpec,
    most_logits: int = _MOST_LOGITS,
) -> tuple[jax.Array, jax.Array]:
    """How likely each target is, chunk by chunk of tokens; the backward pass computes each chunk again.

    A device holds the logits of at most 1024 tokens, fewer with a large vocabulary, and at least of one token a row.
    Chunks are cut along L on each device, so hidden states stay where they are. The gradient of the weights is summed
    over the chunks in the weights' dtype, over devices once at the end.

    Args:
      logits: gives [b, l, V] float32 for the weights and hidden states [b, l, D]. Pure.
      weights: arrays, for `logits`; on a mesh every row's device sees them whole, along `tensor` as they are split.
      hidden_BLD: after the final norm.
      targets_BL: int32, `IGNORE` where there is none.
      vocabulary: V.
      split: mesh axes of rows and of tokens.
      most_logits: of one chunk on one device.

    Returns:
      Log-probabilities [B, L] float32, 0 where there is no target; and whether the target is the most likely token,
      the first of equals, [B, L] bool, True where there is no target.
    """
    most_tokens = min(_MOST_TOKENS, max(1, most_logits // vocabulary))
    local = functools.partial(_scan_chunks, logits, most_tokens=most_tokens)
    manual = {axis for target in split for axis in mesh_axes(target)}
    if manual:
        rows, tokens = split
        both = PartitionSpec(rows, tokens)
        local = jax.shard_map(
            local,
            in_specs=(PartitionSpec(), PartitionSpec(rows, tokens, None), both),
            out_specs=(both, both),
            axis_names=manual,
            check_vma=False,
        )
    return local(weights, hidden_BLD, targets_BL)


def _scan_chunks(logits, weights, hidden_BLD, targets_BL, most_tokens):
    batch, length, _ = hidden_BLD.shape
    count = -(-length // max(1, most_tokens // batch))
    if count == 1:
        return _scores(logits(weights, hidden_BLD), targets_BL)
    chunk = -(-length // count)

    def cut(x, fill):
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]

    # Inside a loop nothing merges the two computations of a chunk, so nothing must be done to prevent it.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(hidden, targets):
        return _scores(logits(weights, hidden), targets)

    _, scores = jax.lax.scan(
        lambda _, chunk: (None, one_chunk(*chunk)), None, (cut(hidden_BLD, 0), cut(targets_BL, IGNORE))
    )
    return tuple(map(join, scores))


def _scores(logits_BLV, targets_BL):
    # Sums over the vocabulary alone, which a device can do for its part of it; an index into it would gather all.
    present = targets_BL != IGNORE
    token = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2)
    target = targets_BL[:, :, None]
    chosen = jnp.sum(jnp.where(token == target, logits_BLV, 0.0), axis=-1)
    log_probs = jnp.where(present, chosen - jax.nn.logsumexp(logits_BLV, axis=-1), 0.0)
    better = logits_BLV > chosen[:, :, None]
    better |= (logits_BLV == chosen[:, :, None]) & (token < target)
    return log_probs, ~(present & jnp.any(better, axis=-1))
