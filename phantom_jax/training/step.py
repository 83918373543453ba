"""One training step and one validation step, as pure functions to be compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phantom_jax.batch import Batch
from phantom_jax.lora import NO_LORA, Lora
from phantom_jax.objectives import Objective, answer_log_probs, reciprocal, sum_answers, supervised_mask
from phantom_jax.training.optimizer import Optimizer
from phantom_jax.training.state import TrainState, merge
from phantom_jax.trees import Params

Score = Callable[[Params, Batch], Any]
"""`(params, batch) -> scores` with `scores.log_probs`, float32, 0 where the target is IGNORE, and
`scores.correct`, bool, whether the likeliest token is the target."""


def make_train_step(
    score: Score,
    objective: Objective,
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    constrain_gradients: Callable[[Params], Params] = lambda gradients: gradients,
    lora: Lora = NO_LORA,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    The batch's rows are split into `accumulation` micro-batches, done one after another. Each term is divided by its
    weight in the whole batch, so that the step is that of the whole batch whatever the split.

    A step whose loss or gradient norm is not finite is not applied: parameters and optimiser state stay as they were,
    and the state counts it. All values are global, so every device decides the same.

    Args:
      score: the model.
      objective: what to minimise.
      optimizer: of the trainable tree.
      accumulation: number of micro-batches; the number of rows must be a multiple.
      constrain_gradients: says where the gradients of a micro-batch lie on the mesh.
      lora: the adapter whose factors are among the trainable parameters.
      seed: of its dropout, with the step and the number of the micro-batch.

    Returns:
      A function to compile with its first argument donated. Metrics are float32 scalars: `loss`, the objective's terms,
      `mean_token_accuracy` over supervised tokens, `grad_norm` before clipping, `learning_rate`, `skipped` and
      `skipped_in_a_row` (both counted up to this step).
    """

    def with_reference(frozen, micro):
        if objective.reference != "adapter_off":
            return micro
        # All that trains is the adapter, so the frozen parameters are the model without it, and no gradient arises.
        log_probs = score(frozen, micro).log_probs
        return {**micro, "reference_logps": jax.lax.stop_gradient(answer_log_probs(log_probs, micro))}

    def micro_loss(trainable, frozen, micro, weights, key):
        micro = with_reference(frozen, micro)
        scores = score(lora.attach(merge(trainable, frozen), key), micro)
        totals = {name: term.total for name, term in objective.terms(scores.log_probs, micro).items()}
        correct = jnp.sum(scores.correct & supervised_mask(micro), dtype=jnp.float32)
        return objective.loss(totals, weights), {**totals, "mean_token_accuracy": correct}

    def totals_and_gradients(state, batch, weights):
        gradient = jax.value_and_grad(micro_loss, has_aux=True)

        def run(micro, number):
            key = None
            if lora.dropout:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), number)
            (loss, totals), gradients = gradient(state.trainable, state.frozen, micro, weights, key)
            return (loss, totals), constrain_gradients(gradients)

        if accumulation == 1:
            return run(batch, 0)

        def add(sums, numbered):
            return jax.tree.map(jnp.add, sums, run(*numbered)), None

        micro_batches = split_rows(batch, accumulation)
        numbered = micro_batches, jnp.arange(accumulation)
        first = jax.tree.map(lambda leaf: leaf[0], numbered)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, *first))
        return jax.lax.scan(add, zeros, numbered)[0]

    def step(state, batch):
        weights = objective.weights(batch)
        weights["mean_token_accuracy"] = jnp.sum(supervised_mask(batch), dtype=jnp.float32)
        (loss, totals), gradients = totals_and_gradients(state, batch, weights)
        updates, optimizer_state, stats = optimizer.update(
            gradients, state.optimizer_state, state.trainable, state.step
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(stats["grad_norm"])

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = state.replace(
            step=state.step + 1,
            trainable=keep_if_finite(optax.apply_updates(state.trainable, updates), state.trainable),
            optimizer_state=keep_if_finite(optimizer_state, state.optimizer_state),
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {name: total * reciprocal(weights[name]) for name, total in totals.items()}
        counters = {"skipped": new_state.skipped, "skipped_in_a_row": new_state.skipped_in_a_row}
        return new_state, {"loss": loss, **metrics, **stats, **counters}

    return step


def split_rows(batch: Batch, parts: int) -> Batch:
    """Rows [B, ...] as [parts, B / parts, ...]. Part p takes rows p, p + parts, ...

    Interleaved, so that a batch whose rows are spread over devices in blocks is split without moving a row.
    """

    def leaf(array):
        return jnp.swapaxes(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 0, 1)

    return jax.tree.map(leaf, batch)


def make_validation_step(
    score: Score, lora: Lora = NO_LORA
) -> Callable[[Params, Params, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Builds `step(trainable, frozen, batch) -> {name: (sum, weight)}`.

    `loss` is the negative log-likelihood over supervised tokens. `exact_match` counts the questions of which every
    token of the chosen answer is the likeliest one given the true tokens before it, which is when greedy decoding gives
    exactly that answer.
    """

    def step(trainable, frozen, batch):
        scores = score(lora.attach(merge(trainable, frozen)), batch)
        mask_BL = supervised_mask(batch)
        wrong = sum_answers(~scores.correct, batch)
        answered = wrong.chosen_tokens > 0
        return {
            "loss": (
                jnp.sum(jnp.where(mask_BL, -scores.log_probs, 0.0)),
                jnp.sum(mask_BL, dtype=jnp.float32),
            ),
            "exact_match": (
                jnp.sum(answered & (wrong.chosen == 0), dtype=jnp.float32),
                jnp.sum(answered, dtype=jnp.float32),
            ),
        }

    return step
