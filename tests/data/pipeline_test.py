"""Rows and batches: what they hold, their order, and that a stream goes on exactly where it stopped."""

import dataclasses
import itertools

import numpy as np
import pytest

from phantom_jax.batch import IGNORE
from phantom_jax.data import rows, sources, tiles
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.data.pipeline import RowOptions, TrainingRows, evaluation_batches, train_iterator
from phantom_jax.data.rows import RowStructure
from phantom_jax.data.sources import Question, Records
from phantom_jax.errors import InputError
from phantom_jax.processor import Processor
from tests.tiny_tokenizers import LLAMA_KINDS, llama

DTYPES = {"sft_mask": bool, "pixels": np.uint8}
OPTIONS = {
    "one question": RowOptions(),
    "three questions": RowOptions(questions_per_image=3),
    "pairs": RowOptions(rejected=True),
    "several pairs": RowOptions(questions_per_image=2, rejected=True),
    "packed": RowOptions(questions_per_image=3, images_per_row=2),
    "packed pairs": RowOptions(questions_per_image=2, images_per_row=4, rejected=True),
    "uneven": RowOptions(questions_per_image=2, images_per_row=7),
    "single digits": RowOptions(questions_per_image=9, images_per_row=3, max_digits=1),
    "weighted": RowOptions(questions_per_image=2, kind_weights={"read": 5, "count": 0}),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def training_rows(records, processor, options, seed=0):
    return TrainingRows(records["train"], processor, options, seed)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def edited(records, change):
    """Records with some fields changed."""
    return Records("edited", "train", _Edited([change(record) for record in records]))


class _Edited(list):
    """What `Records` reads: columns of bytes."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        fields = dataclasses.asdict(record)
        names = [field.name for field in dataclasses.fields(Question)]
        columns = {name: [getattr(question, name).encode() for question in record.questions] for name in names}
        return {**fields, "id": record.id.encode(), "questions": columns}


@every_option
def test_rows_hold_what_the_options_say(records, processor, options):
    source = training_rows(records, processor, options)
    for index in range(2 * source.rows_per_epoch):
        row = source[index]
        images = row["segment_ids"].max()
        assert images == options.images_per_row
        assert row["token_ids"].shape == (source.shape.length,)
        assert row["pixels"].shape == (source.shape.tiles, 32, 32, 3)
        for name, value in row.items():
            assert value.dtype == DTYPES.get(name, np.int32), name
        padding = row["segment_ids"] == 0
        assert (row["token_ids"][padding] == processor.pad_id).all()
        assert (row["targets"][padding] == IGNORE).all() and (row["image_slots"][padding] == -1).all()
        # Every tile's every feature stands at exactly one token, in order.
        is_image = row["token_ids"] == processor.image_token_id
        slots = row["image_slots"][is_image]
        np.testing.assert_array_equal(slots, np.arange(len(slots)))
        assert (row["image_slots"][~is_image] == -1).all()
        used = -(-len(slots) // processor.tokens_per_tile)
        assert row["pixels"][:used].any((1, 2, 3)).all() and not row["pixels"][used:].any()
        # Questions of an image have consecutive answers, chosen odd and rejected even.
        answers = set(row["answer_slots"].tolist()) - {0}
        pairs = {(answer + 1) // 2 for answer in answers}
        assert len(pairs) == max(pairs) <= options.images_per_row * options.questions_per_image
        assert {answer % 2 for answer in answers} == ({0, 1} if options.rejected else {1})
        scored = row["answer_slots"] > 0
        np.testing.assert_array_equal(row["targets"] != IGNORE, scored)
        np.testing.assert_array_equal(row["sft_mask"], row["answer_slots"] % 2 == 1)


@every_option
def test_some_row_comes_near_the_shape(records, processor, options):
    source = training_rows(records, processor, options)
    lengths = [np.count_nonzero(source[index]["segment_ids"]) for index in range(3 * source.rows_per_epoch)]
    assert max(lengths) >= 0.85 * source.shape.length


def test_answers_are_the_records_answers(records, processor):
    options = RowOptions(questions_per_image=2, rejected=True)
    source = training_rows(records, processor, options)
    for index in range(40):
        row = source[index]
        record = records["train"][int(row["row_ids"])]
        pairs = {(question.chosen, question.rejected) for question in record.questions}
        for pair in range(2):
            chosen, rejected = (row["targets"][row["answer_slots"] == 2 * pair + slot] for slot in (1, 2))
            assert chosen[-1] == rejected[-1] == processor.end_id
            assert (processor.decode(chosen), processor.decode(rejected)) in pairs


def test_packed_images_are_laid_out_as_if_alone(records, processor):
    shape = rows.RowShape(length=200, tiles=14)
    asking = [(index, records["train"][index], records["train"][index].questions[:3]) for index in (0, 5)]
    packed = rows.build_row(asking, processor, shape, rejected=False)
    for number, one in enumerate(asking, start=1):
        alone = rows.build_row([one], processor, shape, rejected=False)
        mine, whole = packed["segment_ids"] == number, alone["segment_ids"] == 1
        for name in ("token_ids", "positions", "branch_ids", "targets", "sft_mask"):
            np.testing.assert_array_equal(packed[name][mine], alone[name][whole], err_msg=name)
        slots, expected = packed["image_slots"][mine], alone["image_slots"][whole]
        seen, there = slots[slots >= 0] // 4, expected[expected >= 0] // 4
        np.testing.assert_array_equal(packed["pixels"][seen], alone["pixels"][there])
        asked = packed["answer_slots"][mine]
        np.testing.assert_array_equal(np.unique(asked[asked > 0]), np.array([1, 3, 5]) + 6 * (number - 1))


def test_tiles_are_the_images(records, processor):
    source = training_rows(records, processor, RowOptions())
    row = source[3]
    image = tiles.open_image(records["train"][int(row["row_ids"])].image)
    expected = tiles.split_tiles(image, tile_size=32, max_tiles=6)
    np.testing.assert_array_equal(row["pixels"][: len(expected)], expected)


@pytest.mark.parametrize("per_row", [1, 2, 7])
def test_an_epoch_has_every_record_once_and_is_shuffled_anew(records, processor, per_row):
    source = training_rows(records, processor, RowOptions(images_per_row=per_row))
    epochs = [source._plan(epoch) for epoch in range(3)]
    for plan in epochs:
        assert plan.shape == (len(records["train"]) // per_row, per_row)
        assert len(set(plan.ravel().tolist())) == plan.size
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    # What sits out one epoch comes in another.
    later = {number for epoch in range(20) for number in source._plan(epoch).ravel().tolist()}
    assert len(later) == len(records["train"])


def test_packing_evens_out_the_tiles(records, processor):
    source = training_rows(records, processor, RowOptions(images_per_row=2))
    used = source._tiles[source._plan(0)].sum(1)
    assert source.shape.tiles == used.max() <= 10
    assert used.mean() > 0.85 * source.shape.tiles


def test_kinds_are_drawn_by_weight(records, processor):
    weights = {"read": 8.0, "count": 0.0}
    options = RowOptions(questions_per_image=2, kind_weights=weights)
    source = training_rows(records, processor, options)
    rng, kinds = np.random.default_rng(0), []
    for record in records["train"]:
        drawn = [question.kind for question in source._draw(record, rng)]
        assert len(set(drawn)) == 2
        kinds += drawn
    assert "count" not in kinds
    assert kinds.count("read") > 0.9 * len(records["train"])


def test_few_digits_first(records, processor):
    source = training_rows(records, processor, RowOptions(questions_per_image=3, max_digits=2))
    drawn = {int(source[index]["row_ids"]) for index in range(source.rows_per_epoch)}
    assert drawn == {index for index, record in enumerate(records["train"]) if len(record.digits) <= 2}
    assert source.shape.length < training_rows(records, processor, RowOptions(questions_per_image=3)).shape.length


def test_equal_seeds_give_equal_streams_and_others_do_not(records, processor):
    def stream(seed, threads=1):
        options = {"questions_per_image": 2, "images_per_row": 2}
        iterator = train_iterator(records["train"], processor, options, batch_size=8, seed=seed, threads=threads)
        return list(itertools.islice(iterator, 20))

    first, again, other = stream(1), stream(1, threads=4), stream(2)
    for left, right in zip(first, again, strict=True):
        assert_equal(left, right)
    assert not np.array_equal(first[0]["row_ids"], other[0]["row_ids"])


def test_a_stream_goes_on_exactly_from_any_state(records, processor):
    def start():
        options = RowOptions(questions_per_image=2, images_per_row=2)
        return train_iterator(records["train"], processor, options, batch_size=16, seed=3)

    # Twelve batches are more than an epoch of 120 rows.
    iterator = start()
    states, batches = [], []
    for _ in range(12):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    for position, state in enumerate(states):
        resumed = start()
        resumed.set_state(state)
        for batch in batches[position : position + 3]:
            assert_equal(next(resumed), batch)
    # An iterator that has run ahead can be set back, too.
    iterator.set_state(states[2])
    assert_equal(next(iterator), batches[2])


def test_rows_divide_over_devices(records, processor):
    options = RowOptions(2, images_per_row=2, rejected=True, structure=RowStructure(branches=False))
    free, split = (
        TrainingRows(records["train"], processor, dataclasses.replace(options, multiple=multiple), 0)
        for multiple in (1, 16)
    )
    row = split[0]
    assert (row["token_ids"].shape, row["unfolded"].shape) == ((split.shape.length,), split.shape.unfolded)
    for shape, least in ((split.shape, free.shape), (split.single_shape(), free.single_shape())):
        for tokens, needed in ((shape.length, least.length), (shape.unfolded[1], least.unfolded[1])):
            assert tokens % 16 == 0 and 0 <= tokens - needed < 16
    assert any(least % 16 for least in (free.shape.length, free.shape.unfolded[1])), "something must need rounding"
    batches = evaluation_batches([records["train"][index] for index in range(3)], processor, batch_size=2, multiple=16)
    assert batches[0]["token_ids"].shape[1] % 16 == 0


def test_evaluation_asks_every_question_once(records, processor):
    batches = evaluation_batches(records["test"], processor, batch_size=7)
    assert len(batches) == 4
    assert len({batch["token_ids"].shape for batch in batches}) == 1
    seen = []
    for batch in batches:
        for row, index in enumerate(batch["row_ids"].tolist()):
            assert batch["segment_ids"][row].any() == (index != -1)
            if index == -1:
                assert not batch["answer_slots"][row].any()
                continue
            seen.append(index)
            slots = batch["answer_slots"][row]
            answers = [processor.decode(batch["targets"][row][slots == slot]) for slot in range(1, slots.max() + 1, 2)]
            assert answers == [question.chosen for question in records["test"][index].questions]
    assert seen == list(range(len(records["test"])))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"questions_per_image": 0}, "questions_per_image is 0"),
        ({"images_per_row": 0}, "images_per_row is 0"),
        ({"max_digits": 0}, "max_digits is 0"),
        ({"kind_weights": {"read": -1}}, "kind_weights.read is -1"),
        ({"kind_weights": {"reed": 1}}, "kind_weights has reed, but the kinds are count, first,"),
        ({"images_per_row": 300}, "240 records that fit the options, fewer than a row's 300"),
        ({"kind_weights": dict.fromkeys(("read", "count", "parity"), 0), "max_digits": 1}, "has 0 records"),
    ],
)
def test_impossible_options_are_named(records, processor, values, message):
    with pytest.raises(InputError, match=message):
        training_rows(records, processor, RowOptions(**values))


def test_a_conversation_longer_than_the_context_stops_everything(records, processor):
    short = dataclasses.replace(processor, max_length=45)
    with pytest.raises(InputError, match=r"train-\d+ has \d+ tokens, 28 of them for images; the context is 45"):
        training_rows(records, short, RowOptions())
    with pytest.raises(InputError, match=r"test-\d+ has \d+ tokens"):
        evaluation_batches(records["test"], short, batch_size=4)


def test_damaged_images_name_their_record(records, processor):
    damaged = edited(records["train"], lambda record: dataclasses.replace(record, image=record.image[:60]))
    source = TrainingRows(damaged, processor, RowOptions(), 0)
    with pytest.raises(InputError, match=r"train-\d+ .* cut short or damaged"):
        source[0]


def test_equal_answers_are_no_pair(records, processor):
    def change(record):
        question = dataclasses.replace(record.questions[0], rejected=record.questions[0].chosen)
        return dataclasses.replace(record, questions=(question,))

    same = edited(records["train"], change)
    TrainingRows(same, processor, RowOptions(), 0)
    with pytest.raises(InputError, match="both as the chosen and as the rejected answer"):
        TrainingRows(same, processor, RowOptions(rejected=True), 0)


def test_a_question_without_a_rejected_answer_has_no_pair(records, processor):
    def change(record):
        first, *rest = record.questions[:3]
        return dataclasses.replace(record, questions=(dataclasses.replace(first, rejected=""), *rest))

    source = TrainingRows(edited(records["train"], change), processor, RowOptions(3, rejected=True), 0)
    for index in range(20):
        assert len(set(source[index]["answer_slots"].tolist()) - {0}) == 5


@pytest.mark.parametrize("options", [RowOptions(2, rejected=True), RowOptions(2, 2), RowOptions(1, rejected=True)])
def test_marks_inside_questions_fit_the_shape(records, processor, options):
    def change(record):
        questions = [
            dataclasses.replace(q, question=q.question[:8] + "<image>" + q.question[8:]) for q in record.questions
        ]
        return dataclasses.replace(record, questions=tuple(questions))

    roomy = dataclasses.replace(processor, max_length=96)
    source = TrainingRows(edited(records["train"], change), roomy, options, 0)
    for index in range(source.rows_per_epoch):
        assert source[index]["segment_ids"].max() == options.images_per_row


@pytest.mark.parametrize("kind", LLAMA_KINDS)
@pytest.mark.parametrize("options", [RowOptions(), RowOptions(1, rejected=True), RowOptions(3, 2, rejected=True)])
def test_rows_of_llava(records, kind, options):
    processor = Processor(llama(kind), TEMPLATES["vicuna_v1"], 32, 1, 4, 400, image_mode="crop")
    source = training_rows(records, processor, options)
    lengths = []
    for index in range(source.rows_per_epoch):
        row = source[index]
        assert row["segment_ids"].max() == options.images_per_row == row["pixels"].any((1, 2, 3)).sum()
        lengths.append(np.count_nonzero(row["segment_ids"]))
        record = records["train"][int(row["row_ids"])]
        chosen = row["targets"][row["answer_slots"] == 1]
        assert processor.decode(chosen) in {question.chosen for question in record.questions}
    assert source.shape.length >= max(lengths) >= 0.85 * source.shape.length


def test_what_does_not_fit_in_memory_is_read_again(records, monkeypatch):
    monkeypatch.setattr(sources, "CACHE_BYTES", 1000)
    fresh = Records("small", "train", records["train"]._source)
    assert list(fresh) == list(records["train"])
    assert list(fresh) == list(records["train"])
    assert 0 < fresh._cached_bytes <= 1000
