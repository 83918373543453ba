"""Beam search over the branches of a row, with the rules of transformers' (greedy and sampled).

A step ranks all continuations of all beams. Of the best K, those that end are entered among the finished answers, by
log-probability / length ** length_penalty; the best K that do not end run on. Every row goes by itself: what others do
changes nothing in it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from phantom_jax.generation import sampling
from phantom_jax.generation.controls import Controls

# The score of a beam that is none: lower than any log-probability, finite so that differences stay numbers.
_NONE = -1e9


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["running", "tokens", "lengths", "scores", "finished", "improvable"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Beams:
    """What a beam search holds besides its running tokens.

    Attributes:
      running: [B, K] float32, summed log-probabilities of the running beams.
      tokens: [B, K, T] int32, finished answers with the best one first.
      lengths: [B, K] int32, their tokens, the end included.
      scores: [B, K] float32, their ranks.
      finished: [B, K] bool, which of them exist.
      improvable: [B] bool, whether a running beam may still become better than a finished one.
    """

    running: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finished: jax.Array
    improvable: jax.Array


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The best C continuations of a row, best one first.

    Attributes:
      scores: [B, C] float32, summed log-probabilities.
      parents: [B, C] int32, the beam that each continues.
      last: [B, C] int32, the token that it adds.
      tokens: [B, C, T] int32, all its tokens.
    """

    scores: jax.Array
    parents: jax.Array
    last: jax.Array
    tokens: jax.Array


def start(rows: int, beams: int, new_slots: int, controls: Controls) -> Beams:
    """Before the first token: all beams are equal, so that only the first one counts."""
    return Beams(
        running=jnp.full((rows, beams), _NONE, jnp.float32).at[:, 0].set(0.0),
        tokens=jnp.full((rows, beams, new_slots), controls.pad_id, jnp.int32),
        lengths=jnp.zeros((rows, beams), jnp.int32),
        scores=jnp.full((rows, beams), _NONE, jnp.float32),
        finished=jnp.zeros((rows, beams), bool),
        improvable=jnp.ones((rows,), bool),
    )


def candidates(scores_BKV, beams: Beams, tokens_BKT, step, controls: Controls) -> Candidates:
    """The best continuations, or sampled ones where there is a temperature.

    There are so many that K of them do not end, whatever the number of end tokens.
    """
    rows, width, vocabulary = scores_BKV.shape
    scores = (scores_BKV + beams.running[:, :, None]).reshape(rows, -1)
    count = min((1 + controls.end_ids.shape[0]) * width, scores.shape[1])
    if controls.temperature is None:
        scores, index = jax.lax.top_k(scores, count)
    else:
        # The largest of scores + Gumbel noise are a sample without replacement.
        noise = sampling.gumbel(controls, step, width, vocabulary).reshape(rows, -1)
        index = jax.lax.top_k(scores + noise, count)[1]
        scores = jnp.take_along_axis(scores, index, axis=1)
        # As many are drawn as there are end tokens in truth; the more are drawn, the greedier is what is kept of them.
        drawn = (1 + jnp.maximum(1, jnp.sum(controls.end_ids < vocabulary))) * width
        scores = jnp.where(jnp.arange(count)[None] < drawn, scores, _NONE)
    parents, last = index // vocabulary, index % vocabulary
    tokens = jnp.take_along_axis(tokens_BKT, parents[:, :, None], axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, last[:, :, None], step, axis=2)
    return Candidates(scores, parents, last, tokens)


def select(
    candidates: Candidates, ended_BC, beams: Beams, done_B, length, controls: Controls
) -> tuple[Beams, jax.Array, jax.Array]:
    """Sorts the candidates into finished answers and running beams.

    Args:
      candidates: of this step.
      ended_BC: bool, which of them are whole answers.
      beams: before this step.
      done_B: bool, rows that had ended before: nothing changes in them.
      length: int32 scalar, tokens of every candidate.
      controls: `length_penalty`, `early_stopping` and `max_new_tokens` are read.

    Returns:
      Beams after this step; which candidates run on [B, K] int32; which rows have ended [B] bool.
    """
    width = beams.running.shape[1]
    running, chosen = jax.lax.top_k(jnp.where(ended_BC, _NONE, candidates.scores), width)

    at_once = controls.early_stopping == 1
    full = jnp.all(beams.finished, axis=1) & at_once
    # Candidates beyond the best K are there to keep K beams running, they are no answers.
    entering = ended_BC[:, :width] & (beams.improvable & ~full & ~done_B)[:, None]
    # A continuation of a beam that is none is no answer.
    entering &= candidates.scores[:, :width] > _NONE / 2
    scores = candidates.scores[:, :width] / length.astype(jnp.float32) ** controls.length_penalty
    merged = jnp.concatenate([beams.scores, jnp.where(entering, scores, _NONE)], axis=1)
    scores, index = jax.lax.top_k(merged, width)

    def merge(old, new):
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, index.reshape(index.shape + (1,) * (both.ndim - 2)), axis=1)

    finished = merge(beams.finished, entering)
    longest = jnp.where((controls.early_stopping == 2) & (controls.length_penalty > 0), controls.max_new_tokens, length)
    best = running[:, 0] / longest.astype(jnp.float32) ** controls.length_penalty
    improvable = beams.improvable & (~jnp.all(finished, axis=1) | (best > jnp.min(scores, axis=1)))
    done = done_B | ~improvable | (jnp.all(finished, axis=1) & at_once) | jnp.all(ended_BC, axis=1)
    after = Beams(
        running=running,
        tokens=merge(beams.tokens, candidates.tokens[:, :width]),
        lengths=merge(beams.lengths, jnp.full_like(beams.lengths, length)),
        scores=scores,
        finished=finished,
        improvable=improvable,
    )
    return after, chosen, done
