"""Templates, label masks and branches, with a tokenizer of one token a character."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from phantom_jax.batch import IGNORE
from phantom_jax.data import conversation
from phantom_jax.data.conversation import TEMPLATES, encode, get_template, lay_out, template_names
from phantom_jax.data.runs import Run, Special
from phantom_jax.errors import InputError

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>")
SPECIAL += ("<s>", "</s>", "<image>")


class Characters:
    """One token a character; `merges` are pairs of characters that are one token more."""

    def __init__(self, *merges):
        self.pattern = re.compile("|".join([*map(re.escape, merges), r"[\s\S]"]))
        self.merges = merges

    def split(self, markup):
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", markup)
        return [Special(1000 + SPECIAL.index(part)) if part in SPECIAL else part for part in parts if part]

    def encode(self, text, opening):
        found = list(self.pattern.finditer(text))
        ids = [2000 + self.merges.index(one[0]) if len(one[0]) > 1 else ord(one[0]) for one in found]
        return Run(ids, [one.start() for one in found], [one.end() for one in found])


def special(token):
    return 1000 + SPECIAL.index(token)


def text_of(ids):
    return "".join(SPECIAL[i - 1000] if i >= 1000 else chr(i) for i in ids)


def converse(*turns, features=(), template="qwen2"):
    return encode(turns, features, TEMPLATES[template], Characters())


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
    np.testing.assert_array_equal(slots >= 0, conversation.token_ids == special(CONTEXT))


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
    encoded = encode([("A", "B"), ("C", "D")], [2], template, Characters())
    expected = f"Be kind. USER: {2 * CONTEXT}\nA ASSISTANT: B<|end|>\nUSER: C ASSISTANT: D<|end|>"
    assert text_of(encoded.token_ids) == expected
    assert text_of(encoded.token_ids[encoded.supervised]) == "B<|end|>D<|end|>"


SYSTEM = {"vicuna_v1": (154, "1fa69e2371b762d1"), "llava_v1": (156, "ace78a978005f68a")}


@pytest.mark.parametrize("name", SYSTEM)
def test_vicuna_text(name):
    template = TEMPLATES[name]
    system = template.system.removesuffix(" ")
    assert (len(system), hashlib.sha256(system.encode()).hexdigest()[:16]) == SYSTEM[name]
    encoded = converse(("Q1", "A1"), ("Q2", "A2"), features=[3], template=name)
    assert text_of(encoded.token_ids) == (
        f"<s>{system} USER: {3 * '<image>'}\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
    )
    assert text_of(encoded.token_ids[encoded.supervised]) == " A1</s> A2</s>"
    assert special(template.end_token) == encoded.token_ids[-1]
    prompt = converse(("Q1", "A1"), ("Q2", None), template=name)
    assert text_of(prompt.token_ids) == f"<s>{system} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"


def test_the_first_llavas_text():
    template = TEMPLATES["llava_v0"]
    system = template.system.removesuffix("###")
    assert (len(system), hashlib.sha256(system.encode()).hexdigest()[:16]) == (156, "ace78a978005f68a")
    encoded = converse(("Q1", "A1"), ("Q2", "A2"), features=[2], template="llava_v0")
    assert text_of(encoded.token_ids) == (
        f"<s>{system}###Human: {2 * '<image>'}\nQ1###Assistant: A1###Human: Q2###Assistant: A2###"
    )
    assert text_of(encoded.token_ids[encoded.supervised]) == " A1### A2###"
    prompt = converse(("Q1", "A1"), ("Q2", None), template="llava_v0")
    assert text_of(prompt.token_ids) == f"<s>{system}###Human: Q1###Assistant: A1###Human: Q2###Assistant:"


LLAMA_2 = {"llava_llama_2": (186, "790f4cfc05523b0e"), "llama_2": (508, "d52c188a3c969c4e")}


@pytest.mark.parametrize("name", LLAMA_2)
def test_llama_2_text(name):
    template = TEMPLATES[name]
    system = template.system.removeprefix("[INST] <<SYS>>\n").removesuffix("\n<</SYS>>\n\n")
    assert (len(system), hashlib.sha256(system.encode()).hexdigest()[:16]) == LLAMA_2[name]
    encoded = converse(("Q1", "A1"), ("Q2", "A2"), features=[2], template=name)
    assert text_of(encoded.token_ids) == (
        f"<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{2 * '<image>'}\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"
    )
    assert text_of(encoded.token_ids[encoded.supervised]) == " A1 </s> A2 </s>"
    assert special(template.end_token) == encoded.token_ids[-1]
    assert text_of(encoded.token_ids[: encoded.answer_start]).endswith("Q2 [/INST]")


def test_plain_text_is_the_image_and_its_caption():
    for question in ("Describe it.", "<image>\nDescribe it."):
        encoded = converse((question, "A cat."), features=[2], template="plain")
        assert text_of(encoded.token_ids) == f"<s>{2 * '<image>'}A cat.\n"
        assert text_of(encoded.token_ids[encoded.supervised]) == "A cat.\n"


def test_names_of_templates():
    for name, template in TEMPLATES.items():
        names = ["qwen2", "internlm2"] if name in ("qwen2", "internlm2") else [name]
        assert template_names(template) == names
        assert template_names(dataclasses.replace(template, image_token="<unk>")) == names  # noqa: S106
        assert template_names(dataclasses.replace(template, system="Other.")) == []


def test_unknown_templates_name_the_nearest():
    with pytest.raises(InputError, match="no template 'vicuna': the nearest names are vicuna_v1"):
        get_template("vicuna")
    with pytest.raises(InputError, match="qwen2, internlm2, phi3"):
        get_template("§§")


def test_a_token_that_spans_the_answers_beginning_is_supervised():
    template = TEMPLATES["vicuna_v1"]
    encoded = encode([("Q", "A"), ("Q", "A")], [], template, Characters(": ", " A", "A "))
    # ": " takes the answers' spaces, save that of the question's opening, where it is no answer's.
    ids = encoded.token_ids.tolist()
    assert [index for index, value in enumerate(encoded.supervised) if value][:3] == [
        ids.index(special("</s>")) - 2,
        ids.index(special("</s>")) - 1,
        ids.index(special("</s>")),
    ]
    assert encoded.answer_start == len(ids) - 3 and encoded.supervised.sum() == 6


@pytest.mark.parametrize(
    "template, turns, features, shared",
    [
        ("qwen2", [("What?", None)], [], ""),
        ("qwen2", [("What?", None)], [2], f"<|im_start|>user\n<img>{2 * CONTEXT}</img>"),
        ("qwen2", [("A", "B"), ("What?", None)], [], "<|im_start|>user\nA<|im_end|><|im_start|>assistant\nB<|im_end|>"),
        ("phi3", [("A", "B"), ("C", "D")], [1], f"<|user|>\n<img>{CONTEXT}</img>A<|end|><|assistant|>\nB<|end|>"),
        ("qwen2", [("What <image>?", None)], [1], f"<|im_start|>user\nWhat <img>{CONTEXT}</img>"),
        ("vicuna_v1", [("What?", None)], [], f"<s>{TEMPLATES['vicuna_v1'].system}"),
        ("vicuna_v1", [("What?", None)], [2], f"<s>{TEMPLATES['vicuna_v1'].system}USER: <image><image>"),
        ("llava_llama_2", [("A", "B"), ("C", None)], [], None),
        ("plain", [("What?", None)], [1], "<s><image>"),
    ],
)
def test_what_other_questions_share(template, turns, features, shared):
    encoded = converse(*turns, features=features, template=template)
    if shared is None:
        shared = text_of(encoded.token_ids).removesuffix("C [/INST]")
    assert text_of(encoded.token_ids[: encoded.prefix_length]) == shared
    other = converse(*turns[:-1], (turns[-1][0] + " 0", None), features=features, template=template)
    assert other.prefix_length == encoded.prefix_length
    np.testing.assert_array_equal(other.token_ids[: other.prefix_length], encoded.token_ids[: other.prefix_length])


def test_a_token_that_spans_the_end_of_the_prefix_is_not_shared():
    encoded = encode([("What?", None)], [], TEMPLATES["vicuna_v1"], Characters(" U"))
    assert text_of(encoded.token_ids[: encoded.prefix_length]) == "<s>" + TEMPLATES["vicuna_v1"].system.rstrip()


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
    assert (segment.token_ids == special(CONTEXT)).sum() == 5
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
