"""Stop strings in a compiled loop: their automaton over bytes, lifted to whole tokens as one table."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.data.stop_strings import StopAutomaton, stop_automaton

STATES = 32
"""A table's rows are a multiple of this, so that most sets of stop strings share one compiled program."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["transitions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StopTable:
    """Where each token leads from each state. State 0 is the start.

    Attributes:
      transitions: [states, V] int8, or int16 for more than 128 states: the next state, or its bitwise complement (a
        negative number) where a stop string ends within the token.
    """

    transitions: np.ndarray | jax.Array


def stop_table(token_bytes: Sequence[bytes], stops: Sequence[str]) -> StopTable:
    """Lifts stop strings to tokens.

    Args:
      token_bytes: what each token adds to the text, by id.
      stops: strings of text; none is possible. Errors as in `stop_bytes`.
    """
    automaton = stop_automaton(stops)
    states = len(automaton.depth)
    rows = -states // STATES * -STATES
    transitions = np.zeros((rows, len(token_bytes)), np.int8 if rows <= 128 else np.int16)
    step = _remembering(automaton)
    # The longest first: those that have a byte at some place are then always the first so many.
    lengths = np.array([len(token) for token in token_bytes], np.intp)
    order = np.argsort(-lengths, kind="stable")
    places = np.arange(lengths.max(initial=0))
    counts = np.searchsorted(-lengths[order], -places, side="left")
    data = np.frombuffer(b"".join(token_bytes), np.uint8)
    begins = (np.cumsum(lengths) - lengths)[order]
    columns = [data[begins[:count] + place] for place, count in zip(places, counts, strict=True)]
    for state in range(states):
        offsets = np.full(len(token_bytes), 256 * state, np.intp)
        for column in columns:
            offsets[: len(column)] = step.take(offsets[: len(column)] + column)
        reached = offsets // 256
        transitions[state, order] = np.where(reached < states, reached, ~(reached - states))
    return StopTable(transitions)


def _remembering(automaton: StopAutomaton) -> np.ndarray:
    """The automaton twice over, the second copy entered at the first match and never left.

    Returns:
      [2 x states x 256] intp. States are numbered in steps of 256, so that state + byte is an index.
    """
    states = len(automaton.depth)
    matched = (automaton.found > 0)[automaton.next_state]
    first = automaton.next_state + np.where(matched, states, 0)
    return np.concatenate([first, automaton.next_state + states]).astype(np.intp).ravel() * 256


def advance(table: StopTable, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reads one token of each row.

    A token that the table does not know (a model's vocabulary may be padded beyond the tokenizer's) adds no text.

    Args:
      state: [...] int32, 0 at first.
      token: [...] int32.

    Returns:
      The next state [...] int32, and whether a stop string ends within the token [...] bool. After that the search
      goes on as if it had not been found, so that a caller may pass over what comes too early.
    """
    known = (token >= 0) & (token < table.transitions.shape[1])
    entry = jnp.asarray(table.transitions)[state, jnp.where(known, token, 0)].astype(jnp.int32)
    matched = known & (entry < 0)
    return jnp.where(known, jnp.where(matched, ~entry, entry), state), matched
