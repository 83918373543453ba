"""Stored reference log-probabilities: those of every pair of answers under the model that a phase begins with.

They are computed in a pass over the pairs before the phase's first step and kept in `WORKDIR/reference/PHASE`:
`reference.json` says of which model and which data they are, and each part, `00000.npz` and on, holds the pairs of some
batches. Parts do not depend on one another. Each is there whole or not at all, so a pass that was interrupted goes on
with the parts that are missing.
"""

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from phantom_jax.batch import Batch
from phantom_jax.errors import InputError, Preempted
from phantom_jax.json_files import read_json, write_json
from phantom_jax.objectives import answer_log_probs
from phantom_jax.sharding.placement import on_host
from phantom_jax.training.state import merge
from phantom_jax.training.step import Score
from phantom_jax.training.task import DataIterator
from phantom_jax.trees import Params

PART = 64
"""How many batches a part holds: what is lost at most when a pass is killed."""


class Pairs(Protocol):
    """Every pair of answers that a phase may compare once; see `phantom_jax.data.pairs.PairBatches`."""

    ids: np.ndarray
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class References:
    """Log-probabilities by pair.

    Args:
      ids: [pairs, 2] record and question of each pair.
      log_probs: [pairs, 2] float32, of the chosen and of the rejected answer.
    """

    def __init__(self, ids: np.ndarray, log_probs: np.ndarray):
        keys = _keys(ids)
        order = np.argsort(keys)
        self._keys, self._log_probs = keys[order], log_probs[order]

    def of(self, pair_ids: np.ndarray) -> np.ndarray:
        """`reference_logps` [B, 2 * pairs] of `pair_ids` [B, pairs, 2]; 0 where there is no pair."""
        keys, there = _keys(pair_ids), pair_ids[..., 0] >= 0
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        # A question without a rejected answer has an id, and is no pair.
        found = there & (self._keys[places] == keys)
        values = np.where(found[..., None], self._log_probs[places], np.float32(0))
        return values.reshape(len(pair_ids), -1)


def _keys(ids: np.ndarray) -> np.ndarray:
    return (ids[..., 0].astype(np.int64) << 32) + ids[..., 1]


class ReferenceIterator:
    """Batches of another iterator with `reference_logps` in the place of their `pair_ids`."""

    def __init__(self, iterator: DataIterator, references: References):
        self._iterator, self._references = iterator, references

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        batch = dict(next(self._iterator))
        batch["reference_logps"] = self._references.of(batch.pop("pair_ids"))
        return batch

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)


def make_reference_step(score: Score) -> Callable[[Params, Params, Batch], jax.Array]:
    """Builds `step(trainable, frozen, batch) -> reference_logps`, [B, 2 * pairs], of a batch that has `pair_ids`.

    Factors of an adapter, where there are some, go unread: when a phase begins they change nothing.
    """

    def step(trainable, frozen, batch):
        log_probs = score(merge(trainable, frozen), batch).log_probs
        return answer_log_probs(log_probs, batch, slots=2 * batch["pair_ids"].shape[1])

    return step


def fingerprint(params: Params) -> str:
    """A hash of all parameters: paths, shapes, types and bits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(on_host(leaf))
        digest.update(json.dumps([jax.tree_util.keystr(path), array.shape, array.dtype.name]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def compute_references(
    folder: Path,
    pairs: Pairs,
    params: Params,
    score: Callable[[Batch], np.ndarray],
    *,
    say: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Computes what is missing in a folder; what is there of another model or other data goes first.

    Args:
      folder: of the phase.
      pairs: all of them.
      params: of the reference model, to know it again.
      score: gives `reference_logps` of a batch of pairs.
      say: prints a line.
      stop: when it is set, the pass ends after the part at hand.

    Raises:
      Preempted: it was stopped; started again it goes on.
    """
    wanted = {"model": fingerprint(params), "data": pairs.fingerprint, "pairs": len(pairs.ids), "batches": len(pairs)}
    if folder.exists() and _description(folder) != wanted:
        say(f"reference log-probabilities in {folder} are of another model or other data: computing them anew")
        shutil.rmtree(folder)
    if not folder.exists():
        scratch = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        write_json(scratch / "reference.json", wanted)
        scratch.replace(folder)
    parts = range(_count(pairs))
    missing = [number for number in parts if not _part(folder, number).exists()]
    if missing:
        say(f"reference log-probabilities of {len(pairs.ids):,} pairs: {len(missing)} of {len(parts)} parts to compute")
    for number in missing:
        if stop.is_set():
            raise Preempted(
                f"Stopped as asked in the pass of the reference model, with {number} of {len(parts)} parts stored."
                " Start again to go on."
            )
        _write(_part(folder, number), *_compute(pairs, number, score))


def load_references(folder: Path, pairs: Pairs) -> References:
    """What `compute_references` stored.

    Raises:
      InputError: it is not there, incomplete, damaged, or of other data.
    """
    remedy = f"Put {folder} back as it was, or start the run in a new workdir."
    if not folder.exists():
        raise InputError(f"The reference log-probabilities of this phase are gone: there is no {folder}. {remedy}")
    found = _description(folder) or {}
    if (found.get("data"), found.get("batches")) != (pairs.fingerprint, len(pairs)):
        raise InputError(
            f"The reference log-probabilities in {folder} are of other data than this phase's: records, tokenizer or"
            f" processor changed since. Put them back as they were, or start the run in a new workdir."
        )
    parts = [_read(_part(folder, number), remedy) for number in range(_count(pairs))]
    ids, log_probs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not np.array_equal(ids, pairs.ids):
        raise InputError(f"The reference log-probabilities in {folder} are damaged. {remedy}")
    return References(ids, log_probs)


def _count(pairs: Sequence) -> int:
    return -(-len(pairs) // PART)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.npz"


def _description(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / "reference.json")
    except InputError:
        return None


def _compute(pairs: Pairs, number: int, score: Callable[[Batch], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ids, log_probs = [], []
    for index in range(number * PART, min((number + 1) * PART, len(pairs))):
        batch = pairs[index]
        there = batch["pair_ids"][..., 0] >= 0
        ids.append(batch["pair_ids"][there])
        log_probs.append(score(batch).reshape(*there.shape, 2)[there])
        finite = np.isfinite(log_probs[-1]).all(axis=1)
        if not finite.all():
            record, question = ids[-1][np.argmin(finite)]
            raise InputError(
                f"The model that the phase begins with gives an answer to question {question} of record {record} a"
                " log-probability that is not finite, so it can be no reference. Look at its weights, and at that"
                " record."
            )
    return np.concatenate(ids), np.concatenate(log_probs)


def _write(path: Path, ids: np.ndarray, log_probs: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, ids=ids, log_probs=log_probs.astype(np.float32))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["ids"], arrays["log_probs"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"Reference log-probabilities {path} cannot be read ({error}). {remedy}") from error
