import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax import objectives
from phantom_jax.batch import IGNORE
from phantom_jax.errors import InputError

# Two rows. Row 0: pair 0 with 3 chosen and 2 rejected tokens, pair 1 with 1 and 1. Row 1: an answer without a rejected
# one, 2 tokens, and an earlier turn of 1 supervised token that is not scored.
SLOTS = np.array([[0, 1, 1, 1, 2, 2, 3, 4], [0, 0, 1, 1, 0, 0, 0, 0]], np.int32)
SFT = np.array([[0, 1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0]], bool)
TARGETS = np.where((SLOTS > 0) | SFT, 7, IGNORE).astype(np.int32)
LOG_PROBS = np.array([[0, -0.5, -1.0, -1.5, -2.0, -3.0, -0.25, -0.75], [0, -4.0, -0.1, -0.3, 0, 0, 0, 0]], np.float32)
CHOSEN = np.array([-1.0, -0.25])  # mean log-probability of a token
REJECTED = np.array([-2.5, -0.75])
NLL = (3.0 + 0.25 + 4.0 + 0.4) / 7

ALL = [
    objectives.sft(),
    objectives.phantom_optimization(),
    objectives.simpo(),
    objectives.dpo(),
    objectives.orpo(),
]


@pytest.fixture
def batch():
    reference = np.array([[-2.0, -6.0, -0.5, -0.5], [-1.0, 0.0, 0.0, 0.0]], np.float32)
    return {"targets": TARGETS, "sft_mask": SFT, "answer_slots": SLOTS, "reference_logps": reference}


def loss_of(objective, log_probs, batch):
    terms = objective.terms(jnp.asarray(log_probs), batch)
    return objective.loss({name: term.total for name, term in terms.items()}, objective.weights(batch))


def means(objective, log_probs, batch):
    return {name: float(term.mean()) for name, term in objective.terms(jnp.asarray(log_probs), batch).items()}


def softplus(x):
    return np.log1p(np.exp(x))


def test_sft_is_the_mean_over_all_supervised_tokens(batch):
    assert float(loss_of(objectives.sft(), LOG_PROBS, batch)) == pytest.approx(NLL, rel=1e-6)


def test_simpo_closed_form(batch):
    expected = softplus(-(2 * (CHOSEN - REJECTED) - 0.5)).mean()
    assert float(loss_of(objectives.simpo(2.0, 0.5), LOG_PROBS, batch)) == pytest.approx(expected, rel=1e-6)


def test_phantom_optimization_is_equation_4(batch):
    expected = NLL + softplus(-(2 * (CHOSEN - REJECTED) - 0.5)).mean()
    objective = objectives.phantom_optimization()
    assert float(loss_of(objective, LOG_PROBS, batch)) == pytest.approx(expected, rel=1e-6)
    terms = objective.terms(jnp.asarray(LOG_PROBS), batch)
    assert (float(terms["sft"].weight), float(terms["preference"].weight)) == (7.0, 2.0)
    half = objectives.phantom_optimization(sft_weight=0.5)
    assert float(loss_of(half, LOG_PROBS, batch)) == pytest.approx(expected - NLL / 2, rel=1e-6)


def test_dpo_closed_form(batch):
    log_ratios = (np.array([-3.0, -0.25]) - np.array([-2.0, -0.5])) - (np.array([-5.0, -0.75]) - np.array([-6.0, -0.5]))
    expected = softplus(-0.1 * log_ratios).mean()
    assert float(loss_of(objectives.dpo(0.1), LOG_PROBS, batch)) == pytest.approx(expected, rel=1e-6)
    metrics = means(objectives.dpo(0.1), LOG_PROBS, batch)
    assert metrics["logps/chosen"] == pytest.approx(-3.25 / 2)
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * (-1.0 + 0.25) / 2)


def test_orpo_closed_form(batch):
    log_odds = lambda x: x - np.log1p(-np.exp(x))  # noqa: E731
    expected = NLL + 0.1 * softplus(-(log_odds(CHOSEN) - log_odds(REJECTED))).mean()
    assert float(loss_of(objectives.orpo(0.1), LOG_PROBS, batch)) == pytest.approx(expected, rel=1e-6)


def test_preference_metrics_have_the_usual_names_and_values(batch):
    metrics = means(objectives.phantom_optimization(), LOG_PROBS, batch)
    expected = {
        "rewards/chosen": 2 * CHOSEN.mean(),
        "rewards/rejected": 2 * REJECTED.mean(),
        "rewards/accuracies": 1.0,
        "rewards/margins": 2 * (CHOSEN - REJECTED).mean(),
        "logps/chosen": CHOSEN.mean(),
        "logps/rejected": REJECTED.mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("objective", ALL)
def test_weights_need_labels_alone_and_match_the_terms(objective, batch):
    weights = objective.weights(batch)
    terms = objective.terms(jnp.asarray(LOG_PROBS), batch)
    assert weights.keys() == terms.keys()
    for name, term in terms.items():
        assert float(weights[name]) == float(term.weight)
    assert objective.coefficients.keys() <= terms.keys()


@pytest.mark.parametrize("objective", ALL)
def test_parts_add_up_to_the_whole(objective, batch):
    weights = objective.weights(batch)
    whole, whole_gradient = jax.value_and_grad(lambda x: loss_of(objective, x, batch))(jnp.asarray(LOG_PROBS))
    losses, gradients = [], []
    for row in range(2):
        part = {name: value[row : row + 1] for name, value in batch.items()}

        def loss(x, part=part):
            return objective.loss({name: term.total for name, term in objective.terms(x, part).items()}, weights)

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOG_PROBS[row : row + 1]))
        losses.append(float(value))
        gradients.append(gradient)
    assert sum(losses) == pytest.approx(float(whole), rel=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), whole_gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", ALL)
def test_no_pairs_give_zero_and_no_nan(objective, batch):
    batch["answer_slots"] = np.where(SLOTS % 2 == 1, SLOTS, 0)
    value, gradient = jax.value_and_grad(lambda x: loss_of(objective, x, batch))(jnp.asarray(LOG_PROBS))
    assert float(value) == pytest.approx(NLL if "sft" in objective.coefficients else 0.0, rel=1e-6)
    assert np.isfinite(gradient).all()
    assert np.all(gradient[~SFT] == 0)


@pytest.mark.parametrize("objective", ALL)
def test_an_empty_batch_gives_zero(objective, batch):
    batch |= {"targets": np.full_like(TARGETS, IGNORE), "sft_mask": np.zeros_like(SFT), "answer_slots": SLOTS * 0}
    value, gradient = jax.value_and_grad(lambda x: loss_of(objective, x, batch))(jnp.zeros_like(LOG_PROBS))
    assert float(value) == 0.0
    assert np.all(gradient == 0)


@pytest.mark.parametrize("objective", ALL)
def test_gradients_match_finite_differences(objective, batch):
    gradient = jax.grad(lambda x: loss_of(objective, x, batch))(jnp.asarray(LOG_PROBS))
    for row, column in itertools.product(range(2), range(8)):
        step = np.zeros_like(LOG_PROBS)
        step[row, column] = 1e-2
        difference = (loss_of(objective, LOG_PROBS + step, batch) - loss_of(objective, LOG_PROBS - step, batch)) / 2e-2
        assert float(gradient[row, column]) == pytest.approx(float(difference), abs=2e-4)


def test_the_unpaired_row_has_no_preference_gradient(batch):
    gradient = jax.grad(lambda x: loss_of(objectives.simpo(), x, batch))(jnp.asarray(LOG_PROBS))
    assert np.all(gradient[1] == 0)
    assert np.all(gradient[0, 1:4] < 0) and np.all(gradient[0, 4:6] > 0)


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("chosen, rejected", list(itertools.product([0.0, -1e-30, -1e-7, -50.0, -1e4], repeat=2)))
def test_extreme_log_probabilities_stay_finite(objective, chosen, rejected, batch):
    log_probs = np.where(SLOTS % 2 == 1, chosen, np.where(SLOTS > 0, rejected, 0)).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda x: loss_of(objective, x, batch))(jnp.asarray(log_probs))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_log_sigmoid_does_not_saturate(batch):
    log_probs = np.where(SLOTS % 2 == 1, -1e4, 0).astype(np.float32)
    # -log sigmoid(-z) = z for large z: the loss keeps growing and its slope stays 1.
    assert float(loss_of(objectives.simpo(2.0, 0.5), log_probs, batch)) == pytest.approx(2e4 + 0.5, rel=1e-6)


@pytest.mark.parametrize("log_prob", [-1e-6, -1e-3, -0.5, -0.7, -5.0, -40.0])
def test_log_odds(log_prob):
    expected = log_prob - math.log(-math.expm1(log_prob))
    assert float(objectives.log_odds(jnp.float32(log_prob))) == pytest.approx(expected, rel=1e-5)
    slope = float(jax.grad(objectives.log_odds)(jnp.float32(log_prob)))
    assert slope == pytest.approx(-1 / math.expm1(log_prob), rel=1e-5)


def test_values_at_ignored_targets_do_not_matter(batch):
    for objective in ALL:
        poisoned = np.where(TARGETS == IGNORE, np.nan, LOG_PROBS)
        assert float(loss_of(objective, poisoned, batch)) == float(loss_of(objective, LOG_PROBS, batch))


def test_dpo_without_reference_says_what_to_do(batch):
    del batch["reference_logps"]
    with pytest.raises(InputError, match="reference_logps.*simpo"):
        objectives.dpo(reference="stored").weights(batch)
    with pytest.raises(InputError, match="reference_logps.*simpo"):
        objectives.dpo().terms(LOG_PROBS, batch)


def test_dpo_refuses_half_a_pair(batch):
    batch["reference_logps"] = batch["reference_logps"][:, :3]
    with pytest.raises(InputError, match="3 slots"):
        objectives.dpo(reference="stored").weights(batch)


def test_dpo_refuses_a_reference_of_no_kind():
    with pytest.raises(InputError, match="'sored'; it must be one of adapter_off, stored"):
        objectives.dpo(reference="sored")


def test_the_log_probabilities_of_answers_are_in_the_order_of_their_slots(batch):
    sums = objectives.answer_log_probs(jnp.asarray(LOG_PROBS), batch, slots=4)
    np.testing.assert_allclose(sums, [[-3.0, -5.0, -0.25, -0.75], [-0.4, 0.0, 0.0, 0.0]], rtol=1e-6)


def test_jit_gives_the_same(batch):
    for objective in ALL:
        jitted = jax.jit(lambda x, b, o=objective: loss_of(o, x, b))(LOG_PROBS, batch)
        assert float(jitted) == pytest.approx(float(loss_of(objective, LOG_PROBS, batch)), rel=1e-6)
