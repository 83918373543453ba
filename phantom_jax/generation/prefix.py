"""Prefixes of prompts: encoded and read once, kept, and shared by every later prompt that begins with them.

A prefix is what prompts have in common: the system text, the images, the earlier turns of a chat. Its keys and values
(phantom halves included) depend on nothing that follows. A prompt that goes on where a kept prefix ends, as the next
turn of a chat does, reads only what is new.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.generation.slots import bucket
from phantom_jax.models.cache import Cache, empty_cache
from phantom_jax.models.phantom import PhantomStates
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.ops.image import normalize_pixels


@functools.partial(jax.jit, static_argnames="model")
def first_token_states(model: VisionLanguageModel, params: Any, token: jax.Array) -> tuple[PhantomStates, ...]:
    """The phantom states of each layer for prompts that all begin with one token: constants of the weights.

    Attention is causal, so the first token sees itself alone and its states are the same in every prompt; at position
    0 its rotation does not depend on the length either.
    """
    config = model.config.language_model
    one = jnp.ones((1, 1), jnp.int32)
    inputs = {"token_ids": token * one, "positions": 0 * one, "segment_ids": one}
    cache = empty_cache(config, 1, 1, model.dtype)
    output = model.apply({"params": params}, inputs, rope_length=1, cache=cache, method="hidden_states")
    return tuple(layer.phantom for layer in output.cache.layers)


@functools.partial(jax.jit, static_argnames=("model", "pixel_statistics", "rope_length"))
def extend(
    model: VisionLanguageModel,
    params: Any,
    cache: Cache,
    batch: Mapping[str, jax.Array],
    *,
    pixel_statistics: tuple[tuple[float, ...], tuple[float, ...]],
    rope_length: int,
) -> Cache:
    """A cache [1, S + L, ...] with more tokens [1, L] behind those of `cache` [1, S, ...].

    Args:
      model: a bare module with `scan_layers=False`.
      params: its parameters.
      cache: what was read before; may have no slots.
      batch: `token_ids`, `positions`, `segment_ids`, and with images `image_slots` and uint8 `pixels`.
      pixel_statistics: mean and standard deviation of pixels from 0 to 1.
      rope_length: longest conversation; static.
    """
    batch = dict(batch)
    if "pixels" in batch:
        batch["pixels"] = normalize_pixels(batch["pixels"], *pixel_statistics)
    slots = cache.structure.shape[1]
    more = batch["token_ids"].shape[1]

    def grow(x):
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

    layers = tuple(
        dataclasses.replace(jax.tree.map(grow, dataclasses.replace(layer, phantom=None)), phantom=layer.phantom)
        for layer in cache.layers
    )
    cache = Cache(layers, jax.tree.map(grow, cache.structure), jnp.asarray(slots, jnp.int32))
    output = model.apply({"params": params}, batch, rope_length=rope_length, cache=cache, method="hidden_states")
    return output.cache


@dataclasses.dataclass(frozen=True)
class _Entry:
    token_ids: np.ndarray
    tile_count: int
    cache: Cache

    @property
    def bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))


class PrefixCache:
    """Prefixes on the device, the least recently used given up first.

    Attributes:
      capacity: most bytes that are kept between calls.
      tokens_read: tokens that had to be computed so far.
      tokens_reused: tokens that were found.
    """

    def __init__(self, model: VisionLanguageModel, params: Any, pixel_statistics, capacity: int):
        self._model, self._params, self._pixel_statistics = model, params, pixel_statistics
        self._entries: collections.OrderedDict[tuple, _Entry] = collections.OrderedDict()
        self.capacity, self.tokens_read, self.tokens_reused = capacity, 0, 0

    def get(
        self, token_ids: np.ndarray, image_slots: np.ndarray, tiles: np.ndarray, *, empty: Cache, rope_length: int
    ) -> Cache:
        """The cache [1, S, ...] of a prefix.

        Args:
          token_ids, image_slots: [n], as of `processor.Prompt`.
          tiles: [T, H, W, 3] uint8, all of the prefix.
          empty: a cache [1, 0, ...] to begin with.
          rope_length: what else keys depend on.
        """
        digests: dict[int, bytes] = {}

        def key(tokens: np.ndarray, tile_count: int):
            if tile_count not in digests:
                digests[tile_count] = hashlib.blake2b(tiles[:tile_count].tobytes(), digest_size=16).digest()
            return tokens.tobytes(), digests[tile_count], rope_length

        found = None
        for entry in self._entries.values():
            length = len(entry.token_ids)
            longer = found is None or length > len(found.token_ids)
            if longer and length <= len(token_ids) and entry.tile_count <= len(tiles):
                same = np.array_equal(entry.token_ids, token_ids[:length])
                if same and key(entry.token_ids, entry.tile_count) in self._entries:
                    found = self._entries[key(entry.token_ids, entry.tile_count)]
        known, used = (len(found.token_ids), found.tile_count) if found else (0, 0)
        if found:
            self._entries.move_to_end(key(found.token_ids, used))
        self.tokens_reused += known
        if known == len(token_ids):
            return found.cache
        self.tokens_read += len(token_ids) - known
        cache = extend(
            self._model,
            self._params,
            found.cache if found else empty,
            self._batch(token_ids, image_slots, tiles, known, used),
            pixel_statistics=self._pixel_statistics,
            rope_length=rope_length,
        )
        self._keep(key(token_ids, len(tiles)), _Entry(token_ids.copy(), len(tiles), cache))
        return cache

    def _batch(self, token_ids, image_slots, tiles, known, used) -> dict[str, np.ndarray]:
        """Tokens from `known` on, left padded, with tiles from `used` on."""
        batch = left_padded([token_ids[known:]], [known], length=bucket(len(token_ids) - known))
        if len(tiles) > used:
            slots = np.full_like(batch["token_ids"], -1)
            before = int((image_slots[:known] >= 0).sum())
            new = image_slots[known:]
            slots[0, slots.shape[1] - len(new) :] = np.where(new >= 0, new - before, -1)
            batch |= {"image_slots": slots, "pixels": tiles[None, used:]}
        return batch

    @property
    def bytes(self) -> int:
        """What the prefixes hold now."""
        return sum(kept.bytes for kept in self._entries.values())

    def clear(self) -> None:
        """Gives up all prefixes."""
        self._entries.clear()

    def _keep(self, key: tuple, entry: _Entry) -> None:
        self._entries[key] = entry
        while self.bytes > self.capacity:
            self._entries.popitem(last=False)


def left_padded(rows: list[np.ndarray], starts: list[int], *, length: int) -> dict[str, np.ndarray]:
    """Token ids, positions and segments [B, length] of rows that go on at position `starts[row]`."""
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("token_ids", "positions", "segment_ids")}
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        first = length - len(ids)
        batch["token_ids"][row, first:] = ids
        batch["positions"][row, first:] = np.arange(start, start + len(ids))
        batch["segment_ids"][row, first:] = 1
    return batch
