"""Training objectives: supervised fine-tuning and preference optimisation, as sums and weights.

An objective does not return a loss but named terms, each a sum over the batch and the weight to divide it by. The loss
is `sum(coefficient * global sum / global weight)`. Weights come from the labels alone, so the whole batch's weights are
known before the first backward pass: micro-batches and devices add up to exactly the loss and gradient of one large
batch, also where supervised fine-tuning counts tokens and a preference counts pairs.

A pair is a chosen and a rejected answer to one question (`answer_slots` 2k + 1 and 2k + 2 of a row). A question without
a rejected answer has no pair and counts for supervised fine-tuning alone.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phantom_jax.batch import IGNORE, Batch
from phantom_jax.errors import InputError


class Term(NamedTuple):
    """A sum over examples and the weight that turns it into a mean.

    Attributes:
      total: float32 scalar.
      weight: float32 scalar, the number of tokens, pairs or answers that the sum runs over.
    """

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """`total / weight`, 0 where nothing was counted."""
        return self.total * reciprocal(self.weight)


class Objective(NamedTuple):
    """A loss as named terms.

    Attributes:
      terms: `(log_probs_BL, batch) -> {name: Term}`. Every term of the loss, and metrics beside them. log_probs_BL are
        the float32 log-probabilities of `batch["targets"]`, 0 where the target is `IGNORE`.
      weights: `batch -> {name: weight}` for exactly the names of `terms`; reads labels only.
      coefficients: factor of each term in the loss. A term without one is a metric.
      reference: where `reference_logps` come from that `terms` reads: `stored` is in the batch, `adapter_off` is for
        the training step to compute. None reads none.
    """

    terms: Callable[[jax.Array, Batch], dict[str, Term]]
    weights: Callable[[Batch], dict[str, jax.Array]]
    coefficients: Mapping[str, float]
    reference: str | None = None

    def loss(self, totals: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> jax.Array:
        """The loss from sums, of a whole batch or of a part of it, and the weights of the whole batch."""
        return sum(value * totals[name] * reciprocal(weights[name]) for name, value in self.coefficients.items())


class Answers(NamedTuple):
    """Sums over each scored answer of each row, [B, K] with K an upper bound of the pairs of a row.

    Attributes:
      chosen: sum over the tokens of the chosen answer.
      rejected: sum over the tokens of the rejected answer.
      chosen_tokens: float32 |y+|, how many supervised tokens the chosen answer has, its end marker among them.
      rejected_tokens: float32 |y-|.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array

    @property
    def paired(self) -> jax.Array:
        """[B, K] bool, where both answers are there."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)


def reciprocal(weight: jax.Array) -> jax.Array:
    """`1 / weight`, and 0 for a weight of 0: a batch without pairs has no preference loss, rather than NaN."""
    return jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1.0), 0.0)


def supervised_mask(batch: Batch) -> jax.Array:
    """[B, L] bool: the targets that supervised fine-tuning counts."""
    return batch["sft_mask"] & (batch["targets"] != IGNORE)


def sum_answers(values_BL: jax.Array, batch: Batch, *, slots: int | None = None) -> Answers:
    """Sums per-token values over each scored answer.

    Args:
      values_BL: values at the targets, [B, L].
      batch: of which `targets` and `answer_slots` are read.
      slots: how many answer slots a row has, an even number; larger ones are dropped. None takes a bound that holds
        for every row, since each answer has a token.
    """
    if slots is None:
        slots = 2 * ((batch["answer_slots"].shape[1] + 1) // 2)
    scored = (batch["answer_slots"] > 0) & (batch["targets"] != IGNORE)
    # Unscored tokens go to a slot of their own, past the end, and are dropped.
    slots_BL = jnp.where(scored, batch["answer_slots"] - 1, slots)

    def row_sums(values_L, slots_L):
        return jax.ops.segment_sum(values_L, slots_L, num_segments=slots)

    sums_BS = jax.vmap(row_sums)(values_BL.astype(jnp.float32), slots_BL)
    counts_BS = jax.vmap(row_sums)(scored.astype(jnp.float32), slots_BL)
    return Answers(sums_BS[:, 0::2], sums_BS[:, 1::2], counts_BS[:, 0::2], counts_BS[:, 1::2])


def answer_log_probs(log_probs_BL: jax.Array, batch: Batch, *, slots: int | None = None) -> jax.Array:
    """[B, slots] float32, the log-probability of each scored answer as a whole: what `reference_logps` holds.

    Args:
      log_probs_BL: of the targets.
      batch: see `sum_answers`.
      slots: see `sum_answers`.
    """
    answers = sum_answers(log_probs_BL, batch, slots=slots)
    return jnp.stack([answers.chosen, answers.rejected], axis=2).reshape(answers.chosen.shape[0], -1)


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    # Where, not a product: a masked value that is not finite must not reach the sum.
    return jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.float32)


def _sft_term(log_probs_BL: jax.Array, batch: Batch) -> Term:
    mask_BL = supervised_mask(batch)
    return Term(_masked_sum(-log_probs_BL, mask_BL), _count(mask_BL))


_PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def _pair_terms(loss_BK, rewards, logps, paired_BK) -> dict[str, Term]:
    chosen_BK, rejected_BK = rewards
    values = {
        "preference": loss_BK,
        "rewards/chosen": chosen_BK,
        "rewards/rejected": rejected_BK,
        "rewards/accuracies": (chosen_BK > rejected_BK).astype(jnp.float32),
        "rewards/margins": chosen_BK - rejected_BK,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    weight = _count(paired_BK)
    return {name: Term(_masked_sum(value, paired_BK), weight) for name, value in values.items()}


def _pair_weights(batch: Batch, *, slots: int | None = None) -> dict[str, jax.Array]:
    answers = sum_answers(jnp.zeros(batch["targets"].shape, jnp.float32), batch, slots=slots)
    weight = _count(answers.paired)
    return dict.fromkeys(("preference", *_PAIR_METRICS), weight)


def _mean_log_probs(log_probs_BL: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    answers = sum_answers(log_probs_BL, batch)
    chosen_BK = answers.chosen / jnp.maximum(answers.chosen_tokens, 1.0)
    rejected_BK = answers.rejected / jnp.maximum(answers.rejected_tokens, 1.0)
    return chosen_BK, rejected_BK, answers.paired


def sft() -> Objective:
    """Supervised fine-tuning: the mean negative log-likelihood of the tokens of the chosen answers.

    Returns:
      An objective of one term, `sft`, whose weight counts the supervised tokens, end markers among them, of the whole
      batch: every token counts the same, whichever row or device it is on.
    """

    def terms(log_probs_BL, batch):
        return {"sft": _sft_term(log_probs_BL, batch)}

    def weights(batch):
        return {"sft": _count(supervised_mask(batch))}

    return Objective(terms, weights, {"sft": 1.0})


def simpo(beta: float = 2.0, gamma: float = 0.5) -> Objective:
    """Simple preference optimisation: length-normalised, without a reference model.

    The mean over pairs of `-log sigmoid(beta / |y+| log p(y+|x) - beta / |y-| log p(y-|x) - gamma)`.

    Args:
      beta: scale of the rewards.
      gamma: margin by which the chosen answer's reward must be larger. It is absolute: libraries that take a ratio of
        gamma to beta are given `gamma / beta`.

    Returns:
      An objective of the term `preference` and the metrics `rewards/*` (beta times the mean log-probability of a token)
      and `logps/*` (that mean itself). Accuracies and margins leave gamma out.

    References:
      Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024 (arXiv 2405.14734), eq. 6.
    """

    def terms(log_probs_BL, batch):
        chosen_BK, rejected_BK, paired_BK = _mean_log_probs(log_probs_BL, batch)
        loss_BK = -jax.nn.log_sigmoid(beta * (chosen_BK - rejected_BK) - gamma)
        return _pair_terms(loss_BK, (beta * chosen_BK, beta * rejected_BK), (chosen_BK, rejected_BK), paired_BK)

    return Objective(terms, _pair_weights, {"preference": 1.0})


def phantom_optimization(beta: float = 2.0, gamma: float = 0.5, sft_weight: float = 1.0) -> Objective:
    """Phantom optimisation: supervised fine-tuning on the chosen answer plus SimPO's preference term.

    Args:
      beta: see `simpo`.
      gamma: see `simpo`.
      sft_weight: factor of the supervised term. The paper adds it with 1.

    Returns:
      An objective of the terms `sft` (mean over the chosen tokens of the batch) and `preference` (mean over its pairs),
      and the metrics of `simpo`.

    References:
      Lee et al., Phantom of Latent for Large Language and Vision Models, 2024 (arXiv 2409.14713), eq. 4. The paper does
      not say whether |y| holds the end marker (here it does) nor over what the supervised term is averaged.
    """
    return _with_sft(simpo(beta, gamma), {"sft": sft_weight, "preference": 1.0})


def dpo(beta: float = 0.1, reference: str = "adapter_off") -> Objective:
    """Direct preference optimisation against a reference model.

    The mean over pairs of `-log sigmoid(beta (log(p(y+|x) / r(y+|x)) - log(p(y-|x) / r(y-|x))))`, of whole answers and
    not normalised by length.

    Args:
      beta: scale of the rewards, the strength with which the reference holds.
      reference: `adapter_off`, the model without its low-rank adapter, which the training step runs beside the model,
        or `stored`, log-probabilities that the batch brings.

    Returns:
      An objective of the term `preference` and the metrics `rewards/*` (beta times the log-ratio to the reference) and
      `logps/*` (log-probability of the whole answer). Its terms read `reference_logps`, [B, number of slots], of which
      entry 2k is for the chosen and entry 2k + 1 for the rejected answer of pair k.

    Raises:
      InputError: the reference is of neither kind; when traced, a batch has no reference log-probabilities, or an odd
        number of slots.

    References:
      Rafailov et al., Direct Preference Optimization, 2023 (arXiv 2305.18290), eq. 7.
    """

    if reference not in REFERENCES:
        raise InputError(f"dpo's reference is {reference!r}; it must be one of {', '.join(REFERENCES)}.")

    def given(batch) -> jax.Array:
        reference_BS = batch.get("reference_logps")
        if reference_BS is None:
            raise InputError(
                "Objective 'dpo' needs reference_logps in the batch, the answers' log-probabilities under the reference"
                " model, and this batch has none. Add them to the data, or take 'simpo', which needs no reference."
            )
        if reference_BS.shape[1] % 2:
            raise InputError(
                f"reference_logps has {reference_BS.shape[1]} slots a row. Each pair has two: give an even number."
            )
        return reference_BS

    def terms(log_probs_BL, batch):
        reference_BS = given(batch).astype(jnp.float32)
        answers = sum_answers(log_probs_BL, batch, slots=reference_BS.shape[1])
        chosen_BK = beta * (answers.chosen - reference_BS[:, 0::2])
        rejected_BK = beta * (answers.rejected - reference_BS[:, 1::2])
        loss_BK = -jax.nn.log_sigmoid(chosen_BK - rejected_BK)
        return _pair_terms(loss_BK, (chosen_BK, rejected_BK), (answers.chosen, answers.rejected), answers.paired)

    def weights(batch):
        # What the step computes comes later than the weights, and has a slot for every answer.
        return _pair_weights(batch, slots=given(batch).shape[1] if reference == "stored" else None)

    return Objective(terms, weights, {"preference": 1.0}, reference)


def orpo(beta: float = 0.1) -> Objective:
    """Odds ratio preference optimisation: supervised fine-tuning plus the log odds ratio of the two answers.

    The odds are those of the geometric mean probability p of an answer's tokens: `log odds = log p - log(1 - p)`.

    Args:
      beta: factor of the odds ratio term, the paper's lambda.

    Returns:
      An objective of the terms `sft` and `preference` and the metrics `rewards/*` (beta times the mean log-probability
      of a token) and `logps/*` (that mean itself).

    References:
      Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024 (arXiv 2403.07691), eq. 6, 7.
    """

    def terms(log_probs_BL, batch):
        chosen_BK, rejected_BK, paired_BK = _mean_log_probs(log_probs_BL, batch)
        # The mean of an absent answer is 0, where log odds are steepest: keep it away from them.
        odds_BK = [log_odds(jnp.where(paired_BK, mean_BK, -1.0)) for mean_BK in (chosen_BK, rejected_BK)]
        loss_BK = -jax.nn.log_sigmoid(odds_BK[0] - odds_BK[1])
        return _pair_terms(loss_BK, (beta * chosen_BK, beta * rejected_BK), (chosen_BK, rejected_BK), paired_BK)

    return _with_sft(Objective(terms, _pair_weights, {}), {"sft": 1.0, "preference": beta})


def log_odds(log_prob: jax.Array) -> jax.Array:
    """`log(p / (1 - p))` from `log p`, finite and with a finite slope up to p = 1.

    Log-probabilities above -eps (float32, 1.2e-7) count as -eps, the smallest that rounding tells from 0.
    """
    log_prob = jnp.minimum(log_prob, -jnp.finfo(jnp.float32).eps)
    # log(1 - p): each branch is accurate on its side of -log 2, and neither overflows on the other.
    small = log_prob > -0.6931472
    near_one = jnp.log(-jnp.expm1(jnp.where(small, log_prob, -0.5)))
    near_zero = jnp.log1p(-jnp.exp(jnp.where(small, -1.0, log_prob)))
    return log_prob - jnp.where(small, near_one, near_zero)


def _with_sft(preference: Objective, coefficients: Mapping[str, float]) -> Objective:
    supervised = sft()

    def terms(log_probs_BL, batch):
        return supervised.terms(log_probs_BL, batch) | preference.terms(log_probs_BL, batch)

    def weights(batch):
        return supervised.weights(batch) | preference.weights(batch)

    return Objective(terms, weights, dict(coefficients))


REFERENCES = ("adapter_off", "stored")
"""Where DPO's reference log-probabilities come from."""

OBJECTIVES = {"sft": sft, "phantom_optimization": phantom_optimization, "simpo": simpo, "dpo": dpo, "orpo": orpo}
"""Every objective by the name that a config gives it; its arguments are the config's other keys."""
