"""cuDNN's fused attention on NVIDIA GPUs, through JAX's own function.

It is called with neither mask nor bias: a mask becomes a bias of [B, N, L, L] in memory. Causal order alone is the
rule of `ops.attention` for rows of one conversation with its padding behind it: no token sees padding.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from phantom_jax.ops.partition import free_axes, parts, repeat_heads


def attend(
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    value_BLKE: jax.Array,
    real_BL: jax.Array | None,
    *,
    scale: float,
    split: PartitionSpec,
) -> jax.Array:
    """Attention of the tokens of each row to themselves, `flash` forward and backward.

    Args:
      query_BLNH, key_BLKH: bfloat16 or float16.
      value_BLKE: of any width.
      real_BL: bool, causal and False at padding, which is behind the tokens; None lets everything see everything.
      scale: factor on the scores.
      split: mesh axes of the queries' rows, tokens (none) and heads.

    Returns:
      [B, L, N, E] in the inputs' dtype: accumulated in float32 and rounded once, so that 8 bits of each value are
      left in bfloat16. A phantom half is rounded by itself and is not lost beside the plain one. Zeros at padding.
    """
    free, (rows, _, heads) = free_axes(), split
    key_BLKH, value_BLKE = (repeat_heads(x, parts(heads)) for x in (key_BLKH, value_BLKE))

    def local(query, key, value):
        arguments = equal_widths(query, key, value)
        out = jax.nn.dot_product_attention(
            *arguments, scale=scale, is_causal=real_BL is not None, implementation="cudnn"
        )
        return joined(out, query.shape[2], value.shape[3])

    if free:
        # cuDNN calls have a partitioning of their own, which refuses heads that are split one way in queries and
        # another way in keys.
        spec = PartitionSpec(rows, None, heads, None)
        local = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, axis_names=free, check_vma=False)
    out = local(query_BLNH, key_BLKH, value_BLKE)
    return out if real_BL is None else jnp.where(real_BL[:, :, None, None], out, 0)


def equal_widths(query_BLNH: jax.Array, key_BLKH: jax.Array, value_BLKE: jax.Array) -> tuple[jax.Array, ...]:
    """The same attention with values as wide as keys, which is all that cuDNN takes.

    Wider values are cut into parts of the keys' width, each of which becomes more heads with the same queries and
    keys: values [v, y_v] of keys [k] are twice the heads at the width that the plain model has. The last part is
    filled up with zeros. Exact; `joined` undoes it.
    """
    width = key_BLKH.shape[3]
    parts = -(-value_BLKE.shape[3] // width)
    value_BLKE = jnp.pad(value_BLKE, [(0, 0)] * 3 + [(0, parts * width - value_BLKE.shape[3])])
    if parts == 1:
        return query_BLNH, key_BLKH, value_BLKE
    tiles = (1, 1, parts, 1)
    values = jnp.concatenate(jnp.split(value_BLKE, parts, axis=3), axis=2)
    return jnp.tile(query_BLNH, tiles), jnp.tile(key_BLKH, tiles), values


def joined(out_BLNH: jax.Array, heads: int, width: int) -> jax.Array:
    """[B, L, heads, width] of what attention gives for `equal_widths`."""
    parts = out_BLNH.shape[2] // heads
    return jnp.concatenate(jnp.split(out_BLNH, parts, axis=2), axis=3)[..., :width]
