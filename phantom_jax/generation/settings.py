"""What a user asks of generation, checked; and the same as arrays for a compiled program."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.errors import InputError
from phantom_jax.generation.stops import StopTable

# End tokens are padded to a multiple of this many, so that another stop token compiles nothing.
_END_IDS = 4
# Behind every vocabulary: what is written there is dropped.
_NO_ID = np.iinfo(np.int32).max


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
        self._check_number("temperature", 0.0, "0 is greedy decoding")
        self._check_number("length_penalty", -math.inf, "1.0 ranks beams by their mean log-probability")
        if self.top_p is not None:
            self._check_number("top_p", 0.0, "leave it out for all tokens")
            if not 0 < self.top_p <= 1:
                raise InputError(f"top_p is {self.top_p}: set it above 0 and to at most 1")
        if self.repetition_penalty is not None:
            self._check_number("repetition_penalty", 0.0, "1.0 is none, 1.2 a usual value")
            if self.repetition_penalty == 0:
                raise InputError("repetition_penalty is 0: set it above 0; 1.0 is none, 1.2 a usual value")
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
    def penalizes_repetition(self) -> bool:
        return self.repetition_penalty not in (None, 1.0)

    @property
    def branches(self) -> int:
        """Continuations of a prompt that are computed side by side."""
        return self.num_beams if self.num_beams > 1 else self.num_answers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "max_new_tokens",
        "min_new_tokens",
        "end_ids",
        "pad_id",
        "length_penalty",
        "early_stopping",
        "temperature",
        "top_k",
        "top_p",
        "seeds",
        "repetition_penalty",
        "prompt_tokens",
        "stops",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Controls:
    """`Settings` as arrays: values change without compiling anything; what is None is not computed.

    Attributes:
      max_new_tokens: [B] int32.
      min_new_tokens: int32 scalar.
      end_ids: [E] int32, tokens that end an answer, filled up with ids beyond the vocabulary.
      pad_id: int32 scalar, what follows an answer's end.
      length_penalty: float32 scalar.
      early_stopping: int32 scalar: 0 False, 1 True, 2 never.
      temperature: float32 scalar; None is greedy.
      top_k: int32 scalar or None.
      top_p: float32 scalar or None.
      seeds: [B] uint32, one for each prompt; None where nothing is sampled.
      repetition_penalty: float32 scalar or None.
      prompt_tokens: [B, V] bool, the tokens of each prompt; None without a repetition penalty.
      stops: the stop strings, or None.
    """

    max_new_tokens: Any
    min_new_tokens: Any
    end_ids: Any
    pad_id: Any
    length_penalty: Any
    early_stopping: Any
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    seeds: Any = None
    repetition_penalty: Any = None
    prompt_tokens: Any = None
    stops: StopTable | None = None


def controls(
    settings: Settings,
    *,
    max_new_tokens: np.ndarray,
    end_ids: Sequence[int],
    pad_id: int,
    seeds: np.ndarray | None = None,
    prompt_tokens: np.ndarray | None = None,
    stops: StopTable | None = None,
) -> Controls:
    """The arrays of one batch.

    Args:
      settings: what the user asked for.
      max_new_tokens: [B], what of it each prompt's context leaves.
      end_ids: tokens that end an answer.
      pad_id: what follows an answer's end.
      seeds: [B], only read where tokens are sampled; see `prompt_seed`.
      prompt_tokens: [B, V] bool, only read with a repetition penalty.
      stops: the table of the stop strings.
    """
    sampled = settings.temperature > 0
    penalized = settings.penalizes_repetition
    ends = sorted(set(end_ids))
    ends += [_NO_ID] * (-len(ends) % _END_IDS)

    def number(value, dtype=jnp.int32):
        return None if value is None else jnp.asarray(value, dtype)

    return Controls(
        max_new_tokens=number(max_new_tokens),
        min_new_tokens=number(settings.min_new_tokens),
        end_ids=number(np.array(ends or [_NO_ID] * _END_IDS)),
        pad_id=number(pad_id),
        length_penalty=number(settings.length_penalty, jnp.float32),
        early_stopping=number({False: 0, True: 1, "never": 2}[settings.early_stopping]),
        temperature=number(settings.temperature, jnp.float32) if sampled else None,
        top_k=number(settings.top_k),
        top_p=None if settings.top_p == 1 else number(settings.top_p, jnp.float32),
        seeds=number(seeds, jnp.uint32) if sampled else None,
        repetition_penalty=number(settings.repetition_penalty, jnp.float32) if penalized else None,
        prompt_tokens=number(prompt_tokens, bool) if penalized else None,
        stops=stops,
    )
