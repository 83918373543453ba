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
import jax.numpy as jnp
import numpy as np

from phantom_jax.data.stop_strings import check_stops
from phantom_jax.errors import InputError
from phantom_jax.generation import decode
from phantom_jax.generation.controls import Controls, controls
from phantom_jax.generation.prefix import PrefixCache, first_token_states
from phantom_jax.generation.settings import Settings
from phantom_jax.generation.slots import bucket, left_padded, place_prefix
from phantom_jax.generation.stops import StopTable, stop_table
from phantom_jax.models.cache import Cache, empty_cache
from phantom_jax.models.layers import cast_weights
from phantom_jax.models.phantom import PhantomStates
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.ops.rope import canonical_length
from phantom_jax.processor import Processor, Prompt
from phantom_jax.sharding.rules import DECODING, cache_shardings

MAX_NEW_TOKENS = 512
"""Longest answer where none is asked for and the context has room."""

PREFIX_BYTES = 2**30
"""Keys and values of prefixes that are kept on the device between calls."""


_FIRST_SLOTS = 64
_STOP_TABLES = 8
_NOTHING = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class _Request:
    """A prompt and what its own length decides."""

    index: int
    prompt: Prompt
    max_new_tokens: int
    rope_length: int


def _prefix_length(prompt: Prompt) -> int:
    """How many tokens are read beforehand. At least one must be left to predict from, and it must not be an image's."""
    return 0 if prompt.image_slots[-1] >= 0 else min(prompt.prefix_length, len(prompt.token_ids) - 1)


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
        # Once, and not again for every token.
        self._model, self._params, self._processor = model, cast_weights(params, model.dtype), processor
        self._end_ids, self._int8_cache, self._mesh = tuple(end_ids), int8_cache, mesh
        self._states: dict[int, tuple[PhantomStates, ...]] = {}
        # In the order of their first use.
        self._stop_tables: dict[tuple[str, ...], StopTable] = {}
        self._allocate: dict[tuple[int, int], Callable[[], Cache]] = {}
        self._data_shards = 1 if mesh is None else mesh.shape["data"]
        self.prefixes = PrefixCache(model, self._params, mean=processor.mean, std=processor.std, capacity=PREFIX_BYTES)

    def answer(self, prompts: Sequence[Prompt], settings: Settings) -> list[list[np.ndarray]]:
        """Tokens of the answers to each prompt, end markers included; `settings.num_answers` for each.

        Prompts that agree in their first token and in the angles of their rotation are computed as one batch.

        Raises:
          InputError: a prompt leaves no room in the context, or a stop does not exist.
        """
        check_stops(settings.stop, self._processor.tokenizer)
        groups: dict[tuple[int, int], list[_Request]] = {}
        for index, prompt in enumerate(prompts):
            request = self._request(index, prompt, settings)
            groups.setdefault((request.rope_length, int(prompt.token_ids[0])), []).append(request)
        answers: list[list[np.ndarray]] = [[] for _ in prompts]
        for batch in groups.values():
            state, asked = self._start(batch, settings)
            longest = max(request.max_new_tokens for request in batch)
            state = self._advance(state, asked, longest, batch[0].rope_length)
            tokens, lengths = jax.device_get(state.answers)
            for row, request in enumerate(batch):
                answers[request.index] = [tokens[row, k, : lengths[row, k]] for k in range(settings.num_answers)]
        return answers

    def stream(self, prompt: Prompt, settings: Settings) -> Iterator[np.ndarray]:
        """The tokens of one answer as they come, some at a time; errors as `answer`, at once."""
        check_stops(settings.stop, self._processor.tokenizer)
        return self._tokens(self._request(0, prompt, settings), settings)

    def _tokens(self, request: _Request, settings: Settings) -> Iterator[np.ndarray]:
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
        if length == 0:
            raise InputError("the prompt has no tokens: ask something")
        room, least = context - length, settings.least_new_tokens
        if room < least:
            raise InputError(
                f"a prompt of {length} tokens leaves {room} of the context's {context} for the answer: shorten the "
                f"prompt" + (f", or ask for at most {room} new tokens instead of {least}" if room and least > 1 else "")
            )
        max_new_tokens = settings.max_new_tokens or min(max(MAX_NEW_TOKENS, settings.min_new_tokens), room)
        rope = self._model.config.language_model.rope
        return _Request(index, prompt, max_new_tokens, canonical_length(rope, length + max_new_tokens))

    def _start(self, requests: Sequence[_Request], settings: Settings) -> tuple[decode.State, Controls]:
        """Prefixes, prompts and the first token of every answer."""
        rope_length = requests[0].rope_length
        prompts = [request.prompt for request in requests]
        # Rows are filled up with rows of padding, to a power of two that the devices share out evenly.
        rows = 1 << (len(requests) - 1).bit_length()
        rows = -(-rows // self._data_shards) * self._data_shards
        first = [_prefix_length(prompt) for prompt in prompts]
        rest = [prompt.token_ids[start:] for prompt, start in zip(prompts, first, strict=True)]
        none = rows - len(requests)
        batch = left_padded([*rest, *[_NOTHING] * none], [*first, *[0] * none], length=bucket(max(map(len, rest))))
        prefix_slots = bucket(max(first)) if any(first) else 0
        # More is added when answers turn out to be longer.
        new_slots = bucket(min(_FIRST_SLOTS, max(request.max_new_tokens for request in requests)))
        slots = prefix_slots + batch["token_ids"].shape[1] + new_slots * settings.branches
        states = self._phantom_states(prompts[0])
        cache = self._cache(rows, slots)
        for row, (prompt, length) in enumerate(zip(prompts, first, strict=True)):
            if length:
                # One at a time: the batch holds its own copy, and what is not kept is given up.
                prefix = self._prefix(prompt, length, states, rope_length)
                slots = min(prefix_slots, prefix.structure.shape[1])
                cache = place_prefix(cache, prefix, np.int32(row), slots=slots)
        cache = dataclasses.replace(cache, length=np.int32(prefix_slots))
        asked = self._controls(requests, settings, rows)
        state = decode.start(
            self._model,
            self._params,
            cache,
            states,
            batch,
            self._last_images(prompts, batch),
            asked,
            branches=settings.branches,
            beam_search=settings.num_beams > 1,
            new_slots=new_slots,
            rope_length=rope_length,
        )
        return state, asked

    def _advance(self, state: decode.State, asked: Controls, limit: int, rope_length: int) -> decode.State:
        while True:
            held = state.tokens.shape[2]
            now = np.int32(min(limit, held))
            state = decode.advance(self._model, self._params, state, asked, now, rope_length=rope_length)
            if limit <= held or np.all(jax.device_get(state.done)):
                return state
            state = decode.widen(state, asked.pad_id, new_slots=bucket(min(limit, 2 * held)))

    def _prefix(self, prompt: Prompt, length: int, states, rope_length: int) -> Cache:
        return self.prefixes.get(
            prompt.token_ids[:length],
            prompt.image_slots[:length],
            prompt.tiles,
            empty=self._cache(1, 0).with_phantom(states),
            rope_length=rope_length,
        )

    def _last_images(self, prompts: Sequence[Prompt], batch: dict[str, np.ndarray]) -> jax.Array | None:
        """Features [B, F, D] of the prompts that end in an image (they have no prefix); their slots go into `batch`."""
        features = {}
        for row, prompt in enumerate(prompts):
            if prompt.image_slots[-1] >= 0:
                batch.setdefault("image_slots", np.full_like(batch["token_ids"], -1))
                batch["image_slots"][row, -len(prompt.image_slots) :] = prompt.image_slots
                features[row] = self.prefixes.encode(prompt.tiles)[0]
        if not features:
            return None
        size = max(len(one) for one in features.values())
        out = np.zeros((len(batch["token_ids"]), size, self._model.config.language_model.embed_dim), self._model.dtype)
        for row, one in features.items():
            out[row, : len(one)] = one
        return jnp.asarray(out)

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
            if len(self._stop_tables) == _STOP_TABLES:
                self._stop_tables.pop(next(iter(self._stop_tables)))
            self._stop_tables[strings] = jax.device_put(stop_table(self._processor.token_bytes, strings))
        seeds = np.zeros(rows, np.uint32)
        limits = np.ones(rows, np.int32)
        seen = None
        if settings.penalizes_repetition:
            seen = np.zeros((rows, self._model.config.language_model.vocab_size), bool)
        for row, request in enumerate(requests):
            # Prompts draw different samples, and the same prompt the same ones whatever stands beside it.
            prompt = request.prompt
            seeds[row] = zlib.crc32(prompt.tiles.tobytes(), zlib.crc32(prompt.token_ids.tobytes(), settings.seed))
            limits[row] = request.max_new_tokens
            if seen is not None:
                seen[row, prompt.token_ids] = True
        return controls(
            settings,
            max_new_tokens=limits,
            end_ids=(*self._end_ids, *stop_ids),
            pad_id=self._processor.pad_id,
            seeds=seeds,
            prompt_tokens=seen,
            stops=self._stop_tables.get(strings),
        )
