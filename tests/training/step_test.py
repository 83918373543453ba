import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phantom_jax import objectives
from phantom_jax.batch import IGNORE
from phantom_jax.training import state as states
from phantom_jax.training.optimizer import make_optimizer
from phantom_jax.training.step import make_train_step, make_validation_step, split_rows
from tests.training.toy import WIDTH, Scores, init, make_batch, score

ADAM = {
    "learning_rate": 1e-2,
    "end_learning_rate": 0.0,
    "schedule": "cosine",
    "warmup_fraction": 0.0,
    "weight_decay": 0.0,
    "decay_vectors": False,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "clip_norm": 1.0,
}


def start(patterns=("**",), config=ADAM, params=None):
    params = init() if params is None else params
    optimizer = make_optimizer(config, states.split(params, patterns)[0], steps=10)
    state = states.start_phase(params, patterns=patterns, init_optimizer=optimizer.init, compute_dtype=jnp.float32)
    return state, optimizer


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


def test_a_step_is_plain_adam_on_the_objective():
    objective, batch = objectives.phantom_optimization(), make_batch()
    state, optimizer = start()
    new_state, metrics = jax.jit(make_train_step(score, objective, optimizer))(state, batch)

    def loss(params):
        terms = objective.terms(score(params, batch).log_probs, batch)
        return terms["sft"].mean() + terms["preference"].mean()

    value, gradients = jax.value_and_grad(loss)(init())
    schedule = optax.cosine_decay_schedule(1e-2, 10)
    peer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.99))
    updates, _ = peer.update(gradients, peer.init(init()))
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    assert_close(new_state.trainable, optax.apply_updates(init(), updates), rtol=1e-5, atol=1e-6)
    assert int(new_state.step) == 1


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_is_exact_although_micro_batches_weigh_differently(accumulation):
    objective, batch = objectives.phantom_optimization(), make_batch()
    # A large eps: the sign-like first step of Adam would hide or blow up rounding.
    state, optimizer = start(config=ADAM | {"eps": 1.0})
    whole, whole_metrics = jax.jit(make_train_step(score, objective, optimizer))(state, batch)
    parts, parts_metrics = jax.jit(make_train_step(score, objective, optimizer, accumulation=accumulation))(
        state, batch
    )
    assert_close(parts.trainable, whole.trainable, rtol=2e-6, atol=2e-7)
    assert_close(parts_metrics, whole_metrics, rtol=2e-6, atol=2e-6)


def test_rows_on_eight_devices_give_the_step_of_one():
    objective, batch = objectives.phantom_optimization(), make_batch(rows=16)
    state, optimizer = start(config=ADAM | {"eps": 1.0})
    step = jax.jit(make_train_step(score, objective, optimizer, accumulation=2))
    expected, expected_metrics = step(state, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    actual, metrics = step(jax.device_put(state, everywhere), jax.device_put(batch, rows))
    assert_close(actual.trainable, expected.trainable, rtol=2e-6, atol=2e-7)
    assert_close(metrics, expected_metrics, rtol=2e-6, atol=2e-6)


def test_split_rows_keeps_every_row_once():
    parts = split_rows({"row_ids": np.arange(8), "token_ids": np.arange(16).reshape(8, 2)}, 4)
    assert parts["token_ids"].shape == (4, 2, 2)
    assert sorted(np.ravel(parts["row_ids"]).tolist()) == list(range(8))
    np.testing.assert_array_equal(parts["token_ids"][..., 0], 2 * parts["row_ids"])


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
    state, optimizer = start(patterns=("hidden/**",))
    new_state, _ = jax.jit(make_train_step(score, objectives.sft(), optimizer))(state, make_batch())
    assert_equal(new_state.frozen, state.frozen)
    assert set(new_state.trainable) == {"hidden"}
    assert not np.array_equal(new_state.trainable["hidden"]["kernel"], init()["hidden"]["kernel"])
    for leaf in jax.tree.leaves(new_state.optimizer_state):
        assert leaf.shape in ((), (WIDTH, WIDTH))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(poison):
    state, optimizer = start()

    def poisoned(params, batch):
        scores = score(params, batch)
        factor = jnp.where(jnp.any(batch["row_ids"] < 0), poison, 1.0)
        return Scores(scores.log_probs * factor, scores.correct)

    step = jax.jit(make_train_step(poisoned, objectives.sft(), optimizer))
    good, bad = make_batch(), make_batch() | {"row_ids": np.full(8, -1, np.int32)}
    state, metrics = step(state, good)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (0, 0)
    for count in (1, 2):
        skipped, metrics = step(state, bad)
        assert_equal(skipped.trainable, state.trainable)
        assert_equal(skipped.optimizer_state, state.optimizer_state)
        assert int(skipped.step) == int(state.step) + 1
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (count, count)
        assert not np.isfinite(metrics["loss"])
        state = skipped
    state, metrics = step(state, good)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert np.isfinite(metrics["loss"]) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is():
    state, optimizer = start()

    def steep(params, batch):
        scores = score(params, batch)
        # sqrt at 0: the value is finite, its slope is not.
        return Scores(scores.log_probs - jnp.sqrt(0.0 * params["head"]["kernel"][0, 0]), scores.correct)

    skipped, metrics = jax.jit(make_train_step(steep, objectives.sft(), optimizer))(state, make_batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert_equal(skipped.trainable, state.trainable)
    assert int(skipped.skipped) == 1


def test_metrics():
    state, optimizer = start()
    batch = make_batch()
    _, metrics = jax.jit(make_train_step(score, objectives.phantom_optimization(), optimizer))(state, batch)
    assert set(metrics) == {
        *(
            "loss",
            "sft",
            "preference",
            "mean_token_accuracy",
            "grad_norm",
            "learning_rate",
            "skipped",
            "skipped_in_a_row",
        ),
        *(
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
        ),
    }
    correct = np.asarray(score(init(), batch).correct)
    assert float(metrics["mean_token_accuracy"]) == pytest.approx(correct[batch["sft_mask"]].mean())
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)


def test_donated_state_gives_the_same_and_is_gone():
    batch = make_batch()
    state, optimizer = start()
    step = make_train_step(score, objectives.sft(), optimizer)
    expected, _ = jax.jit(step)(state, batch)
    donated = jax.tree.map(jnp.copy, state)
    actual, _ = jax.jit(step, donate_argnums=0)(donated, batch)
    assert_equal(actual, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated.trainable))


def test_the_same_step_twice_is_bit_equal():
    state, optimizer = start()
    step = jax.jit(make_train_step(score, objectives.phantom_optimization(), optimizer, accumulation=2))
    assert_equal(step(state, make_batch()), step(state, make_batch()))


def test_validation_counts_answers_that_are_right_to_the_last_token():
    correct = np.ones((3, 6), bool)
    correct[0, 2] = False  # a token of the first answer of row 0
    correct[1, 5] = False  # a token of a rejected answer: does not count
    slots = np.array([[0, 1, 1, 3, 3, 0], [1, 1, 1, 0, 2, 2], [0, 0, 0, 0, 0, 0]], np.int32)
    batch = {
        "targets": np.where(slots > 0, 1, IGNORE).astype(np.int32),
        "answer_slots": slots,
        "sft_mask": slots % 2 == 1,
    }
    log_probs = np.where(slots > 0, -0.5, 0.0).astype(np.float32)
    step = jax.jit(make_validation_step(lambda params, batch: Scores(jnp.asarray(log_probs), jnp.asarray(correct))))
    sums = jax.tree.map(float, step({}, {}, batch))
    assert sums == {"loss": (3.5, 7.0), "exact_match": (2.0, 3.0)}
