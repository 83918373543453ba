"""The text of an answer from its tokens, the same whether it is streamed or not."""

import codecs
from collections.abc import Collection, Iterable, Sequence

from phantom_jax.data.stop_strings import stop_automaton


class AnswerText:
    """An answer's text, piece by piece as tokens come.

    The answer ends before the first token of `end_ids` and before the first stop string that ends in a token after the
    first `min_new_tokens`; of several that end at the same byte the longest counts. It is stripped of white space at
    both ends, and malformed UTF-8 is U+FFFD. Only whole code points leave, and what leaves is final: text that may yet
    become a stop string and white space that may yet be the answer's end are held back. How the tokens are cut into
    pushes does not change the joined pieces.

    Args:
      token_bytes: what each token adds, by id; ids beyond add nothing.
      end_ids: tokens that end the answer.
      stops: strings that end it; errors as in `stop_bytes`.
      min_new_tokens: a stop string that ends within so many tokens is text as any other.

    Attributes:
      ended: whether an end token or a stop string has ended the answer, and not `finish`.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        end_ids: Collection[int],
        stops: Sequence[str] = (),
        min_new_tokens: int = 0,
    ):
        automaton = stop_automaton(stops)
        self._next_state = automaton.next_state.tolist()
        self._depth, self._found = automaton.depth.tolist(), automaton.found.tolist()
        self._token_bytes, self._end_ids, self._min_new_tokens = token_bytes, frozenset(end_ids), min_new_tokens
        self._state = self._tokens = 0
        self._held = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun, self._space = False, ""
        self._open, self.ended = True, False

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain after these tokens and was not before."""
        if not self._open:
            return ""
        for token in map(int, token_ids):
            self._add(token)
            if self.ended:
                return self.finish()
        return self._release(len(self._held) - self._depth[self._state])

    def finish(self) -> str:
        """The rest, where no more tokens come."""
        if not self._open:
            return ""
        self._open = False
        return self._release(len(self._held))

    def _add(self, token: int):
        if token in self._end_ids:
            self.ended = True
            return
        data = self._token_bytes[token] if 0 <= token < len(self._token_bytes) else b""
        for byte in data:
            self._held.append(byte)
            self._state = self._next_state[self._state][byte]
            if self._found[self._state] and self._tokens >= self._min_new_tokens:
                del self._held[-self._found[self._state] :]
                self.ended = True
                return
        self._tokens += 1

    def _release(self, count: int) -> str:
        text = self._decoder.decode(bytes(self._held[:count]), final=not self._open)
        del self._held[:count]
        text = self._space + text if self._begun else text.lstrip()
        piece = text.rstrip()
        self._begun, self._space = self._begun or bool(piece), text[len(piece) :]
        return piece


def answer_text(
    token_ids: Iterable[int],
    token_bytes: Sequence[bytes],
    *,
    end_ids: Collection[int],
    stops: Sequence[str] = (),
    min_new_tokens: int = 0,
) -> str:
    """A whole answer's text; arguments as of `AnswerText`."""
    answer = AnswerText(token_bytes, end_ids=end_ids, stops=stops, min_new_tokens=min_new_tokens)
    return answer.push(token_ids) + answer.finish()
