"""Text between special tokens, tokenised whole, with the place of every token in it.

A tokenizer first takes a text apart at special tokens and tokenises each run of text between them on its own. So do we,
but it is known from outside which tokens are special: those of the markup are, and what a user writes never is.
"""

import array
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers

WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""What special tokens that strip it take away: Unicode's white space, which is less than `str.strip` removes."""


class Special(NamedTuple):
    """A special token."""

    token_id: int
    strips_before: bool = False
    """Whether white space before it belongs to it."""
    strips_after: bool = False


class Run(NamedTuple):
    """The tokens of a run of text; token i stands for its characters starts[i] to ends[i] (exclusive).

    Several tokens stand for the same character where it is split into bytes. What a tokenizer puts before the text
    stands for the first character.
    """

    token_ids: Sequence[int]
    starts: Sequence[int]
    ends: Sequence[int]


class RunEncoder:
    """Takes markup apart at its special tokens and tokenises runs of text.

    Args:
      tokenizer: the fast tokenizer.
      special: tokens of its vocabulary that are special whatever the tokenizer calls them.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: Sequence[str] = ()):
        self._special = {token: Special(tokenizer.token_to_id(token)) for token in special}
        for token_id, added in tokenizer.get_added_tokens_decoder().items():
            if added.special or added.content in self._special:
                self._special[added.content] = Special(token_id, added.lstrip, added.rstrip)
        # The longest first: of two that begin alike the tokenizer takes the longer one.
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        content = json.loads(tokenizer.to_str())
        # It would shorten what tokens stand for.
        content["post_processor"] = None
        for added in content["added_tokens"]:
            added["special"] = added["content"] in self._special
        self._opening = _plain(content)
        content["pre_tokenizer"] = _never_first(content["pre_tokenizer"])
        self._following = _plain(content)
        self.split = functools.cache(self._split)
        self.encode = functools.lru_cache(maxsize=2**16)(self._encode)

    def _split(self, markup: str) -> tuple[str | Special, ...]:
        """Takes markup apart: text and special tokens in order, no text empty."""
        parts: list[str | Special] = []
        end = 0
        for match in self._pattern.finditer(markup):
            parts += [markup[end : match.start()], self._special[match[0]]]
            end = match.end()
        return tuple(part for part in [*parts, markup[end:]] if part != "")

    def _encode(self, text: str, opening: bool) -> Run:
        """Tokenises a run of text, in which nothing is special.

        Args:
          text: a whole run.
          opening: whether it opens the whole text: some tokenizers put a space before that run alone.
        """
        encoding = (self._opening if opening else self._following).encode(text, add_special_tokens=False)
        starts, ends = zip(*encoding.offsets, strict=True) if encoding.ids else ((), ())
        # Many are kept: an array takes a tenth of a tuple's memory.
        return Run(*(array.array("i", values) for values in (encoding.ids, starts, ends)))


def _plain(content: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    # From here on special tokens are plain text: what a user writes cannot open or end a turn.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _never_first(pre_tokenizer: Any) -> Any:
    """The pre-tokenizer as it acts on a run that does not open the text."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    inner = pre_tokenizer.get("pretokenizers")
    return pre_tokenizer if inner is None else {**pre_tokenizer, "pretokenizers": [_never_first(one) for one in inner]}
