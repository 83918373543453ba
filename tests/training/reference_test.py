"""DPO's reference: the model without its adapter, or log-probabilities that are stored before the phase."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax import objectives
from phantom_jax.batch import IGNORE
from phantom_jax.config import default_phase
from phantom_jax.errors import InputError, Preempted
from phantom_jax.training import loop, reference
from phantom_jax.training.reference import make_reference_step
from phantom_jax.training.state import TrainState, merge
from phantom_jax.training.step import make_train_step
from tests.training import toy
from tests.training.step_test import ADAM
from tests.training.step_test import start as start_state

RANK, ROWS, BETA = 2, 24, 0.3


def score(params, batch):
    """The toy model, with low-rank factors beside the hidden kernel where there are some."""
    hidden = dict(params["hidden"])
    if "lora_a" in hidden:
        hidden["kernel"] = hidden["kernel"] + hidden.pop("lora_a") @ hidden.pop("lora_b")
    return toy.score({**params, "hidden": hidden}, batch)


def adapter(b_scale):
    keys = jax.random.split(jax.random.key(5), 2)
    a = jax.random.normal(keys[0], (toy.WIDTH, RANK))
    return {"hidden": {"lora_a": a, "lora_b": b_scale * jax.random.normal(keys[1], (RANK, toy.WIDTH))}}


def adapter_state(b_scale=0.0):
    trainable = adapter(b_scale)
    _, optimizer = start_state(config=ADAM, params=trainable)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=toy.init(),
        optimizer_state=optimizer.init(trainable),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )
    return state, optimizer


def with_ids(batch):
    ids = np.stack([batch["row_ids"], np.zeros_like(batch["row_ids"])], axis=1)[:, None]
    return {**batch, "pair_ids": ids.astype(np.int32)}


def numpy_dpo(params, base, batch):
    """DPO as TRL computes it: log-probabilities of whole answers, summed over their tokens, under both models; the loss
    is minus the log of the sigmoid of beta times (chosen minus rejected under the model, minus the same under the
    reference), averaged over pairs; rewards are beta times the log-ratio of one answer.
    """
    losses, rewards = [], []
    sums = []
    for model in (params, base):
        log_probs = np.asarray(score(model, batch).log_probs, np.float64)
        sums.append([[log_probs[row][slots == slot].sum() for slot in (1, 2)] for row, slots in rows_of(batch)])
    for policy, against in zip(*sums, strict=True):
        logits = (policy[0] - policy[1]) - (against[0] - against[1])
        losses.append(np.log1p(np.exp(-BETA * logits)))
        rewards.append([BETA * (mine - theirs) for mine, theirs in zip(policy, against, strict=True)])
    return np.mean(losses), np.mean(rewards, axis=0)


def rows_of(batch):
    """The rows with two answers: their number and slots."""
    slots = np.where(batch["targets"] == IGNORE, 0, batch["answer_slots"])
    return [(row, one) for row, one in enumerate(slots) if {1, 2} <= set(one.tolist())]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_adapter_off_is_the_reference(accumulation):
    objective = objectives.dpo(BETA)
    state, optimizer = adapter_state()
    step = jax.jit(make_train_step(score, objective, optimizer, accumulation=accumulation))
    for number in range(3):
        batch = toy.make_batch(seed=number)
        expected, rewards = numpy_dpo(merge(state.trainable, state.frozen), state.frozen, batch)
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
        assert float(metrics["rewards/chosen"]) == pytest.approx(rewards[0], rel=1e-4, abs=1e-6)
        assert float(metrics["rewards/rejected"]) == pytest.approx(rewards[1], rel=1e-4, abs=1e-6)
        if number == 0:
            assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-6)
            assert float(metrics["rewards/margins"]) == 0
    assert float(metrics["rewards/margins"]) != 0


@pytest.mark.parametrize("b_scale", [0.0, 0.5])
def test_stored_and_adapter_off_make_the_same_step(b_scale):
    """Loss, metrics and what the step makes of the adapter, at its beginning and when it has moved."""
    state, optimizer = adapter_state(b_scale)
    base = jax.jit(make_reference_step(score))
    batch = with_ids(toy.make_batch())
    stored = {**batch, "reference_logps": base({}, state.frozen, batch)}
    off, off_metrics = jax.jit(make_train_step(score, objectives.dpo(BETA), optimizer))(state, batch)
    on, on_metrics = jax.jit(make_train_step(score, objectives.dpo(BETA, "stored"), optimizer))(state, stored)
    for first, second in ((off.trainable, on.trainable), (off_metrics, on_metrics)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, second)
    expected, _ = numpy_dpo(merge(state.trainable, state.frozen), state.frozen, batch)
    assert float(on_metrics["loss"]) == pytest.approx(expected, rel=1e-5)


class ToyPairs:
    """The rows of the toy's data set that have two answers, in batches of four."""

    fingerprint = "data"

    def __init__(self, batches=150):
        self.batches, self.given = batches, []
        self.ids = np.concatenate([self._real(number)[:, 0] for number in range(batches)])

    def _real(self, number):
        batch = row_batch(4 * number + np.arange(4))
        return with_ids(batch)["pair_ids"][[row for row, _ in rows_of(batch)]]

    def __len__(self):
        return self.batches

    def __getitem__(self, number):
        self.given.append(number)
        batch = with_ids(row_batch(4 * number + np.arange(4)))
        with_pair = np.isin(np.arange(4), [row for row, _ in rows_of(batch)])
        batch["pair_ids"] = np.where(with_pair[:, None, None], batch["pair_ids"], -1)
        return batch


def row_batch(numbers):
    """Rows of a data set by number."""
    whole = toy.make_batch(rows=600, seed=3)
    return {name: values[numbers] for name, values in whole.items()} | {"row_ids": np.asarray(numbers, np.int32)}


class RowIterator(toy.ToyIterator):
    def __next__(self):
        self.position += 1
        self.seen.append(self.position)
        return with_ids(row_batch((7 * self.position + 11 * np.arange(8)) % 600))


def config(steps=4):
    phase = default_phase(
        "align",
        objective={"name": "dpo", "beta": BETA, "reference": "stored"},
        batch_size=8,
        accumulation=2,
        steps=steps,
        optimizer={"learning_rate": 1e-2},
    )
    return toy.toy_config(checkpoint_every=2, phases=(phase,))


def run(workdir, pairs, *, say=None, seen=None, **task):
    lines = []

    def both(line):
        lines.append(line)
        if say is not None:
            say(line)

    task = dataclasses.replace(toy.make_task(seen, iterator=RowIterator, **task), pairs=lambda index: pairs)
    return loop.train(config(), workdir, task=task, say=both), lines


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


class Crash(Exception):
    pass


def crash_at(prefix):
    def say(line):
        if line.startswith(prefix):
            raise Crash

    return say


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir, pairs = tmp_path_factory.mktemp("runs") / "whole", ToyPairs()
    params, lines = run(workdir, pairs)
    assert f"reference log-probabilities of {len(pairs.ids)} pairs: 3 of 3 parts to compute" in lines
    assert pairs.given == list(range(150))
    return workdir, params


def test_a_run_compares_with_the_model_it_began_with(whole):
    workdir, params = whole
    start = toy.make_task().init_params(jax.random.key(0))
    first = losses(workdir)[0]
    assert first == pytest.approx(np.log(2), rel=1e-6)
    stored = reference.load_references(workdir / "reference" / "align", ToyPairs())
    batch = with_ids(row_batch(np.arange(40)))
    sums = objectives.answer_log_probs(score(start, batch).log_probs, batch, slots=2)
    paired = [row for row, _ in rows_of(batch)]
    np.testing.assert_allclose(stored.of(batch["pair_ids"])[paired], sums[np.array(paired)], rtol=1e-5)
    assert not np.allclose(params["head"]["kernel"], start["head"]["kernel"])


def test_a_pass_that_was_killed_goes_on_with_what_is_missing(whole, tmp_path, monkeypatch):
    write, written = reference._write, []

    def write_one(*arguments):
        if written:
            raise Crash
        written.append(write(*arguments))

    monkeypatch.setattr(reference, "_write", write_one)
    with pytest.raises(Crash):
        run(tmp_path / "cut", ToyPairs())
    monkeypatch.undo()
    pairs = ToyPairs()
    params, lines = run(tmp_path / "cut", pairs)
    assert any("2 of 3 parts to compute" in line for line in lines)
    assert pairs.given == list(range(64, 150))
    jax.tree.map(np.testing.assert_array_equal, params, whole[1])
    assert losses(tmp_path / "cut") == losses(whole[0])


def test_a_run_that_goes_on_reads_what_is_stored(whole, tmp_path):
    with pytest.raises(Crash):
        run(tmp_path / "cut", ToyPairs(), say=crash_at("step 3/4"))
    pairs = ToyPairs()
    params, lines = run(tmp_path / "cut", pairs)
    assert not pairs.given and not any("parts to compute" in line for line in lines)
    jax.tree.map(np.testing.assert_array_equal, params, whole[1])


def test_a_pass_stops_when_it_is_asked_to(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Preempted, match="0 of 3 parts stored"):
        reference.compute_references(
            tmp_path / "align", ToyPairs(), toy.init(), lambda batch: None, say=lambda line: None, stop=stop
        )


def compute(folder, pairs, params=None, value=1.0):
    """A quick pass; the line it printed."""
    lines = []
    reference.compute_references(
        folder,
        pairs,
        params or toy.init(),
        lambda batch: np.full((4, 2), value, np.float32),
        say=lines.append,
        stop=threading.Event(),
    )
    return lines


def test_what_is_of_another_model_is_computed_anew(tmp_path):
    pairs, folder = ToyPairs(4), tmp_path / "align"
    compute(folder, pairs)
    assert compute(folder, pairs, value=2.0) == []
    assert reference.load_references(folder, pairs).of(pairs.ids[None]).max() == 1
    other = jax.tree.map(lambda x: x, toy.init())
    other["head"]["kernel"] = other["head"]["kernel"].at[0, 0].add(1e-6)
    lines = compute(folder, pairs, other, value=2.0)
    assert "of another model or other data: computing them anew" in lines[0]
    assert reference.load_references(folder, pairs).of(pairs.ids[None]).max() == 2


def test_what_cannot_be_used_is_refused(tmp_path):
    pairs, folder = ToyPairs(4), tmp_path / "align"
    with pytest.raises(InputError, match="are gone: there is no .*align. Put"):
        reference.load_references(folder, pairs)
    compute(folder, pairs)
    changed = ToyPairs(4)
    changed.fingerprint = "other data"
    with pytest.raises(InputError, match="are of other data than this phase's"):
        reference.load_references(folder, changed)
    part = folder / "00000.npz"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="00000.npz cannot be read"):
        reference.load_references(folder, pairs)
    part.unlink()
    with pytest.raises(InputError, match="00000.npz cannot be read"):
        reference.load_references(folder, pairs)
    with pytest.raises(InputError, match="a log-probability that is not finite"):
        compute(folder, pairs, value=np.nan)
