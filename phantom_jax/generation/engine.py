"""From prompts to the tokens of their answers: batches of known sizes, shared prefixes, compiled programs.

Every array that reaches a compiled program has one of few sizes, so that requests of like size share a program: rows,
prompt, prefix and answer are each filled up to the next one (`slots.bucket`).
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from phantom_jax.data.stop_strings import check_stops
from phantom_jax.errors import InputError
from phantom_jax.generation import decode
from phantom_jax.generation.prefix import PrefixCache, first_token_states
from phantom_jax.generation.settings import Controls, Settings, controls
from phantom_jax.generation.slots import bucket, left_padded, place_prefix
from phantom_jax.generation.stops import StopTable, stop_table
from phantom_jax.models.cache import Cache, empty_cache
from phantom_jax.models.phantom import PhantomStates
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.ops.rope import canonical_length
from phantom_jax.processor import Processor, Prompt
from phantom_jax.sharding.rules import DECODING, cache_shardings

MAX_NEW_TOKENS = 512
"""Longest answer where none is asked for and the context has room."""

PREFIX_BYTES = 2**30
"""Keys and values of prefixes that are kept on the device between calls."""


@dataclasses.dataclass(frozen=True)
class _Request:
    """A prompt and what its own length decides."""

    index: int
    prompt: Prompt
    max_new_tokens: int
    rope_length: int


class Engine:
    """Generates answers with one model.

    Attributes:
      prefixes: the prefixes that are kept.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        params: Any,
        processor: Processor,
        *,
        end_ids: Sequence[int],
        int8_cache: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self._model, self._params, self._processor = model, params, processor
        self._end_ids, self._int8_cache, self._mesh = tuple(end_ids), int8_cache, mesh
        self._states: dict[int, tuple[PhantomStates, ...]] = {}
        self._stop_tables: dict[tuple[str, ...], StopTable] = {}
        self._allocate: dict[tuple[int, int], Callable[[], Cache]] = {}
        self.prefixes = PrefixCache(model, params, (processor.mean, processor.std), PREFIX_BYTES)

    def answer(self, prompts: Sequence[Prompt], settings: Settings) -> list[list[np.ndarray]]:
        """Tokens of the answers to each prompt, end markers included; `settings.num_answers` for each.

        All prompts that agree in the angles of their rotation are computed as one batch.

        Raises:
          InputError: a prompt leaves no room in the context, or a stop does not exist.
        """
        requests = [self._request(index, prompt, settings) for index, prompt in enumerate(prompts)]
        answers: list[list[np.ndarray]] = [[] for _ in requests]
        for rope_length in sorted({request.rope_length for request in requests}):
            batch = [request for request in requests if request.rope_length == rope_length]
            state, asked = self._start(batch, settings)
            state = self._advance(state, asked, max(request.max_new_tokens for request in batch), rope_length)
            tokens, lengths = jax.device_get(state.answers)
            for row, request in enumerate(batch):
                answers[request.index] = [tokens[row, k, : lengths[row, k]] for k in range(settings.num_answers)]
        return answers

    def stream(self, prompt: Prompt, settings: Settings) -> Iterator[np.ndarray]:
        """The tokens of one answer as they come, some at a time; errors as `answer`."""
        request = self._request(0, prompt, settings)
        state, asked = self._start([request], settings)
        taken = 0
        while True:
            tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
            length = int(lengths[0, 0])
            yield np.array(tokens[0, 0, taken:length])
            taken = length
            if done[0, 0]:
                return
            state = self._advance(state, asked, taken + 1, request.rope_length)

    def _request(self, index: int, prompt: Prompt, settings: Settings) -> _Request:
        length, context = len(prompt.token_ids), self._processor.max_length
        room = context - length
        if room < (settings.max_new_tokens or max(1, settings.min_new_tokens)):
            asked = settings.max_new_tokens or settings.min_new_tokens
            raise InputError(
                f"a prompt of {length} tokens leaves {room} of the context's {context} for the answer: shorten the "
                f"prompt" + (f", or ask for at most {room} new tokens instead of {asked}" if room and asked else "")
            )
        max_new_tokens = settings.max_new_tokens or min(max(MAX_NEW_TOKENS, settings.min_new_tokens), room)
        rope = self._model.config.language_model.rope
        return _Request(index, prompt, max_new_tokens, canonical_length(rope, length + max_new_tokens))

    def _start(self, requests: Sequence[_Request], settings: Settings) -> tuple[decode.State, Controls]:
        """Prefixes, prompts and the first token of every answer."""
        rope_length = requests[0].rope_length
        # Rows are filled up with rows of padding.
        rows = 1 << (len(requests) - 1).bit_length()
        prefixes = [self._prefix(request, rope_length) for request in requests]
        first = [
            0 if prefix is None else self._prefix_length(request.prompt)
            for prefix, request in zip(prefixes, requests, strict=True)
        ]
        rest = [request.prompt.token_ids[start:] for request, start in zip(requests, first, strict=True)]
        padding = [np.zeros(0, np.int32)] * (rows - len(requests))
        length = bucket(max(map(len, rest)))
        batch = left_padded([*rest, *padding], [*first, *[0] * len(padding)], length=length)
        new_slots = bucket(max(request.max_new_tokens for request in requests))
        prefix_slots = max((prefix.structure.shape[1] for prefix in prefixes if prefix is not None), default=0)
        slots = prefix_slots + length + new_slots * settings.branches
        cache = self._cache(rows, slots)
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                cache = place_prefix(cache, prefix, np.int32(row))
        cache = dataclasses.replace(cache, length=np.int32(prefix_slots))
        asked = self._controls(requests, settings, rows)
        state = decode.start(
            self._model,
            self._params,
            cache,
            self._phantom_states(requests[0].prompt),
            batch,
            asked,
            branches=settings.branches,
            beam_search=settings.num_beams > 1,
            new_slots=new_slots,
            rope_length=rope_length,
        )
        return state, asked

    def _advance(self, state: decode.State, asked: Controls, limit: int, rope_length: int) -> decode.State:
        return decode.advance(self._model, self._params, state, asked, np.int32(limit), rope_length=rope_length)

    @staticmethod
    def _prefix_length(prompt: Prompt) -> int:
        # At least one token must be left to predict from.
        return min(prompt.prefix_length, len(prompt.token_ids) - 1)

    def _prefix(self, request: _Request, rope_length: int) -> Cache | None:
        prompt = request.prompt
        length = self._prefix_length(prompt)
        if length == 0:
            return None
        return self.prefixes.get(
            prompt.token_ids[:length],
            prompt.image_slots[:length],
            prompt.tiles,
            empty=self._cache(1, 0).with_phantom(self._phantom_states(prompt)),
            rope_length=rope_length,
        )

    def _cache(self, rows: int, slots: int) -> Cache:
        config, dtype = self._model.config.language_model, self._model.dtype
        if (rows, slots) not in self._allocate:
            make = functools.partial(empty_cache, config, rows, slots, dtype, int8=self._int8_cache)
            where = None
            if self._mesh is not None:
                where = cache_shardings(jax.eval_shape(make), self._mesh, DECODING)
            self._allocate[rows, slots] = jax.jit(make, out_shardings=where)
        return self._allocate[rows, slots]()

    def _phantom_states(self, prompt: Prompt) -> tuple[PhantomStates, ...] | None:
        """Constants of the weights for prompts that begin as this one; every template has one such token."""
        token = int(prompt.token_ids[0])
        if self._model.config.language_model.phantom is None:
            return None
        if token not in self._states:
            self._states[token] = first_token_states(self._model, self._params, np.int32(token))
        return self._states[token]

    def _controls(self, requests: Sequence[_Request], settings: Settings, rows: int) -> Controls:
        strings, stop_ids = check_stops(settings.stop, self._processor.tokenizer)
        if strings and strings not in self._stop_tables:
            self._stop_tables[strings] = jax.device_put(stop_table(self._processor.token_bytes, strings))
        seeds = np.zeros(rows, np.uint32)
        limits = np.ones(rows, np.int32)
        seen = None
        if settings.penalizes_repetition:
            seen = np.zeros((rows, self._model.config.language_model.vocab_size), bool)
        for row, request in enumerate(requests):
            # Prompts draw different samples, and the same prompt the same ones whatever stands beside it.
            seeds[row] = zlib.crc32(request.prompt.token_ids.tobytes(), settings.seed & 0xFFFFFFFF)
            limits[row] = request.max_new_tokens
            if seen is not None:
                seen[row, request.prompt.token_ids] = True
        return controls(
            settings,
            max_new_tokens=limits,
            end_ids=(*self._end_ids, *stop_ids),
            pad_id=self._processor.pad_id,
            seeds=seeds,
            prompt_tokens=seen,
            stops=self._stop_tables.get(strings),
        )
