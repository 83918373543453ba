"""From logits to tokens: penalties, temperature, nucleus and top-k, and noise that belongs to a prompt alone.

Rules run in the order of transformers: repetition penalty, minimum length, temperature, top-k, top-p.
"""

import jax
import jax.numpy as jnp

from phantom_jax.generation.controls import Controls


def adjust(scores_BKV: jax.Array, seen_BKV: jax.Array | None, step: jax.Array, controls: Controls) -> jax.Array:
    """Scores (logits or log-probabilities) float32 after all rules; what is ruled out is -inf.

    Args:
      scores_BKV: of each token of the vocabulary, for each branch k of each row.
      seen_BKV: bool, the tokens of prompt and answer so far; None without a repetition penalty.
      step: int32 scalar, tokens of the answer so far.
      controls: the rules.
    """
    scores = scores_BKV.astype(jnp.float32)
    if seen_BKV is not None:
        penalty = controls.repetition_penalty
        scores = jnp.where(seen_BKV, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    ended = jnp.where(step < controls.min_new_tokens, -jnp.inf, 0.0)
    scores = scores.at[:, :, controls.end_ids].add(ended, mode="drop")
    if controls.temperature is None:
        return scores
    scores = scores / controls.temperature
    if controls.top_k is not None:
        keys = _ordered(scores)
        kept = keys >= _threshold(keys, jnp.ones_like(scores), controls.top_k.astype(jnp.float32))
        scores = jnp.where(kept, scores, -jnp.inf)
    if controls.top_p is not None:
        keys = _ordered(scores)
        kept = keys >= _threshold(keys, jax.nn.softmax(scores, axis=-1), controls.top_p)
        scores = jnp.where(kept, scores, -jnp.inf)
    return scores


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _threshold(keys: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """[..., 1], the largest key such that the weights of all keys not below it sum to `target` or more.

    Found bit by bit: 32 sums over the vocabulary cost less than sorting it, and stay sums where it is sharded.
    """

    def set_bit(index, key):
        candidate = key | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        total = jnp.sum(jnp.where(keys >= candidate, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(total >= target, candidate, key)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((*keys.shape[:-1], 1), jnp.uint32))


def gumbel(controls: Controls, step: jax.Array, branches: int, size: int) -> jax.Array:
    """[B, branches, size] noise whose argmax over scores + noise is a sample (Gumbel-max).

    It depends on the row's seed, the branch and the step alone, so that a batch changes no answer.
    """

    def one(seed, branch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), branch), step)
        return jax.random.gumbel(key, (size,))

    over_branches = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_branches, in_axes=(0, None))(controls.seeds, jnp.arange(branches))


def choose(scores_BKV: jax.Array, step: jax.Array, controls: Controls) -> jax.Array:
    """Tokens [B, K] int32: the most likely ones, or sampled ones where there is a temperature."""
    if controls.temperature is not None:
        scores_BKV = scores_BKV + gumbel(controls, step, *scores_BKV.shape[1:])
    return jnp.argmax(scores_BKV, axis=-1).astype(jnp.int32)
