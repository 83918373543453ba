"""The compiled loop: one prefill, then a `lax.while_loop` in which every token is computed once.

`start` reads the prompts and picks the first tokens, `advance` goes on up to a step that is data, so that one program
serves streaming (one step a call) and everything else (all steps in one call). Several answers of a prompt, samples or
beams, are branches of its row: the prompt's keys and values are there once.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phantom_jax.generation import beam, sampling, stops
from phantom_jax.generation.beam import Beams
from phantom_jax.generation.controls import Controls
from phantom_jax.generation.slots import over_tokens, reorder_branches
from phantom_jax.models.cache import Cache
from phantom_jax.models.phantom import PhantomStates
from phantom_jax.models.vlm import VisionLanguageModel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "tokens", "lengths", "done", "positions", "cache", "stop_states", "seen", "beams"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """A batch of B prompts on its way, with K branches each.

    Attributes:
      step: int32 scalar, tokens that every branch that is not done has.
      tokens: [B, K, T] int32, the answers (of a beam search: the running beams).
      lengths: [B, K] int32, tokens of each answer, its end included.
      done: [B, K] bool.
      positions: [B] int32, of each prompt's last token.
      cache: of all tokens but the last of each branch.
      stop_states: [B, K] int32 of `generation.stops`; None without stop strings.
      seen: [B, K, V] bool, tokens of prompt and answer; None without a repetition penalty.
      beams: what a beam search needs besides; None without one.
    """

    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    positions: jax.Array
    cache: Cache
    stop_states: jax.Array | None
    seen: jax.Array | None
    beams: Beams | None

    @property
    def answers(self) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, K, T] and lengths [B, K] of the answers; those of a beam search with the best one first."""
        if self.beams is not None:
            return self.beams.tokens, self.beams.lengths
        return self.tokens, self.lengths


@functools.partial(
    jax.jit,
    static_argnames=("model", "branches", "beam_search", "new_slots", "rope_length"),
    donate_argnames="cache",
)
def start(
    model: VisionLanguageModel,
    params: Any,
    cache: Cache,
    phantom: tuple[PhantomStates, ...] | None,
    batch: Mapping[str, jax.Array],
    features: jax.Array | None,
    controls: Controls,
    *,
    branches: int,
    beam_search: bool,
    new_slots: int,
    rope_length: int,
) -> State:
    """Reads the prompts and picks the first token of each branch.

    Args:
      model: a bare module with `scan_layers=False`.
      params: its parameters.
      cache: of B rows, with prefixes placed or empty, and room for L + new_slots * branches more tokens a row.
        Given up: its buffers become those of the state.
      phantom: states of the prompts' first token, of each layer; None gathers them from the prompts, which is
        right only where no prefix was placed, and serves a model without a phantom dimension.
      batch: the rest of the prompts, LEFT padded (segment 0) to one length L; pixels normalised.
      features: [B, F, D] of images in the rest of the prompts, in place of pixels; None where there are none.
      controls: what is asked for.
      branches: K.
      beam_search: whether the branches are beams.
      new_slots: T, at least as many as tokens will be asked for.
      rope_length: longest conversation, prompt and answer; static.
    """
    rows = batch["token_ids"].shape[0]
    cache = cache.with_phantom(phantom)
    logits_BLV, cache = _forward(model, params, batch, cache, rope_length, features=features, last=True)
    shape = (rows, branches)
    seen = controls.prompt_tokens
    # A row of padding alone has no answer to wait for.
    done = jnp.broadcast_to(batch["segment_ids"][:, -1:] == 0, shape)
    state = State(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((*shape, new_slots), controls.pad_id, jnp.int32),
        lengths=jnp.zeros(shape, jnp.int32),
        done=done,
        positions=batch["positions"][:, -1],
        cache=cache,
        stop_states=None if controls.stops is None else jnp.zeros(shape, jnp.int32),
        seen=None if seen is None else jnp.broadcast_to(seen[:, None], (*shape, seen.shape[-1])),
        beams=beam.start(rows, branches, new_slots, controls) if beam_search else None,
    )
    return _pick(jnp.broadcast_to(logits_BLV, (*shape, logits_BLV.shape[-1])), state, controls)


@functools.partial(jax.jit, static_argnames=("model", "rope_length"), donate_argnames="state")
def advance(
    model: VisionLanguageModel, params: Any, state: State, controls: Controls, limit: jax.Array, *, rope_length: int
) -> State:
    """Goes on until every answer has ended or has `limit` tokens."""
    rows, branches, _ = state.tokens.shape

    def keep_going(state):
        return (state.step < limit) & ~jnp.all(state.done)

    def one_token(state):
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        inputs = {
            "token_ids": last,
            "positions": jnp.broadcast_to((state.positions + state.step)[:, None], last.shape),
            "segment_ids": jnp.ones((rows, branches), jnp.int32),
            "branch_ids": jnp.broadcast_to(jnp.arange(1, branches + 1)[None], last.shape),
        }
        logits_BKV, cache = _forward(model, params, inputs, state.cache, rope_length)
        return _pick(logits_BKV, dataclasses.replace(state, cache=cache), controls)

    return jax.lax.while_loop(keep_going, one_token, state)


@functools.partial(jax.jit, static_argnames="new_slots")
def widen(state: State, pad_id: jax.Array, *, new_slots: int) -> State:
    """The state with room for answers of `new_slots` tokens."""
    branches = state.tokens.shape[1]
    more = new_slots - state.tokens.shape[2]

    def longer(tokens_BKT):
        return jnp.pad(tokens_BKT, ((0, 0), (0, 0), (0, more)), constant_values=pad_id)

    def grow(x):
        return jnp.pad(x, [(0, 0), (0, more * branches)] + [(0, 0)] * (x.ndim - 2))

    beams = state.beams
    if beams is not None:
        beams = dataclasses.replace(beams, tokens=longer(beams.tokens))
    return dataclasses.replace(state, tokens=longer(state.tokens), cache=over_tokens(grow, state.cache), beams=beams)


def _forward(model, params, inputs, cache, rope_length, features=None, last=False):
    """Logits of all tokens, or of the last one of each row alone, and the cache with the new tokens."""
    variables = {"params": params}
    output = model.apply(
        variables, inputs, rope_length=rope_length, cache=cache, features=features, method="hidden_states"
    )
    hidden = output.hidden[:, -1:] if last else output.hidden
    return model.apply(variables, hidden, method="logits"), output.cache


def _pick(logits_BKV: jax.Array, state: State, controls: Controls) -> State:
    """The state with one more token in each branch that is not done."""
    if state.beams is not None:
        return _pick_beams(logits_BKV, state, controls)
    scores = sampling.adjust(logits_BKV, state.seen, state.step, controls)
    token = jnp.where(state.done, controls.pad_id, sampling.choose(scores, state.step, controls))
    stop_states, ended = _ends(token, state.stop_states, state.step + 1, controls)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, :, None], state.step, axis=2),
        lengths=jnp.where(state.done, state.lengths, state.step + 1),
        done=state.done | ended | (state.step + 1 >= controls.max_new_tokens[:, None]),
        stop_states=stop_states,
        seen=_mark(state.seen, token),
    )


def _pick_beams(logits_BKV: jax.Array, state: State, controls: Controls) -> State:
    scores = sampling.adjust(jax.nn.log_softmax(logits_BKV, axis=-1), state.seen, state.step, controls)
    candidates = beam.candidates(scores, state.beams, state.tokens, state.step, controls)
    length = state.step + 1
    states = None if state.stop_states is None else jnp.take_along_axis(state.stop_states, candidates.parents, axis=1)
    states, ended = _ends(candidates.last, states, length, controls)
    ended |= length >= controls.max_new_tokens[:, None]
    beams, chosen, done = beam.select(candidates, ended, state.beams, state.done[:, 0], length, controls)
    parents = jnp.take_along_axis(candidates.parents, chosen, axis=1)
    tokens = jnp.take_along_axis(candidates.tokens, chosen[:, :, None], axis=1)
    token = jnp.take_along_axis(candidates.last, chosen, axis=1)
    seen = state.seen
    if seen is not None:
        seen = _mark(jnp.take_along_axis(seen, parents[:, :, None], axis=1), token)
    return dataclasses.replace(
        state,
        step=length,
        tokens=tokens,
        lengths=jnp.full_like(state.lengths, length),
        done=jnp.broadcast_to(done[:, None], state.done.shape),
        cache=reorder_branches(state.cache, parents, state.tokens.shape[2]),
        stop_states=None if states is None else jnp.take_along_axis(states, chosen, axis=1),
        seen=seen,
        beams=beams,
    )


def _ends(token, stop_states, length, controls):
    """The next states of the stop strings, and whether a token is the last of an answer of `length` tokens."""
    ended = jnp.any(token[..., None] == controls.end_ids[None, None], axis=-1)
    if stop_states is None:
        return None, ended
    stop_states, matched = stops.advance(controls.stops, stop_states, token)
    return stop_states, ended | (matched & (length > controls.min_new_tokens))


def _mark(seen_BKV, token_BK):
    if seen_BKV is None:
        return None
    rows, branches, _ = seen_BKV.shape
    return seen_BKV.at[jnp.arange(rows)[:, None], jnp.arange(branches)[None], token_BK].set(True)
