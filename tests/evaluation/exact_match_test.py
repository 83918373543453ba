"""Exact match: counting, grouping, the table, and what is written."""

import json
from dataclasses import dataclass, field

import pytest
from PIL import Image

from phantom_jax.evaluation import exact_match


@dataclass
class Question:
    question: str
    truth: str
    kind: str = "read"
    digit_count: int = 1
    row_id: int = 0
    images: list = field(default_factory=lambda: [Image.new("RGB", (8, 8))])


class Handle:
    """Answers each question with its own text; remembers the batches."""

    def __init__(self):
        self.batches = []

    def generate(self, prompts, *, images, max_new_tokens):
        assert len(prompts) == len(images)
        self.batches.append([image[0].size for image in images])
        return prompts


def test_score_counts_by_group():
    questions = [
        Question("", "12", "read", 2),
        Question("", "2", "count", 2),
        Question("", "7", "read", 1),
        Question("", "odd", "parity", 10),
    ]
    result = exact_match.score(questions, [" 12\n", "3", "7", "Odd"])
    assert result["all"] == {"all": [2, 4]}
    assert result["kind"] == {"count": [0, 1], "parity": [0, 1], "read": [2, 2]}
    assert result["digits"] == {"1": [1, 1], "2": [1, 2], "10": [0, 1]}
    assert list(result["digits"]) == ["1", "2", "10"]


def test_score_wants_one_answer_a_question():
    with pytest.raises(ValueError, match="zip"):
        exact_match.score([Question("", "1")], [])


def test_answers_come_back_in_order_with_equal_images_together():
    sizes = [(8, 8), (16, 8), (8, 8), (16, 8), (8, 16)]
    questions = [Question(str(index), "", images=[Image.new("RGB", size)]) for index, size in enumerate(sizes)]
    handle = Handle()
    assert exact_match.answer_all(handle, questions, batch_size=2, max_new_tokens=4) == ["0", "1", "2", "3", "4"]
    assert handle.batches == [[(8, 8), (8, 8)], [(8, 16), (16, 8)], [(16, 8)]]


def test_table_and_files(tmp_path):
    questions = [Question(f"question {row}", str(row % 3), "read", 1 + row % 2, row) for row in range(100)]
    answers = {"old": ["0"] * 100, "new": [str(row % 3) for row in range(100)]}
    results = exact_match.summarize(questions, answers, source="numbers", split="test")
    text = exact_match.table(results)
    lines = text.splitlines()
    assert lines[0].split() == ["exact", "match,", "%", "questions", "old", "new"]
    assert lines[2].split() == ["all", "100", "34.0", "100.0"]
    assert lines[-1] == "standard error of `all`: 4.7, 0.0"
    assert any(line.split() == ["2", "digits", "50", "34.0", "100.0"] for line in lines)

    exact_match.write(results, questions, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written == results
    assert len(written["examples"]) == exact_match.EXAMPLES
    for example in written["examples"]:
        assert example["answers"]["new"] == example["truth"] == str(example["row"] % 3)
        assert (tmp_path / "new" / example["image"]).is_file()


@pytest.mark.parametrize(("count", "limit", "expected"), [(10, 3, [0, 3, 6]), (3, 5, [0, 1, 2]), (3, None, [0, 1, 2])])
def test_spread(count, limit, expected):
    assert exact_match.spread(range(count), limit) == expected


def test_equal_folder_names_are_told_apart():
    assert exact_match.model_names(["a/model", "b/model", "c/other"]) == ["a/model", "b/model", "other"]
