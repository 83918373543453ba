"""Exact match: counting, grouping, the table, and what is written."""

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from phantom_jax.data.sources import Question, Record
from phantom_jax.errors import InputError
from phantom_jax.evaluation import exact_match


def _asked(truth, kind="read", digits=1, record=0, question="?"):
    return exact_match.Asked(record, kind, digits, question, truth)


def _record(number, digits):
    stream = io.BytesIO()
    Image.new("L", (32, 32), number).save(stream, "PNG")
    questions = tuple(Question("read", f"{number}: {kind}", str(number % 3), "9") for kind in ("read", "again"))
    return Record(f"test-{number}", stream.getvalue(), digits, 1, questions)


RECORDS = [_record(number, (1,) * (1 + number % 2)) for number in range(50)]


def test_score_counts_by_group():
    questions = [_asked("12", "read", 2), _asked("2", "count", 2), _asked("7"), _asked("odd", "parity", 10)]
    result = exact_match.score(questions, [" 12\n", "3", "7", "Odd"])
    assert result["all"] == {"all": [2, 4]}
    assert result["kind"] == {"count": [0, 1], "parity": [0, 1], "read": [2, 2]}
    assert result["digits"] == {"1": [1, 1], "2": [1, 2], "10": [0, 1]}
    assert list(result["digits"]) == ["1", "2", "10"]


def test_score_wants_one_answer_a_question():
    with pytest.raises(ValueError, match="zip"):
        exact_match.score([_asked("1")], [])


def test_every_question_is_asked_once_about_its_image():
    asked = []

    def generate(texts, *, images, batch_size, max_new_tokens):
        assert batch_size == 3
        asked.append((texts, images, max_new_tokens))
        return texts

    questions = exact_match.questions_of(RECORDS)[:7]
    answers = exact_match.answer_all(
        SimpleNamespace(generate=generate), questions, RECORDS, batch_size=3, max_new_tokens=4
    )
    assert answers == ["0: read", "0: again", "1: read", "1: again", "2: read", "2: again", "3: read"]
    assert [len(texts) for texts, _, _ in asked] == [3, 3, 1]
    assert asked[1][1] == [[RECORDS[1].image], [RECORDS[2].image], [RECORDS[2].image]]


def test_evaluate_tables_and_writes(tmp_path, monkeypatch):
    def load(path):
        right = path.endswith("new")
        return SimpleNamespace(
            generate=lambda texts, **_: [str(int(text.split(":")[0]) % 3 if right else 0) for text in texts]
        )

    monkeypatch.setattr(exact_match, "load", load)
    monkeypatch.setattr(exact_match, "open_records", lambda *_: RECORDS)
    output = tmp_path / "a" / "b"
    results = exact_match.evaluate(["x/old", "x/new"], source="numbers", data_dir="", output=str(output))
    lines = exact_match.table(results).splitlines()
    assert lines[0].split() == ["exact", "match,", "%", "questions", "old", "new"]
    assert lines[2].split() == ["all", "100", "34.0", "100.0"]
    assert any(line.split() == ["1", "digit", "50", "36.0", "100.0"] for line in lines)
    assert any(line.split() == ["2", "digits", "50", "32.0", "100.0"] for line in lines)
    assert lines[-1] == "standard error of `all`: 4.7, 0.0"

    assert json.loads((output / "results.json").read_text()) == results
    assert len(results["examples"]) == exact_match.EXAMPLES
    for example in results["examples"]:
        assert example["answers"]["new"] == example["truth"] == str(example["record"] % 3)
        with Image.open(output / example["image"]) as image:
            assert image.getpixel((0, 0)) == example["record"]


@pytest.mark.parametrize(("count", "limit", "expected"), [(10, 3, [0, 3, 6]), (3, 5, [0, 1, 2]), (3, None, [0, 1, 2])])
def test_spread(count, limit, expected):
    assert exact_match.spread(range(count), limit) == expected


def test_models_are_named_by_folder_or_as_said(tmp_path):
    (tmp_path / "a=b").mkdir()
    models = ["x/model", "first=y/model", str(tmp_path / "a=b")]
    assert exact_match.named_models(models) == {"model": models[0], "first": "y/model", "a=b": models[2]}
    with pytest.raises(InputError, match="two models are called 'model': x/model and y/model. Write NAME=FOLDER"):
        exact_match.named_models(["x/model", "y/model"])
