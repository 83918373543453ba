"""Prefixes of prompts: encoded and read once, kept, and shared by every later prompt that begins with them.

A prefix is what prompts have in common: the system text, the images, the earlier turns of a chat. Its keys and values
(phantom halves included) depend on nothing that follows. A prompt that goes on where a kept prefix ends, as the next
turn of a chat does, reads only what is new.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from phantom_jax.generation.slots import bucket, over_tokens
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


@functools.partial(jax.jit, static_argnames=("model", "mean", "std"))
def encode_images(model: VisionLanguageModel, params: Any, tiles: jax.Array, *, mean, std) -> jax.Array:
    """Features [B, T * P, D] of uint8 tiles [B, T, H, W, 3]; mean and std of pixels from 0 to 1, by channel."""
    pixels = normalize_pixels(tiles, mean, std)
    return model.apply({"params": params}, pixels, method="image_features")


@functools.partial(jax.jit, static_argnames=("model", "slots", "rope_length"))
def extend(
    model: VisionLanguageModel,
    params: Any,
    cache: Cache,
    batch: Mapping[str, jax.Array],
    features: jax.Array | None,
    *,
    slots: int,
    rope_length: int,
) -> Cache:
    """A cache [1, slots, ...] with more tokens [1, L] behind those of `cache` [1, S, ...].

    Args:
      model: a bare module with `scan_layers=False`.
      params: its parameters.
      cache: what was read before, its tokens in the first `cache.length` slots; may have no slots.
      batch: `token_ids`, `positions`, `segment_ids`, RIGHT padded, and with images `image_slots`.
      features: [1, F, D] of the images, or None.
      slots: at least `cache.length` + L.
      rope_length: longest conversation; static.
    """
    more = slots - cache.structure.shape[1]

    def grow(x):
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

    grown = dataclasses.replace(over_tokens(grow, cache), length=cache.length)
    output = model.apply(
        {"params": params}, batch, rope_length=rope_length, cache=grown, features=features, method="hidden_states"
    )
    # What comes next overwrites the padding.
    return dataclasses.replace(output.cache, length=cache.length + jnp.sum(batch["segment_ids"], dtype=jnp.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """A prefix that is kept."""

    token_ids: np.ndarray
    tile_count: int
    digest: bytes
    rope_length: int
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

    def __init__(self, model: VisionLanguageModel, params: Any, *, mean, std, capacity: int):
        self._model, self._params, self._mean, self._std = model, params, mean, std
        # The one that was used last stands last.
        self._entries: list[_Entry] = []
        self.capacity, self.tokens_read, self.tokens_reused = capacity, 0, 0

    def get(
        self, token_ids: np.ndarray, image_slots: np.ndarray, tiles: np.ndarray, *, empty: Cache, rope_length: int
    ) -> Cache:
        """The cache [1, S, ...] of a prefix, its tokens in the first slots.

        Args:
          token_ids, image_slots: [n], as of `processor.Prompt`.
          tiles: [T, H, W, 3] uint8, all of the prefix.
          empty: a cache [1, 0, ...] to begin with.
          rope_length: what else keys depend on.
        """

        @functools.cache
        def digest(tile_count: int) -> bytes:
            return hashlib.blake2b(tiles[:tile_count].tobytes(), digest_size=16).digest()

        def begins_with(entry: _Entry) -> bool:
            return (
                entry.rope_length == rope_length
                and np.array_equal(entry.token_ids, token_ids[: len(entry.token_ids)])
                and entry.tile_count <= len(tiles)
                and entry.digest == digest(entry.tile_count)
            )

        known, used, before = 0, 0, empty
        found = max(filter(begins_with, self._entries), key=lambda entry: len(entry.token_ids), default=None)
        if found is not None:
            self._entries.remove(found)
            self._entries.append(found)
            known, used, before = len(found.token_ids), found.tile_count, found.cache
        self.tokens_reused += known
        if known == len(token_ids):
            return before
        self.tokens_read += len(token_ids) - known
        batch = self._batch(token_ids, image_slots, known)
        features = None
        if len(tiles) > used:
            features = self.encode(tiles[used:])
            # One program for all numbers of tiles that share a size.
            missing = max(0, batch["token_ids"].shape[1] - features.shape[1])
            features = jnp.pad(features, ((0, 0), (0, missing), (0, 0)))
        cache = extend(
            self._model,
            self._params,
            before,
            batch,
            features,
            slots=max(before.structure.shape[1], bucket(known + batch["token_ids"].shape[1])),
            rope_length=rope_length,
        )
        self._keep(_Entry(token_ids.copy(), len(tiles), digest(len(tiles)), rope_length, cache))
        return cache

    def encode(self, tiles: np.ndarray) -> jax.Array:
        """Features [1, T * P, D] of tiles [T, H, W, 3] uint8."""
        return encode_images(self._model, self._params, tiles[None], mean=self._mean, std=self._std)

    @property
    def bytes(self) -> int:
        """What the prefixes hold now."""
        return sum(entry.bytes for entry in self._entries)

    def clear(self) -> None:
        """Gives up all prefixes."""
        self._entries.clear()

    @staticmethod
    def _batch(token_ids: np.ndarray, image_slots: np.ndarray, known: int) -> dict[str, np.ndarray]:
        """Tokens from `known` on, right padded; slots count from the first image that is not known."""
        new = token_ids[known:]
        shape = (1, bucket(len(new)))
        batch = {name: np.zeros(shape, np.int32) for name in ("token_ids", "positions", "segment_ids")}
        batch["token_ids"][0, : len(new)] = new
        batch["positions"][0, : len(new)] = np.arange(known, len(token_ids))
        batch["segment_ids"][0, : len(new)] = 1
        batch["image_slots"] = np.full(shape, -1, np.int32)
        before = int((image_slots[:known] >= 0).sum())
        batch["image_slots"][0, : len(new)] = np.where(image_slots[known:] >= 0, image_slots[known:] - before, -1)
        return batch

    def _keep(self, entry: _Entry) -> None:
        if entry.bytes > self.capacity:
            logging.log_first_n(
                logging.WARNING,
                "a prefix of %d tokens takes %d bytes, more than the %d that are kept: it is read again each time",
                1,
                len(entry.token_ids),
                entry.bytes,
                self.capacity,
            )
            return
        self._entries.append(entry)
        while self.bytes > self.capacity:
            self._entries.pop(0)
