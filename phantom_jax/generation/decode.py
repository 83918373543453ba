"""Greedy generation: one prefill, then a `lax.while_loop` that never recomputes an old token."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phantom_jax.generation.cache import empty_cache
from phantom_jax.models.vlm import VisionLanguageModel


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_ids", "pad_id", "rope_length"))
def greedy(
    model: VisionLanguageModel,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    rope_length: int,
) -> jax.Array:
    """The most likely continuation of each row.

    Args:
      model: a bare module.
      params: its parameters.
      batch: prompts of mixed lengths, LEFT padded (segment 0) to one length L; pixels normalised.
      max_new_tokens: where a row ends that no end token ended.
      eos_ids: tokens that end a row.
      pad_id: what follows an end token.
      rope_length: longest prompt of the batch plus `max_new_tokens`; static.

    Returns:
      [B, max_new_tokens] int32, the end token included.
    """
    variables = {"params": params}
    rows, length = batch["token_ids"].shape
    # The last new token is returned and never fed back.
    cache = empty_cache(model.config.language_model, rows, length + max_new_tokens - 1, model.dtype)

    def advance(inputs, cache):
        output = model.apply(variables, inputs, rope_length=rope_length, cache=cache, method="hidden_states")
        logits = model.apply(variables, output.hidden[:, -1:], method="logits")
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), output.cache

    def keep_going(state):
        step, _, done, _, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def one_token(state):
        step, token, done, position, tokens, cache = state
        inputs = {
            "token_ids": token[:, None],
            "positions": position[:, None],
            "segment_ids": jnp.ones((rows, 1), jnp.int32),
        }
        following, cache = advance(inputs, cache)
        following = jnp.where(done, pad_id, following)
        tokens = jax.lax.dynamic_update_slice(tokens, following[:, None], (0, step))
        return step + 1, following, done | is_eos(following), position + 1, tokens, cache

    def is_eos(token):
        return functools.reduce(jnp.logical_or, [token == eos for eos in eos_ids], jnp.zeros((rows,), bool))

    token, cache = advance(batch, cache)
    tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
    position = batch["positions"][:, -1] + 1
    # A row of padding alone has no answer to wait for.
    done = is_eos(token) | (batch["segment_ids"][:, -1] == 0)
    state = (jnp.ones((), jnp.int32), token, done, position, tokens, cache)
    return jax.lax.while_loop(keep_going, one_token, state)[4]
