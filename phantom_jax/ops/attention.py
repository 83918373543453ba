"""Attention behind one entry. Who sees whom is structure (positions, segments, branches), never a mask array."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from phantom_jax.ops import cudnn
from phantom_jax.ops.backends import check_backend, check_rows, check_tokens, honoured
from phantom_jax.ops.partition import TOKENS, size

OUTPUT = "attention"
"""Under this name the backward pass finds attention's output, where it is kept, see `jax.checkpoint_policies`."""
# Large enough to vanish in a softmax, finite so that a row without keys gives zeros and not NaN.
_MASKED = -1e30


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["positions", "segment_ids", "branch_ids"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Structure:
    """Where tokens stand. A query sees a key of its own segment at no later position, in branch 0 or its own branch.

    Attributes:
      positions: [B, L] int32 within one conversation.
      segment_ids: [B, L] int32, 0 is padding and sees and is seen by nothing.
      branch_ids: [B, L] int32, 0 is the prefix shared by the segment's branches.
    """

    positions: jax.Array
    segment_ids: jax.Array
    branch_ids: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.positions.shape


def attention(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKE: jax.Array,
    *,
    scale: float,
    query_structure: Structure | None = None,
    key_structure: Structure | None = None,
    backend: str = "xla",
    chunk: int = 512,
) -> jax.Array:
    """Grouped-query attention with float32 softmax and accumulation.

    Args:
      query_BLNH: [B, L, N, H].
      key_BSKH: [B, S, K, H]; N is a multiple of K.
      value_BSKE: [B, S, K, E]; E may differ from H.
      scale: factor on the scores.
      query_structure, key_structure: [B, L] and [B, S]; both None means that everything sees everything (vision).
      backend: `xla` holds scores [B, N, L, S]; `chunked` never holds more than [B, N, chunk, chunk] of them, forward
        and backward; `splash` and `cudnn` are kernels of a TPU and a GPU, see `ops.backends` for what they take.
      chunk: side of a block of scores, `chunked` only.

    Returns:
      [B, L, N, E] float32: what follows (the phantom gate) needs the precision. The kernels round to the inputs' dtype
      first. Zeros where a query sees no key. A row that the backend cannot honour is refused where its structure is
      known, and NaN in a program that is compiled, where it is not.

    Raises:
      InputError: the backend does not exist, does not run here, or cannot honour the heads or the structure.
      ValueError: the shapes or structures do not fit one another.
    """
    check_backend(backend, query_BLNH.dtype, query_BLNH.shape[3])
    batch, length, heads, head_dim = query_BLNH.shape
    kv_heads = key_BSKH.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key-value heads")
    if key_BSKH.shape[3] != head_dim or value_BSKE.shape[:3] != key_BSKH.shape[:3]:
        raise ValueError(f"query {query_BLNH.shape}, key {key_BSKH.shape} and value {value_BSKE.shape} do not fit")
    if (query_structure is None) != (key_structure is None):
        raise ValueError("give a structure for queries and keys, or for neither")
    if query_structure is not None:
        for what, structure, tensor in (("query", query_structure, query_BLNH), ("key", key_structure, key_BSKH)):
            if structure.shape != tensor.shape[:2]:
                raise ValueError(f"{what} structure {structure.shape} does not fit {what} {tensor.shape}")
    if backend in ("splash", "cudnn"):
        check_tokens(backend, length, key_BSKH.shape[1], size(TOKENS))
        return _kernel(query_BLNH, key_BSKH, value_BSKE, query_structure, scale, backend)
    query_BLKGH = query_BLNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    if backend == "chunked":
        out = _chunked(query_BLKGH, key_BSKH, value_BSKE, query_structure, key_structure, scale, chunk)
    else:
        out = _xla(query_BLKGH, key_BSKH, value_BSKE, query_structure, key_structure, scale)
    return checkpoint_name(out.reshape(batch, length, heads, value_BSKE.shape[3]), OUTPUT)


def _kernel(query_BLNH, key_BLKH, value_BLKE, structure, scale, backend):
    segments = None if structure is None else structure.segment_ids
    if backend == "splash":
        from phantom_jax.ops import splash  # loads Pallas, which nobody else needs

        out = splash.attend(query_BLNH, key_BLKH, value_BLKE, segments, scale=scale, name=OUTPUT)
    else:
        real = None if segments is None else segments > 0
        out = checkpoint_name(cudnn.attend(query_BLNH, key_BLKH, value_BLKE, real, scale=scale), OUTPUT)
    out = out.astype(jnp.float32)
    if structure is None:
        return out
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(structure)):
        check_rows(backend, structure.segment_ids, structure.branch_ids)
    rows = honoured(backend, structure.segment_ids, structure.branch_ids)
    return jnp.where(rows[:, None, None, None], out, jnp.nan)


def visible(query: Structure, key: Structure) -> jax.Array:
    """bool [B, L, S]: which query sees which key."""
    same_segment = (query.segment_ids[:, :, None] == key.segment_ids[:, None, :]) & (key.segment_ids > 0)[:, None, :]
    not_later = key.positions[:, None, :] <= query.positions[:, :, None]
    branch = key.branch_ids[:, None, :]
    return same_segment & not_later & ((branch == 0) | (branch == query.branch_ids[:, :, None]))


def _scores(query_BLKGH, key_BSKH, query_structure, key_structure, scale):
    scores = jnp.einsum("blkgh,bskh->bkgls", query_BLKGH, key_BSKH, preferred_element_type=jnp.float32) * scale
    if query_structure is None:
        return scores, jnp.ones((1, 1, 1, 1, 1), bool)
    mask = visible(query_structure, key_structure)[:, None, None]
    return jnp.where(mask, scores, _MASKED), mask


def _xla(query_BLKGH, key_BSKH, value_BSKE, query_structure, key_structure, scale):
    scores, mask = _scores(query_BLKGH, key_BSKH, query_structure, key_structure, scale)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = (weights / total).astype(value_BSKE.dtype)
    return jnp.einsum("bkgls,bske->blkge", weights, value_BSKE, preferred_element_type=jnp.float32)


def _split(x, chunk):
    """[B, L, ...] -> [L / chunk, B, chunk, ...], padded with zeros (segment 0)."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _chunked(query_BLKGH, key_BSKH, value_BSKE, query_structure, key_structure, scale, chunk):
    """Online softmax over blocks. Both loops recompute their body in the backward pass, so no block is kept."""
    batch, length, kv_heads, groups, _ = query_BLKGH.shape
    if query_structure is None:
        # Everything sees everything, but for the padding that fills the last block.
        zeros_BL = jnp.zeros((batch, length), jnp.int32)
        zeros_BS = jnp.zeros(key_BSKH.shape[:2], jnp.int32)
        query_structure = Structure(zeros_BL, zeros_BL + 1, zeros_BL)
        key_structure = Structure(zeros_BS, zeros_BS + 1, zeros_BS)
    split = functools.partial(_split, chunk=min(chunk, length))
    split_keys = functools.partial(_split, chunk=min(chunk, key_BSKH.shape[1]))
    keys = split_keys(key_BSKH), split_keys(value_BSKE), jax.tree.map(split_keys, key_structure)

    def one_key_block(state, block, query, structure):
        peak, total, out = state
        key, value, key_block = block
        scores, mask = _scores(query, key, structure, key_block, scale)
        new_peak = jnp.maximum(peak, jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
        weights = jnp.where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
        keep = jnp.exp(peak - new_peak)
        update = jnp.einsum("bkgls,bske->bkgle", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (new_peak, total * keep + jnp.sum(weights, axis=-1), out * keep[..., None] + update), None

    @jax.checkpoint
    def one_query_block(block):
        query, structure = block
        shape = (batch, kv_heads, groups, query.shape[1])
        start = (
            jnp.full(shape, _MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, value_BSKE.shape[3]), jnp.float32),
        )
        step = jax.checkpoint(functools.partial(one_key_block, query=query, structure=structure))
        (_, total, out), _ = jax.lax.scan(step, start, keys)
        return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]

    out = jax.lax.map(one_query_block, (split(query_BLKGH), jax.tree.map(split, query_structure)))
    out = jnp.moveaxis(out, 0, 3)  # [B, K, G, blocks, chunk, E]
    out = out.reshape(batch, kv_heads, groups, -1, out.shape[-1])[:, :, :, :length]
    return jnp.transpose(out, (0, 3, 1, 2, 4))
