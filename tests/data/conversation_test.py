"""Templates, label masks and branches, with a tokenizer of one token a character."""

import re

import numpy as np
import pytest

from phantom_jax.batch import IGNORE
from phantom_jax.data import conversation
from phantom_jax.data.conversation import TEMPLATES, encode, lay_out
from phantom_jax.errors import InputError

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>")
PIECES = re.compile("|".join([*map(re.escape, SPECIAL), r"[\s\S]"]))


def tokenize(text, markup=False):
    pieces = PIECES.findall(text) if markup else text
    return [1000 + SPECIAL.index(piece) if piece in SPECIAL else ord(piece) for piece in pieces]


def text_of(ids):
    return "".join(SPECIAL[i - 1000] if i >= 1000 else chr(i) for i in ids)


def converse(*turns, features=(), template="qwen2"):
    return encode(turns, features, TEMPLATES[template], tokenize)


CONTEXT = "<IMG_CONTEXT>"


@pytest.mark.parametrize("name", ["qwen2", "internlm2"])
def test_qwen2_and_internlm2_text(name):
    conversation = converse(("What?", "This."), ("Why?", None), features=[3], template=name)
    assert text_of(conversation.token_ids) == (
        f"<|im_start|>user\n<img>{3 * CONTEXT}</img>What?<|im_end|><|im_start|>assistant\nThis.<|im_end|>"
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    )


def test_phi3_text():
    conversation = converse(("What?", "This."), features=[2], template="phi3")
    expected = f"<|user|>\n<img>{2 * CONTEXT}</img>What?<|end|><|assistant|>\nThis.<|end|>"
    assert text_of(conversation.token_ids) == expected


def test_answers_and_their_ends_are_supervised():
    conversation = converse(("assistant\nWhat?", "This."), ("Why?", "So."), features=[3])
    assert text_of(conversation.token_ids[conversation.supervised]) == "This.<|im_end|>So.<|im_end|>"
    assert text_of(conversation.token_ids[conversation.answer_start :]) == "So.<|im_end|>"


def test_a_prompt_is_the_beginning_of_the_conversation():
    answered = converse(("What?", "This."), ("Why?", "So."), features=[3])
    prompt = converse(("What?", "This."), ("Why?", None), features=[3])
    assert prompt.answer_start == len(prompt.token_ids) == answered.answer_start
    np.testing.assert_array_equal(prompt.token_ids, answered.token_ids[: answered.answer_start])


def test_an_empty_answer_is_its_end_marker():
    conversation = converse(("What?", ""))
    assert text_of(conversation.token_ids[conversation.supervised]) == "<|im_end|>"


def test_marks_say_where_images_stand():
    conversation = converse(("One <image> two", "Yes."), ("three <image>?", None), features=[2, 1])
    text = text_of(conversation.token_ids)
    assert f"One <img>{2 * CONTEXT}</img> two" in text
    assert f"three <img>{CONTEXT}</img>?" in text
    slots = conversation.image_slots
    np.testing.assert_array_equal(slots[slots >= 0], [0, 1, 2])
    np.testing.assert_array_equal(slots >= 0, conversation.token_ids == tokenize(CONTEXT, markup=True)[0])


def test_without_marks_all_images_come_first():
    text = text_of(converse(("What?", None), features=[2, 1]).token_ids)
    assert text.startswith(f"<|im_start|>user\n<img>{2 * CONTEXT}</img><img>{CONTEXT}</img>What?")


@pytest.mark.parametrize(
    "question, features, message",
    [
        ("<image> and <image>?", [1], "more <image> marks than images"),
        ("<image>?", [1, 1], "fewer"),
        ("<image>", [], "more"),
    ],
)
def test_marks_must_fit_the_images(question, features, message):
    with pytest.raises(InputError, match=message) as info:
        converse((question, None), features=features)
    assert f"{question.count('<image>')} marks, {len(features)} images" in str(info.value)


def test_text_before_and_between():
    template = conversation.Template(
        system="Be kind. ",
        user="USER: ",
        assistant=" ASSISTANT: ",
        answer_end="<|end|>",
        turn_end="\n",
        image_token=CONTEXT,
        after_image="\n",
    )
    encoded = encode([("A", "B"), ("C", "D")], [2], template, tokenize)
    expected = f"Be kind. USER: {2 * CONTEXT}\nA ASSISTANT: B<|end|>\nUSER: C ASSISTANT: D<|end|>"
    assert text_of(encoded.token_ids) == expected
    assert text_of(encoded.token_ids[encoded.supervised]) == "B<|end|>D<|end|>"


def check(segment, pairs):
    """Each branch with the prefix is its conversation, and all else follows from that."""
    conversations = [(c, 2 * k + 1 + r) for k, pair in enumerate(pairs) for r, c in enumerate(pair)]
    assert set(segment.branch_ids) - {0} == set(range(1, len(conversations) + 1))
    prefix = segment.branch_ids == 0
    for branch, (whole, slot) in enumerate(conversations, start=1):
        mine = prefix | (segment.branch_ids == branch)
        ids = segment.token_ids[mine]
        np.testing.assert_array_equal(ids, whole.token_ids[:-1])
        np.testing.assert_array_equal(segment.positions[mine], np.arange(len(ids)))
        np.testing.assert_array_equal(segment.image_slots[mine], whole.image_slots[:-1])
        targets = np.where(whole.supervised[1:], whole.token_ids[1:], IGNORE)
        np.testing.assert_array_equal(segment.targets[mine], targets)
        scored = np.arange(1, len(whole.token_ids)) >= whole.answer_start
        np.testing.assert_array_equal(segment.answer_slots[mine], np.where(scored, slot, 0))
        own = segment.branch_ids == branch
        chosen = slot % 2 == 1
        np.testing.assert_array_equal(segment.sft_mask[own], (segment.targets[own] != IGNORE) & chosen)
    assert not segment.answer_slots[prefix].any()
    np.testing.assert_array_equal(segment.sft_mask[prefix], segment.targets[prefix] != IGNORE)
    for field in ("token_ids", "positions", "branch_ids", "image_slots", "targets", "answer_slots"):
        assert getattr(segment, field).dtype == np.int32


def test_one_answer():
    pairs = [[converse(("What?", "This."), features=[3])]]
    segment = lay_out(pairs)
    check(segment, pairs)
    assert len(segment) == len(pairs[0][0].token_ids) - 1


def test_two_answers_share_the_prompt():
    pairs = [[converse(("What?", answer), features=[3]) for answer in ("123", "124")]]
    segment = lay_out(pairs)
    check(segment, pairs)
    prompt = pairs[0][0].token_ids[: pairs[0][0].answer_start]
    np.testing.assert_array_equal(segment.token_ids[segment.branch_ids == 0], prompt[:-1])
    # Equal first tokens of the answers are not shared: each belongs to its own answer.
    assert text_of(segment.targets[segment.answer_slots == 1]) == "123<|im_end|>"
    assert text_of(segment.targets[segment.answer_slots == 2]) == "124<|im_end|>"
    assert text_of(segment.targets[segment.sft_mask]) == "123<|im_end|>"


def test_questions_share_the_image():
    pairs = [[converse((q, a), features=[5])] for q, a in (("What?", "1"), ("Who?", "22"), ("Which?", "3"))]
    segment = lay_out(pairs)
    check(segment, pairs)
    assert (segment.token_ids == tokenize(CONTEXT, markup=True)[0]).sum() == 5
    assert text_of(segment.targets[segment.sft_mask]) == "1<|im_end|>22<|im_end|>3<|im_end|>"


def test_questions_with_and_without_rejected_answers():
    pairs = [
        [converse(("What?", "1"), features=[5]), converse(("What?", "2"), features=[5])],
        [converse(("Why?", "So"), features=[5])],
        [converse(("Who?", "me"), features=[5]), converse(("Who?", "you"), features=[5])],
    ]
    segment = lay_out(pairs)
    check(segment, pairs)
    assert set(segment.answer_slots) == {0, 1, 2, 3, 5, 6}


def test_of_several_turns_all_are_supervised_and_the_last_is_scored():
    pairs = [[converse(("What?", "This."), ("Why?", answer), features=[3]) for answer in ("So.", "No.")]]
    segment = lay_out(pairs)
    check(segment, pairs)
    assert text_of(segment.targets[segment.sft_mask]) == "This.<|im_end|>So.<|im_end|>"
    assert text_of(segment.targets[segment.answer_slots > 0]) == "So.<|im_end|>No.<|im_end|>"


def test_turns_that_differ_early_supervise_the_chosen_branch_alone():
    pairs = [
        [converse(("What?", "This."), ("Why?", answer), features=[3]) for answer in ("So.", "No.")],
        [converse(("Who?", "Me."), features=[3])],
    ]
    segment = lay_out(pairs)
    check(segment, pairs)
    assert text_of(segment.targets[segment.sft_mask]) == "This.<|im_end|>So.<|im_end|>Me.<|im_end|>"


def test_empty_and_equal_beginnings():
    pairs = [[converse(("What?", "")), converse(("What?", "1"))]]
    check(lay_out(pairs), pairs)
