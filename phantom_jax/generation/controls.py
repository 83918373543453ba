"""What a user asks of a batch, as arrays for a compiled program."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.generation.settings import Settings
from phantom_jax.generation.stops import StopTable

# End tokens are padded to a multiple of this many, so that another stop token compiles nothing.
_END_IDS = 4
# Behind every vocabulary: what is written there is dropped.
_NO_ID = np.iinfo(np.int32).max


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

    max_new_tokens: jax.Array
    min_new_tokens: jax.Array
    end_ids: jax.Array
    pad_id: jax.Array
    length_penalty: jax.Array
    early_stopping: jax.Array
    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    seeds: jax.Array | None = None
    repetition_penalty: jax.Array | None = None
    prompt_tokens: jax.Array | None = None
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
