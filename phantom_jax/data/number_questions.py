"""Questions about a handwritten number, each with its answer and a plausible wrong one.

| kind | asks for | wrong answer | asked of |
|---|---|---|---|
| read | all digits, row by row | one digit swapped for its sibling | every image |
| count | how many digits | one more or one less, within 1 to 6 | every image |
| parity | whether the number is even or odd | the other | every image |
| first, last | that digit | its sibling | two digits or more |
| larger_digit | the larger one of the first and the last digit | the smaller one | first and last differ |
| larger_row | the row with the larger number, top or bottom | the other | two rows of equal length that differ |

A digit's sibling (`SIBLING`) is what it is most easily taken for. Rows of unequal length are never compared: the longer
one would nearly always win. Every kind that applies is asked once of each image, in one of its phrasings.
"""

from collections.abc import Sequence

import numpy as np

SIBLING = {0: 9, 1: 8, 2: 3, 3: 9, 4: 0, 5: 9, 6: 5, 7: 3, 8: 1, 9: 3}
"""For each digit the class that most often holds the nearest scan of another class, over the training scans."""

PHRASINGS = {
    "read": ("Read the number.", "What number is this?", "Which digits are these?"),
    "count": ("How many digits are there?", "Count the digits.", "What is the number of digits?"),
    "first": ("What is the first digit?", "Name the first digit.", "Which digit comes first?"),
    "last": ("What is the last digit?", "Name the last digit.", "Which digit comes last?"),
    "parity": ("Is the number even or odd?", "Even or odd?", "Which is it, even or odd?"),
    "larger_digit": ("Which is larger, first or last digit?", "Name the larger end digit."),
    "larger_row": ("Which row is larger, top or bottom?", "Name the larger row."),
}
"""The kinds of questions, and how each is put."""


def split_rows(digits: Sequence[int], rows: int) -> list[Sequence[int]]:
    """The digits of each row: all rows but the last are full."""
    columns = -(-len(digits) // rows)
    return [digits[start : start + columns] for start in range(0, len(digits), columns)]


def write_questions(digits: Sequence[int], rows: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """One question of each kind that applies: {"kind", "question", "chosen", "rejected"}."""
    answers = {"read": _read(digits, rng), "count": _count(len(digits), rng), "parity": _parity(digits)}
    if len(digits) > 1:
        first, last = digits[0], digits[-1]
        answers["first"] = str(first), str(SIBLING[first])
        answers["last"] = str(last), str(SIBLING[last])
        if first != last:
            answers["larger_digit"] = str(max(first, last)), str(min(first, last))
    if rows == 2 and len(digits) % 2 == 0:
        top, bottom = map(list, split_rows(digits, rows))
        if top != bottom:
            answers["larger_row"] = ("top", "bottom") if top > bottom else ("bottom", "top")
    return [
        {"kind": kind, "question": str(rng.choice(PHRASINGS[kind])), "chosen": chosen, "rejected": rejected}
        for kind, (chosen, rejected) in answers.items()
    ]


def _read(digits: Sequence[int], rng: np.random.Generator) -> tuple[str, str]:
    wrong = list(digits)
    place = rng.integers(len(wrong))
    wrong[place] = SIBLING[wrong[place]]
    return "".join(map(str, digits)), "".join(map(str, wrong))


def _count(count: int, rng: np.random.Generator) -> tuple[str, str]:
    step = {1: 1, 6: -1}.get(count) or int(rng.choice([-1, 1]))
    return str(count), str(count + step)


def _parity(digits: Sequence[int]) -> tuple[str, str]:
    return ("odd", "even") if digits[-1] % 2 else ("even", "odd")
