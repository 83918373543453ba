"""Exact match of greedily generated answers, in all, by kind of question and by digit count."""

import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from phantom_jax.data.sources import open_records
from phantom_jax.errors import InputError
from phantom_jax.json_files import write_json
from phantom_jax.pretrained import load

# How many answered images are kept beside the numbers.
EXAMPLES = 24


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, for counting by kind and by size.

    Attributes:
      record: index of the record.
      kind: of the question.
      digits: how many digits the image shows.
      question: its text.
      truth: its answer.
    """

    record: int
    kind: str
    digits: int
    question: str
    truth: str


def score(questions: Sequence[Asked], answers: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Counts right answers.

    An answer is right when it equals the truth, white space at both ends aside.

    Args:
      questions: what was asked.
      answers: one for each question.

    Returns:
      {"all": {"all": [right, count]}, "kind": {kind: [right, count]}, "digits": {digit count: [right, count]}}.
    """
    groups: dict[str, dict[str, list[int]]] = {name: defaultdict(lambda: [0, 0]) for name in ("all", "kind", "digits")}
    for question, answer in zip(questions, answers, strict=True):
        right = answer.strip() == question.truth.strip()
        for group, key in (("all", "all"), ("kind", question.kind), ("digits", str(question.digits))):
            groups[group][key][0] += right
            groups[group][key][1] += 1
    return {group: dict(sorted(counts.items(), key=_by_number)) for group, counts in groups.items()}


def questions_of(records: Sequence[Any]) -> list[Asked]:
    """Every question of every record."""
    return [
        Asked(index, question.kind, len(record.digits), question.question, question.chosen)
        for index, record in enumerate(records)
        for question in record.questions
    ]


def answer_all(
    handle: Any, questions: Sequence[Asked], records: Sequence[Any], *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Answers every question about its record's image, in the order given."""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        texts = [question.question for question in batch]
        images = [[records[question.record].image] for question in batch]
        answers += handle.generate(texts, images=images, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return answers


def evaluate(
    models: Sequence[str],
    *,
    source: str,
    data_dir: str,
    split: str = "test",
    batch_size: int = 64,
    limit: int | None = None,
    output: str | None = None,
    max_new_tokens: int = 16,
) -> dict[str, Any]:
    """Asks every question of a split of every model.

    Args:
      models: model folders, as `named_models` reads them.
      source: name of the data set.
      data_dir: the folder that holds its records.
      split: its split.
      batch_size: questions answered at once.
      limit: ask only this many, spread evenly over the split.
      output: folder for results.json and some of the images; it need not exist.
      max_new_tokens: longest answer.

    Returns:
      {"source", "split", "questions": how many, "models": {name: what `score` returns},
      "examples": [{"record", "kind", "question", "truth", "answers": {name: text}, "image": file name if written}]}.
    """
    records = open_records(source, split, data_dir)
    questions = spread(questions_of(records), limit)
    answers = {}
    for name, folder in named_models(models).items():
        handle = load(folder)
        answers[name] = answer_all(handle, questions, records, batch_size=batch_size, max_new_tokens=max_new_tokens)
    results = summarize(questions, answers, source=source, split=split)
    if output is not None:
        write(results, records, Path(output))
    return results


def named_models(models: Sequence[str]) -> dict[str, str]:
    """Model folders by the name of their column: FOLDER is named by its last part, NAME=FOLDER as it says.

    Raises:
      InputError: two have the same name.
    """
    named: dict[str, str] = {}
    for model in models:
        name, separator, folder = model.partition("=")
        if not separator or Path(model).exists():
            name, folder = Path(model).resolve().name, model
        if name in named:
            raise InputError(f"two models are called {name!r}: {named[name]} and {folder}. Write NAME=FOLDER.")
        named[name] = folder
    return named


def summarize(questions: Sequence[Asked], answers: dict[str, list[str]], *, source: str, split: str) -> dict[str, Any]:
    """What `evaluate` returns, from the answers of each model."""
    return {
        "source": source,
        "split": split,
        "questions": len(questions),
        "models": {name: score(questions, texts) for name, texts in answers.items()},
        "examples": [
            {
                "record": questions[index].record,
                "kind": questions[index].kind,
                "question": questions[index].question,
                "truth": questions[index].truth,
                "answers": {name: texts[index].strip() for name, texts in answers.items()},
            }
            for index in spread(range(len(questions)), EXAMPLES)
        ],
    }


def table(results: dict[str, Any]) -> str:
    """The results as text: one row for each group of questions, one column of percentages for each model."""
    names = list(results["models"])
    rows = [["exact match, %", "questions", *names]]
    first = results["models"][names[0]]
    for group, label in (("all", "{}"), ("kind", "{}"), ("digits", "{} digits")):
        for key, (_, count) in first[group].items():
            text = "1 digit" if (group, key) == ("digits", "1") else label.format(key)
            scores = [results["models"][name][group][key] for name in names]
            rows.append([text, f"{count:,}", *(f"{100 * right / total:.1f}" for right, total in scores)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    errors = [_standard_error(*results["models"][name]["all"]["all"]) for name in names]
    lines.append(f"standard error of `all`: {', '.join(f'{100 * error:.1f}' for error in errors)}")
    return "\n".join(lines)


def _by_number(item: tuple[str, list[int]]) -> tuple[int, str]:
    """Sorts "10" behind "2", and names by themselves."""
    return len(item[0]) if item[0].isdigit() else 0, item[0]


def _standard_error(right: int, count: int) -> float:
    share = right / count
    return math.sqrt(share * (1 - share) / count)


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most `limit` items at even distances."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def write(results: dict[str, Any], records: Sequence[Any], output: Path) -> None:
    """Writes results.json and the images of the examples; notes each image's file name in its example."""
    output.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(results["examples"]):
        example["image"] = f"{number:03d}.png"
        with Image.open(io.BytesIO(records[example["record"]].image)) as image:
            image.save(output / example["image"])
    write_json(output / "results.json", results)
