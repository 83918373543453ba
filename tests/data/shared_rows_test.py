"""Answers that share one prompt and one image in a row give what rows of their own give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax import objectives
from phantom_jax.data.pipeline import RowOptions, TrainingRows, evaluation_batches
from phantom_jax.data.rows import Bound, RowShape, RowStructure, build_row, unfolded_index
from phantom_jax.errors import InputError
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vlm import VisionLanguageConfig, VisionLanguageModel
from phantom_jax.ops.image import normalize_pixels
from tests.data.pipeline_test import edited
from tests.models import small

# One question; several questions; several images of several questions each.
ROWS = [[(0, 1)], [(1, 3)], [(2, 2), (3, 2)]]
PAIRS = 4
SHAPE = RowShape(length=150, tiles=14, pairs=PAIRS)
REFERENCE = np.random.default_rng(0).normal(-9, 2, (len(ROWS), 2 * PAIRS)).astype(np.float32)
OBJECTIVES = [
    objectives.phantom_optimization(),
    objectives.simpo(),
    objectives.orpo(),
    objectives.dpo(reference="stored"),
]
LABELS = ("targets", "sft_mask", "answer_slots")


def asked(records):
    return [[(i, records["train"][i], records["train"][i].questions[:count]) for i, count in row] for row in ROWS]


def stack(rows):
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "pixels": normalize_pixels(jnp.asarray(batch["pixels"]), (0.5,) * 3, (0.5,) * 3)}


@pytest.fixture(scope="module")
def shared(records, processor):
    return stack([build_row(row, processor, SHAPE, rejected=True) for row in asked(records)])


@pytest.fixture(scope="module")
def alone(records, processor):
    """Each answer with a prompt and an image of its own: rows [3 * 8], and labels as the shared rows number them."""
    shape, rows = RowShape(length=64, tiles=7), []
    for asking in asked(records):
        mine = []
        for index, record, questions in asking:
            for question in questions:
                for answer in (question.chosen, question.rejected):
                    one = dataclasses.replace(question, chosen=answer, rejected="")
                    row = build_row([(index, record, [one])], processor, shape, rejected=False)
                    slot = len(mine)
                    row["answer_slots"] = np.where(row["answer_slots"] > 0, slot + 1, 0)
                    row["sft_mask"] &= slot % 2 == 0
                    mine.append(row)
        mine += [build_row([], processor, shape, rejected=False)] * (2 * PAIRS - len(mine))
        rows += mine
    return stack(rows)


@pytest.fixture(scope="module")
def model_and_params(processor):
    tower = dataclasses.replace(small.TOWER, image_size=32, patch_size=8)
    decoder = dataclasses.replace(small.DECODER, vocab_size=processor.tokenizer.get_vocab_size(), num_layers=2)
    config = VisionLanguageConfig(tower, ProjectorConfig("pixel_shuffle", 16, 32, shuffle=2), decoder)
    return small.init(config)


def losses_and_gradients(model, params, batch):
    """The loss of each objective, the gradients of all parameters, and the log-probability of every answer."""

    @jax.jit
    def of_one(params, batch, which):
        def loss(params):
            log_probs = model.apply({"params": params}, batch, rope_length=64, method="score").log_probs
            # Rows of their own make up one row of the objective's.
            log_probs = log_probs.reshape(len(ROWS), -1)
            labels = {name: jnp.asarray(batch[name]).reshape(len(ROWS), -1) for name in LABELS}
            labels["reference_logps"] = REFERENCE
            values = []
            for objective in OBJECTIVES:
                totals = {name: term.total for name, term in objective.terms(log_probs, labels).items()}
                values.append(objective.loss(totals, objective.weights(labels)))
            return jnp.stack(values)[which], objectives.answer_log_probs(log_probs, labels, slots=2 * PAIRS)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.device_get([of_one(params, batch, which) for which in range(len(OBJECTIVES))])


@pytest.fixture(scope="module")
def expected(model_and_params, alone):
    return losses_and_gradients(*model_and_params, alone)


def assert_same(found, expected):
    for ((mine, my_answers), my_gradients), ((theirs, their_answers), their_gradients) in zip(
        found, expected, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
        np.testing.assert_allclose(my_answers, their_answers, rtol=1e-5, atol=1e-5)

        def close(path, mine, theirs):
            name, scale = jax.tree_util.keystr(path), np.abs(theirs).max()
            assert scale > 0, f"{name} has no gradient"
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * (scale + 1e-3), err_msg=name)

        jax.tree_util.tree_map_with_path(close, my_gradients, their_gradients)


def test_the_two_forms_hold_the_same_answers(shared, alone):
    for name in ("targets",):
        for slot in range(1, 2 * PAIRS + 1):
            for row in range(len(ROWS)):
                mine = shared[name][row][shared["answer_slots"][row] == slot]
                whole = alone[name][8 * row + slot - 1]
                np.testing.assert_array_equal(mine, whole[alone["answer_slots"][8 * row + slot - 1] == slot])
    tokens = [np.count_nonzero(batch["segment_ids"]) for batch in (shared, alone)]
    assert tokens[0] < 0.6 * tokens[1]


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_branches_give_losses_and_gradients_of_rows_of_their_own(model_and_params, shared, expected, backend):
    model, params = model_and_params
    model = VisionLanguageModel(model.config, attention_backend=backend)
    assert_same(losses_and_gradients(model, params, shared), expected)


@pytest.mark.parametrize("segments", [True, False])
def test_unfolded_rows_do_as_well(model_and_params, records, processor, expected, segments):
    structure = RowStructure(branches=False, segments=segments)
    unfolded = structure.unfolded(2, 2 * PAIRS, Bound(0, 360, 60))
    assert unfolded == ((1, 360) if segments else (8, 60))
    shape = dataclasses.replace(SHAPE, structure=structure, unfolded=unfolded)
    batch = stack([build_row(row, processor, shape, rejected=True) for row in asked(records)])
    assert "branch_ids" not in batch
    assert_same(losses_and_gradients(*model_and_params, batch), expected)


def test_conversations_are_taken_apart_in_order():
    segment_ids = np.array([1, 1, 1, 1, 2, 2, 2, 0])
    branch_ids = np.array([0, 1, 2, 2, 0, 0, 1, 0])
    np.testing.assert_array_equal(unfolded_index(segment_ids, branch_ids, (1, 9)), [[0, 1, 0, 2, 3, 4, 5, 6, -1]])
    rows = [[0, 1, -1, -1], [0, 2, 3, -1], [4, 5, 6, -1], [-1, -1, -1, -1]]
    np.testing.assert_array_equal(unfolded_index(segment_ids, branch_ids, (4, 4)), rows)


@pytest.mark.parametrize("images, questions, rejected", [(1, 1, True), (1, 3, True), (2, 2, True), (2, 2, False)])
def test_unfolded_rows_are_as_large_as_needed(records, processor, images, questions, rejected):
    options = RowOptions(questions, images, rejected=rejected)
    folded = TrainingRows(records["train"], processor, options, 0)
    for segments in (True, False):
        structure = RowStructure(branches=False, segments=segments)
        source = TrainingRows(records["train"], processor, dataclasses.replace(options, structure=structure), 0)
        assert (source.shape.length, source.shape.tiles) == (folded.shape.length, folded.shape.tiles)
        used = []
        for index in range(source.rows_per_epoch):
            places = source[index]["unfolded"]
            assert places.shape == source.shape.unfolded
            used.append(np.count_nonzero(places >= 0, axis=1))
        assert 0.8 * places.shape[1] < np.max(used) <= places.shape[1]


def test_nothing_is_taken_apart_where_conversations_stand_alone(records, processor):
    one = RowOptions(images_per_row=2, structure=RowStructure(branches=False))
    row = TrainingRows(records["train"], processor, one, 0)[0]
    assert "unfolded" not in row and "branch_ids" not in row
    without_segments = dataclasses.replace(one, structure=RowStructure(branches=False, segments=False))
    assert TrainingRows(records["train"], processor, without_segments, 0)[0]["unfolded"].shape[0] == 2


def test_validation_rows_unfold_too(records, processor):
    structure = RowStructure(branches=False)
    plain = evaluation_batches(records["test"], processor, batch_size=4)
    batches = evaluation_batches(records["test"], processor, batch_size=4, structure=structure)
    for before, after in zip(plain, batches, strict=True):
        assert after.keys() == before.keys() - {"branch_ids"} | {"unfolded"}
        for row, places in enumerate(after["unfolded"]):
            counted = np.unique(places[places >= 0])
            np.testing.assert_array_equal(counted, np.flatnonzero(before["segment_ids"][row]))


def test_pairs_say_which_questions_they_are(records, processor):
    options = RowOptions(questions_per_image=2, images_per_row=2, rejected=True, pair_ids=True)
    source = TrainingRows(records["train"], processor, options, 0)
    for index in range(20):
        row = source[index]
        assert row["pair_ids"].shape == (4, 2)
        for pair, (record, question) in enumerate(row["pair_ids"]):
            chosen = row["targets"][row["answer_slots"] == 2 * pair + 1]
            assert processor.decode(chosen) == records["train"][record].questions[question].chosen


def test_data_without_rejected_answers_are_refused(records, processor):
    def without(record):
        questions = tuple(dataclasses.replace(question, rejected="") for question in record.questions)
        return dataclasses.replace(record, questions=questions)

    bare = edited(records["train"], without)
    TrainingRows(bare, processor, RowOptions(), 0)
    with pytest.raises(InputError, match="no rejected answer .* Take data with rejected answers, or the objective sft"):
        TrainingRows(bare, processor, RowOptions(rejected=True), 0)
