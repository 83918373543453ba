"""Splash attention, the Pallas kernel for TPUs that comes with JAX: no scores in memory, values of any width.

Tokens see the tokens of their own segment that stand in front of them in the row. In rows without branches that is
the rule of `ops.attention`: positions of a conversation rise along its row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from phantom_jax.ops.partition import free_axes, parts, repeat_heads

_BLOCKS = (512, 384, 256, 128)
_MOST_PADDING = 1.125


def attend(
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    value_BLKE: jax.Array,
    segment_ids_BL: jax.Array | None,
    *,
    scale: float,
    split: PartitionSpec,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of the tokens of each row to themselves.

    Keys of a row that is split over devices are gathered; the last device has most to do, as it sees most keys.

    Args:
      query_BLNH, key_BLKH, value_BLKE: any widths.
      segment_ids_BL: causal within segments, 0 is padding; None lets everything see everything.
      scale: factor on the scores.
      split: mesh axes of the queries' rows, tokens and heads.
      name: under which the backward pass's needs can be kept, see `jax.checkpoint_policies`.
      interpret: run on any platform, slowly.

    Returns:
      [B, L, N, E] in the queries' dtype: the kernel accumulates in float32 and rounds once. Zeros at padding.
    """
    batch, length, query_heads, _ = query_BLNH.shape
    free, (rows, tokens, heads), seq = free_axes(), split, parts(split[1])
    key_BLKH, value_BLKE = (repeat_heads(x, parts(heads)) for x in (key_BLKH, value_BLKE))
    block = _block(length, seq)
    padding = -length % (block * seq)
    causal = segment_ids_BL is not None
    if padding and not causal:
        segment_ids_BL = jnp.ones((batch, length), jnp.int32)
    if padding:
        query_BLNH, key_BLKH, value_BLKE, segment_ids_BL = (
            jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            for x in (query_BLNH, key_BLKH, value_BLKE, segment_ids_BL)
        )
    kernel = _kernel(query_heads // parts(heads), length + padding, block, causal, seq, name, interpret)
    query_BLNH = (query_BLNH * scale).astype(query_BLNH.dtype)
    arguments = (kernel, query_BLNH, key_BLKH, value_BLKE, segment_ids_BL, segment_ids_BL)
    if not free:
        out = _local(*arguments)
    else:
        mesh = jax.sharding.get_abstract_mesh()
        specs = (
            kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, tokens))),
            PartitionSpec(rows, tokens, heads, None),
            PartitionSpec(rows, None, heads, None),
            PartitionSpec(rows, None, heads, None),
            PartitionSpec(rows, tokens),
            PartitionSpec(rows, None),
        )
        if segment_ids_BL is None:
            specs = (*specs[:4], None, None)
        # Splitting by hand leaves no axis to the compiler, which cannot split a kernel, not even over one device.
        # Pallas calls do not say over which axes their results vary, so that cannot be checked.
        out = jax.shard_map(_local, in_specs=specs, out_specs=specs[1], axis_names=free, check_vma=False)(*arguments)
    return out[:, :length]


def _local(kernel, query_BLNH, key_BSKH, value_BSKE, query_segments_BL, key_segments_BS):
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    query, key, value = heads_first(query_BLNH), heads_first(key_BSKH), heads_first(value_BSKE)
    if query_segments_BL is None:
        return heads_first(jax.vmap(kernel)(query, key, value))
    segments = splash.SegmentIds(q=query_segments_BL, kv=key_segments_BS)
    out = heads_first(jax.vmap(kernel)(query, key, value, segments))
    # Padding sees itself: every row of the softmax has a key, and nothing real sees it.
    return jnp.where((query_segments_BL > 0)[:, :, None, None], out, 0)


def _kernel(heads, length, block, causal, seq, name, interpret):
    mask = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=seq,
        residual_checkpoint_name=name,
        interpret=interpret,
    )


def _block(length: int, seq: int) -> int:
    """The largest side of a block that pads rows by little; large ones are faster, and 512 fits every TPU."""
    for block in _BLOCKS:
        if -(-length // (block * seq)) * block * seq <= _MOST_PADDING * length:
            return block
    return _BLOCKS[-1]
