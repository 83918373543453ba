"""Handwritten numbers: splits, images, questions, and that equal calls give equal bytes."""

import io
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from phantom_jax.data import handwritten_numbers, number_questions, sources, tiles

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def scans():
    return handwritten_numbers.load_scans()


def pixels(record):
    return np.asarray(Image.open(io.BytesIO(record.image)))


def cells(record):
    """The digits' cells of an image, in reading order: [n, 32, 32]."""
    page = pixels(record)
    rows, columns = np.array(page.shape) // 32
    return page.reshape(rows, 32, columns, 32).swapaxes(1, 2).reshape(-1, 32, 32)[: len(record.digits)]


def test_scans_are_split_by_digit_and_without_overlap(scans):
    _, labels = scans
    splits = handwritten_numbers.split_scans(labels)
    assert tuple(splits) == SPLITS
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    for digit in range(10):
        total = (labels == digit).sum()
        shares = [(labels[indices] == digit).sum() / total for indices in splits.values()]
        np.testing.assert_allclose(shares, (0.70, 0.15, 0.15), atol=0.01)


def test_images_hold_scans_of_their_own_split_alone(scans, records):
    images, labels = scans
    drawn = {}
    for split, indices in handwritten_numbers.split_scans(labels).items():
        drawn[split] = {
            (255 - np.rint(cell * 255)).astype(np.uint8).tobytes(): label
            for cell, label in zip(handwritten_numbers.enlarge(images[indices]), labels[indices], strict=True)
        }
    for split in ("validation", "test"):
        for record in records[split]:
            assert tuple(drawn[split][cell.tobytes()] for cell in cells(record)) == record.digits
    # Training digits are never the plain scan, and close to one of the training scans of the same digit.
    plain = np.stack([np.frombuffer(key, np.uint8) for key in drawn["train"]]).astype(float)
    plain_labels = np.array(list(drawn["train"].values()))
    right = []
    for record in list(records["train"])[:60]:
        for cell, digit in zip(cells(record), record.digits, strict=True):
            assert cell.tobytes() not in drawn["train"]
            right.append(plain_labels[((plain - cell.ravel()) ** 2).sum(1).argmin()] == digit)
    assert np.mean(right) > 0.8


@pytest.mark.parametrize("split", SPLITS)
def test_layouts_have_fixed_shares_and_real_grids(records, split):
    layouts = Counter((len(record.digits), record.rows) for record in records[split])
    share = len(records[split]) // 12
    assert layouts == {(1, 1): 2 * share, **{(n, rows): share for n in range(2, 7) for rows in (1, 2)}}
    for record in records[split]:
        columns = -(-len(record.digits) // record.rows)
        height, width = pixels(record).shape
        assert (width, height) == (32 * columns, 32 * record.rows)
        assert tiles.tile_grid(width, height, tile_size=32, max_tiles=6) == (columns, record.rows)


def test_unfilled_cells_are_blank(records):
    record = next(record for record in records["test"] if (len(record.digits), record.rows) == (3, 2))
    assert (pixels(record)[32:, 32:] == 255).all()


def expected(kind, record):
    digits, text = record.digits, "".join(map(str, record.digits))
    half = len(digits) // 2
    return {
        "read": lambda: text,
        "count": lambda: str(len(text)),
        "first": lambda: text[0],
        "last": lambda: text[-1],
        "parity": lambda: "even" if int(text) % 2 == 0 else "odd",
        "larger_digit": lambda: max(text[0], text[-1]),
        "larger_row": lambda: "top" if int(text[:half]) > int(text[half:]) else "bottom",
    }[kind]()


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_wrong_ones_plausible(records, split):
    seen = Counter()
    for record in records[split]:
        kinds = [question.kind for question in record.questions]
        assert len(set(kinds)) == len(kinds)
        assert {"read", "count", "parity"} <= set(kinds)
        assert ("first" in kinds) == ("last" in kinds) == (len(record.digits) > 1)
        assert ("larger_digit" in kinds) == (record.digits[0] != record.digits[-1])
        half = len(record.digits) // 2
        comparable = record.rows == 2 and len(record.digits) % 2 == 0
        assert ("larger_row" in kinds) == (comparable and record.digits[:half] != record.digits[half:])
        for question in record.questions:
            seen[question.kind] += 1
            assert question.question in number_questions.PHRASINGS[question.kind]
            assert question.chosen == expected(question.kind, record)
            check_rejected(question, record)
    assert set(seen) == set(number_questions.PHRASINGS)


def check_rejected(question, record):
    right, wrong = question.chosen, question.rejected
    sibling = {str(digit): str(other) for digit, other in number_questions.SIBLING.items()}
    if question.kind == "read":
        changed = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
        assert len(changed) == 1 and sibling[changed[0][0]] == changed[0][1]
    elif question.kind in ("first", "last"):
        assert wrong == sibling[right]
    elif question.kind == "count":
        assert abs(int(right) - int(wrong)) == 1 and 1 <= int(wrong) <= 6
    elif question.kind == "larger_digit":
        assert {int(right), int(wrong)} == {record.digits[0], record.digits[-1]}
    else:
        assert {right, wrong} in ({"even", "odd"}, {"top", "bottom"})


def test_siblings_are_what_training_scans_are_nearest_to(scans):
    images, labels = scans
    train = handwritten_numbers.split_scans(labels)["train"]
    flat, labels = images[train].reshape(len(train), -1), labels[train]
    distance = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    distance[labels[:, None] == labels[None]] = np.inf
    nearest = labels[distance.argmin(1)]
    most = {digit: int(np.bincount(nearest[labels == digit], minlength=10).argmax()) for digit in range(10)}
    assert most == number_questions.SIBLING


def test_scans_are_dealt_evenly():
    dealt = handwritten_numbers.deal(25, 10, np.random.default_rng(0))
    assert sorted(Counter(dealt.tolist()).values()) == [2] * 5 + [3] * 5


def test_augmentation_keeps_ink_in_range_and_changes_every_cell(scans):
    plain = np.tile(handwritten_numbers.enlarge(scans[0][:50]), (2, 1, 1))
    changed = handwritten_numbers.augment(plain, np.random.default_rng(0))
    assert changed.shape == plain.shape and changed.min() >= 0 and changed.max() <= 1
    assert not (changed == plain).all((1, 2)).any()
    assert not (changed[:50] == changed[50:]).all((1, 2)).any()
    # On the whole the ink stays what it was.
    np.testing.assert_allclose(changed.mean(), plain.mean(), rtol=0.1)


def test_preparing_twice_gives_equal_records(records, tmp_path):
    sources.prepare("handwritten_numbers/tiny", tmp_path)
    for split in SPLITS:
        again = sources.open_records("handwritten_numbers/tiny", split, tmp_path)
        assert list(again) == list(records[split])


def test_tensorflow_is_never_loaded(tmp_path):
    code = f"""
import sys
from phantom_jax.data import pipeline, sources
sources.prepare("handwritten_numbers/tiny", {str(tmp_path)!r})
records = sources.open_records("handwritten_numbers/tiny", "test", {str(tmp_path)!r})
assert len(list(records)) == 24
heavy = {{"tensorflow", "torch", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
