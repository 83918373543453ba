"""What a user asks of generation, checked."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phantom_jax.errors import InputError

_MOST_BRANCHES = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are generated. The defaults are greedy decoding.

    Attributes:
      max_new_tokens: longest answer in tokens, its end marker included; None takes 512, or what the context leaves.
      min_new_tokens: before so many tokens no end marker is chosen and no stop string counts.
      num_beams: width of the beam search; 1 is none.
      length_penalty: beams are ranked by log-probability / length ** length_penalty: above 0 favours long answers.
      early_stopping: when a beam search ends. False: when the best running beam, at its present length, is no better
        than the worst of `num_beams` finished ones. True: as soon as there are `num_beams` finished ones. "never":
        only when no running beam can become better at any length.
      temperature: 0 is greedy; above 0 tokens are sampled from logits / temperature. With beams, continuations of
        beams are sampled without replacement.
      top_k: sample among the k most likely tokens only; None is all.
      top_p: sample among the smallest set of tokens with so much probability; None is all.
      seed: of the sampling. An answer depends on the seed and on its prompt, never on what else is in the batch.
      repetition_penalty: logits of tokens of prompt and answer are divided (positive) or multiplied (negative) by it
        (CTRL, arXiv 1909.05858); None and 1.0 are none.
      stop: strings that end an answer and do not belong to it. One that is a special token ends it as a token.
      num_answers: answers for each prompt: sampled ones, or the best of the beams.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float | None = None
    stop: str | Sequence[str] = ()
    num_answers: int = 1

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1), ("num_answers", 1)):
            self._check_integer(name, least, optional=name == "max_new_tokens")
        self._check_integer("top_k", 1, optional=True)
        self._check_integer("seed", 0)
        for name in ("num_beams", "num_answers"):
            if getattr(self, name) > _MOST_BRANCHES:
                raise InputError(f"{name} is {getattr(self, name)}: set it to at most {_MOST_BRANCHES}")
        for name in ("top_k", "seed", "max_new_tokens", "min_new_tokens"):
            if (getattr(self, name) or 0) >= 2**31:
                raise InputError(f"{name} is {getattr(self, name)}: set it below 2147483648")
        self._check_number("temperature", 0.0, "0 is greedy decoding")
        if 0 < self.temperature < 1e-3:
            raise InputError(f"temperature is {self.temperature}: set it to 0, greedy decoding, or to 0.001 or more")
        if self.top_k is not None and self.top_k < self.num_beams:
            raise InputError(
                f"top_k={self.top_k} leaves fewer continuations than num_beams={self.num_beams}: set top_k higher"
            )
        self._check_number("length_penalty", -math.inf, "1.0 ranks beams by their mean log-probability")
        if self.top_p is not None:
            self._check_number("top_p", 0.0, "leave it out for all tokens")
            if not 0 < self.top_p <= 1:
                raise InputError(f"top_p is {self.top_p}: set it above 0 and to at most 1")
        if self.repetition_penalty is not None:
            self._check_number("repetition_penalty", -math.inf, "1.0 is none, 1.2 a usual value")
            if self.repetition_penalty <= 0:
                raise InputError(
                    f"repetition_penalty is {self.repetition_penalty}: set it above 0; 1.0 is none, 1.2 a usual value"
                )
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {self.early_stopping!r}: set it to True, False or 'never'")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}: lower one"
            )
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("top_k and top_p choose among sampled tokens: set temperature above 0, 0.7 for instance")
        if self.num_answers > 1 and self.num_beams == 1 and self.temperature == 0:
            raise InputError(
                f"num_answers={self.num_answers} with greedy decoding would be {self.num_answers} equal answers: set "
                f"temperature above 0, or num_beams to {self.num_answers} or more"
            )
        if 1 < self.num_beams < self.num_answers:
            raise InputError(f"{self.num_beams} beams have no {self.num_answers} answers: set num_beams higher")

    def _check_integer(self, name: str, least: int, optional: bool = False):
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} is {value!r}: set it to a whole number, {least} or more")

    def _check_number(self, name: str, least: float, hint: str):
        value = getattr(self, name)
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < least:
            bound = "a finite number" if least == -math.inf else f"a number, {least:g} or more"
            raise InputError(f"{name} is {value!r}: set it to {bound}; {hint}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Settings":
        """Settings by name; a name that does not exist is refused with the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(known)}"
                raise InputError(f"generation has no setting {name!r}: {hint}")
        return cls(**fields)

    def check_streamable(self) -> None:
        """Refuses settings whose answers are not known before they are whole."""
        if self.num_beams > 1:
            raise InputError(
                f"beams are ranked when they are whole: with num_beams={self.num_beams} there is nothing to stream; "
                "set num_beams to 1, or generate without streaming"
            )
        if self.num_answers > 1:
            raise InputError(
                f"only one answer can be streamed, not num_answers={self.num_answers}: set it to 1, or generate "
                "without streaming"
            )

    @property
    def least_new_tokens(self) -> int:
        """Tokens that the context must leave for an answer."""
        return self.max_new_tokens or max(1, self.min_new_tokens)

    @property
    def penalizes_repetition(self) -> bool:
        return self.repetition_penalty not in (None, 1.0)

    @property
    def branches(self) -> int:
        """Continuations of a prompt that are computed side by side."""
        return self.num_beams if self.num_beams > 1 else self.num_answers
