"""Stop strings: what may be one, and the automaton that finds them in a stream of bytes."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import tokenizers

from phantom_jax.errors import InputError

MAX_STOPS = 16
MAX_STOP_BYTES = 255
"""Of all stop strings together, so that their automaton has at most 256 states."""

_SHOWN = 8
"""Most special tokens that an error lists."""

_LIKE_A_SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>|</?s>")


def check_stops(stops: str | Sequence[str], tokenizer: tokenizers.Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sorts what an answer is to stop at into strings of text and ids of special tokens, which have no text.

    Args:
      stops: one stop or several. One that is exactly a special token of the tokenizer becomes its id.

    Raises:
      InputError: there are too many, one is not a string or is empty, one holds a special token beside other text or
        looks like a special token that the tokenizer does not have, or the strings are too long together.
    """
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise InputError(f"The stops are {stops!r}. Give a string or a list of strings.")
    if len(stops) > MAX_STOPS:
        raise InputError(f"There are {len(stops)} stops. Give at most {MAX_STOPS}.")
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    special = {token.content: token_id for token_id, token in added if token.special}
    with_text = {token.content for _, token in added if not token.special}
    strings = tuple(dict.fromkeys(stop for stop in stops if stop not in special))
    for stop in strings:
        if stop not in with_text and _LIKE_A_SPECIAL_TOKEN.fullmatch(stop):
            more = f" and {len(special) - _SHOWN} more" if len(special) > _SHOWN else ""
            raise InputError(
                f"The stop {stop!r} is no special token of this tokenizer: its special tokens are "
                f"{', '.join([*special][:_SHOWN]) or 'none'}{more}. Give one of these or plain text."
            )
        held = next((token for token in special if token in stop), None)
        if held is not None:
            raise InputError(
                f"The stop {stop!r} can never be found: the special token {held!r} has no text. Give {held!r} alone."
            )
    stop_bytes(strings)
    return strings, tuple(dict.fromkeys(special[stop] for stop in stops if stop in special))


def stop_bytes(stops: Sequence[str]) -> tuple[bytes, ...]:
    """The stop strings in UTF-8.

    Raises:
      InputError: one is empty or is no text, or they are longer than `MAX_STOP_BYTES` together.
    """
    try:
        encoded = tuple(stop.encode() for stop in stops)
    except UnicodeEncodeError as error:
        raise InputError(f"The stop {error.object!r} holds half a surrogate pair. Give whole characters.") from error
    if b"" in encoded:
        raise InputError("A stop is the empty string, which is everywhere. Leave it out.")
    total = sum(map(len, encoded))
    if total > MAX_STOP_BYTES:
        raise InputError(
            f"The stop strings have {total} bytes together; at most {MAX_STOP_BYTES} are possible. Give fewer or "
            "shorter ones."
        )
    return encoded


@dataclasses.dataclass(frozen=True)
class StopAutomaton:
    """Aho and Corasick's automaton: its state is the longest end of the text that some stop string begins with.

    State 0 is the start. All arrays are int32.

    Attributes:
      next_state: [states, 256], by the next byte.
      depth: [states], how many of the text's last bytes may yet become a stop string.
      found: [states], the length of the longest stop string that ends here; 0 where none does.
    """

    next_state: np.ndarray
    depth: np.ndarray
    found: np.ndarray


def stop_automaton(stops: Sequence[str]) -> StopAutomaton:
    """Builds the automaton, of at most `MAX_STOP_BYTES` + 1 states; errors as in `stop_bytes`.

    References:
      Aho and Corasick, Efficient string matching: an aid to bibliographic search, 1975.
    """
    children: list[dict[int, int]] = [{}]
    depth, found = [0], [0]
    for stop in stop_bytes(stops):
        state = 0
        for byte in stop:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                depth.append(depth[state] + 1)
                found.append(0)
            state = children[state][byte]
        found[state] = len(stop)
    next_state = np.zeros((len(children), 256), np.int32)
    fallback = [0] * len(children)
    # By depth, for a state's fallback is less deep and must be complete before it.
    for state in np.argsort(depth, kind="stable").tolist():
        next_state[state] = next_state[fallback[state]]
        found[state] = found[state] or found[fallback[state]]
        for byte, child in children[state].items():
            # The start itself has no shorter end to fall back to.
            fallback[child] = int(next_state[state, byte]) if state else 0
            next_state[state, byte] = child
    return StopAutomaton(next_state, np.array(depth, np.int32), np.array(found, np.int32))
