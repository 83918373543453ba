"""A bigram model on random tokens, with all that the loop asks of a task. As a program it runs in a given workdir."""

import dataclasses
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.batch import IGNORE
from phantom_jax.config import default_config, default_phase
from phantom_jax.errors import Preempted
from phantom_jax.training.task import Task

VOCAB, WIDTH = 11, 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scores:
    log_probs: jax.Array
    correct: jax.Array


def score(params, batch):
    """A bigram model: the next token from this one, through a hidden layer."""
    x_BLD = params["embed"]["table"][batch["token_ids"]]
    x_BLD = jnp.tanh(jnp.einsum("bld,de->ble", x_BLD, params["hidden"]["kernel"]))
    logits_BLV = jnp.einsum("bld,dv->blv", x_BLD, params["head"]["kernel"])
    targets_BL = batch["targets"]
    safe_BL = jnp.where(targets_BL == IGNORE, 0, targets_BL)
    log_probs_BLV = jax.nn.log_softmax(logits_BLV)
    log_probs = jnp.take_along_axis(log_probs_BLV, safe_BL[..., None], axis=-1)[..., 0]
    counted_BL = targets_BL != IGNORE
    return Scores(jnp.where(counted_BL, log_probs, 0.0), ~counted_BL | (jnp.argmax(logits_BLV, axis=-1) == targets_BL))


def init():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": {"table": jax.random.normal(keys[0], (VOCAB, WIDTH))},
        "hidden": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH))},
        "head": {"kernel": jax.random.normal(keys[2], (WIDTH, VOCAB))},
    }


def make_batch(rows=8, length=10, seed=0):
    """Rows with different numbers of supervised tokens; every third one without a rejected answer."""
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    targets = np.roll(token_ids, -1, axis=1)
    slots = np.zeros((rows, length), np.int32)
    for row in range(rows):
        chosen = 1 + rng.integers(1, 4)
        slots[row, 1 : 1 + chosen] = 1
        if row % 3:
            slots[row, 6 : 6 + rng.integers(1, 4)] = 2
    return {
        "token_ids": token_ids,
        "targets": np.where(slots > 0, targets, IGNORE).astype(np.int32),
        "sft_mask": slots == 1,
        "answer_slots": slots,
        "segment_ids": np.ones((rows, length), np.int32),
        "image_slots": np.where(np.arange(length) < 2, 0, -1) * np.ones((rows, 1), np.int32),
        "row_ids": np.arange(rows, dtype=np.int32),
    }


class ToyIterator:
    """Batches of a phase by number; keeps the row ids of all it gave."""

    def __init__(self, phase, seen, rows=8):
        self.phase, self.seen, self.rows, self.position = phase, seen, rows, 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = make_batch(self.rows, seed=1000 * self.phase + self.position)
        batch["row_ids"] = np.arange(self.rows, dtype=np.int32) + self.rows * (1000 * self.phase + self.position)
        self.position += 1
        self.seen.append(batch["row_ids"].tolist())
        return batch

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def toy_config(*, steps=(7, 6), checkpoint_every=3, **values):
    """Two phases: PO on the head with accumulation, then SFT on everything with two parameter groups."""
    config = default_config()
    config.model.name = "toy"
    config.checkpoint.every = checkpoint_every
    config.validation.every = 4
    config.phases = (
        default_phase(
            "first",
            trainable=("head/**",),
            objective={"name": "phantom_optimization"},
            batch_size=8,
            accumulation=2,
            steps=steps[0],
            optimizer={"learning_rate": 1e-2, "warmup_fraction": 0.2},
        ),
        default_phase(
            "second",
            batch_size=8,
            steps=steps[1],
            optimizer={"learning_rate": 3e-3, "weight_decay": 0.1},
            groups=({"patterns": ("embed/**",), "learning_rate": 1e-3},),
        ),
    )
    config.update(values)
    return config


def make_task(seen=None, *, score=score, iterator=ToyIterator, export=None):
    seen = [] if seen is None else seen
    validation = [make_batch(4, seed=99), make_batch(4, seed=98)]
    return Task(
        init_params=lambda key: jax.tree.map(lambda x: x + 0.01 * jax.random.normal(key, x.shape), init()),
        score=score,
        train_iterator=lambda phase: iterator(phase, seen),
        validation_batches=lambda: validation,
        export=export,
    )


class SlowIterator(ToyIterator):
    """Leaves time to be killed in, and says on the output that a batch was given."""

    def __next__(self):
        time.sleep(0.02)
        return super().__next__()


class SelfStopping(ToyIterator):
    """Asks for a stop with a real signal at its fifth batch."""

    def __next__(self):
        if self.position == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


def main(workdir, *options):
    from phantom_jax.training.loop import train

    iterator = SelfStopping if "stop" in options else SlowIterator
    try:
        train(toy_config(steps=(30, 30)), workdir, task=make_task(iterator=iterator))
    except Preempted as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
