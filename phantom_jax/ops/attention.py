"""Attention behind one entry."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from phantom_jax.ops import blockwise, cudnn
from phantom_jax.ops.backends import check_backend, check_rows, check_tokens, honoured
from phantom_jax.ops.partition import WHOLE, mesh_axes, parts, repeat_heads
from phantom_jax.ops.structure import Structure

OUTPUT = "attention"
"""Under this name the backward pass finds attention's output, where it is kept, see `jax.checkpoint_policies`."""


def attention(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKE: jax.Array,
    *,
    scale: float,
    query_structure: Structure | None = None,
    key_structure: Structure | None = None,
    backend: str = "xla",
    split: PartitionSpec = WHOLE,
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
      split: mesh axes of the queries' rows, tokens and heads: each device computes its own. Queries of a row that is
        split stay where they are, and keys and values of whole rows are sent to all: few heads, of which causal
        attention needs not less than half.
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
    _, length, heads, head_dim = query_BLNH.shape
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
        check_tokens(backend, length, key_BSKH.shape[1], parts(split[1]))
        return _kernel(query_BLNH, key_BSKH, value_BSKE, query_structure, scale, backend, split)
    side = chunk if backend == "chunked" else None
    local = functools.partial(_local, scale=scale, side=side)
    rows, tokens, head_axes = split
    manual = {axis for target in split for axis in mesh_axes(target)}
    if manual:
        key_BSKH, value_BSKE = (repeat_heads(x, parts(head_axes)) for x in (key_BSKH, value_BSKE))
        if tokens:
            # Their gradients are sums over devices: in float32, which XLA for CPUs needs, or it ends the process.
            key_BSKH, value_BSKE = (x.astype(jnp.float32) for x in (key_BSKH, value_BSKE))
        query_spec, key_spec = PartitionSpec(rows, tokens, head_axes, None), PartitionSpec(rows, None, head_axes, None)
        local = jax.shard_map(
            local,
            in_specs=(query_spec, key_spec, key_spec, PartitionSpec(rows, tokens), PartitionSpec(rows, None)),
            out_specs=query_spec,
            axis_names=manual,
            # Loops over blocks begin with constants, which are the same everywhere as their results are not.
            check_vma=False,
        )
    return local(query_BLNH, key_BSKH, value_BSKE, query_structure, key_structure)


def _local(query_BLNH, key_BSKH, value_BSKE, query_structure, key_structure, *, scale, side):
    """The part of one device."""
    batch, length, heads, width = query_BLNH.shape
    kv_heads = key_BSKH.shape[2]
    key_BSKH, value_BSKE = (x.astype(query_BLNH.dtype) for x in (key_BSKH, value_BSKE))
    out = blockwise.attend(
        query_BLNH.reshape(batch, length, kv_heads, heads // kv_heads, width),
        key_BSKH,
        value_BSKE,
        query_structure,
        key_structure,
        scale=scale,
        side=side,
        name=OUTPUT,
    )
    return out.reshape(batch, length, heads, value_BSKE.shape[3])


def _kernel(query_BLNH, key_BLKH, value_BLKE, structure, scale, backend, split):
    segments = None if structure is None else structure.segment_ids
    if backend == "splash":
        from phantom_jax.ops import splash  # loads Pallas, which nobody else needs

        out = splash.attend(query_BLNH, key_BLKH, value_BLKE, segments, scale=scale, split=split, name=OUTPUT)
    else:
        real = None if segments is None else segments > 0
        out = cudnn.attend(query_BLNH, key_BLKH, value_BLKE, real, scale=scale, split=split)
        out = checkpoint_name(out, OUTPUT)
    out = out.astype(jnp.float32)
    if structure is None:
        return out
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(structure)):
        check_rows(backend, structure.segment_ids, structure.branch_ids)
    rows = honoured(backend, structure.segment_ids, structure.branch_ids)
    return jnp.where(rows[:, None, None, None], out, jnp.nan)
