"""The conversation: what the model is asked, what is remembered, forgotten and refused."""

import dataclasses
import os

import pytest
from PIL import Image

from phantom_jax.errors import InputError
from phantom_jax.generation.chat import Conversation
from tests.generation import tiny
from tests.generation.fake import Handle


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


@pytest.fixture
def wide(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (64, 32), "blue").save(path)
    return path


def _say(conversation, text):
    return "".join(conversation.ask(text))


def test_every_question_comes_with_the_turns_before_it():
    handle = Handle()
    conversation = Conversation(handle, temperature=0.5)
    assert _say(conversation, "abc") == "cba"
    assert _say(conversation, "de") == "ed"
    assert handle.asked == [
        ("abc", [], [], {"temperature": 0.5}),
        ("de", [], [("abc", "cba")], {"temperature": 0.5}),
    ]
    conversation.reset()
    assert _say(conversation, "f") == "f"
    assert handle.asked[-1][2] == []


def test_images_stay_with_their_turn(picture, wide):
    handle = Handle(max_length=128)
    conversation = Conversation(handle)
    assert conversation.attach(picture).size == (32, 32)
    assert conversation.attach(wide).tiles == 3
    _say(conversation, "two")
    _say(conversation, "none")
    conversation.attach(picture)
    _say(conversation, "a <image>?")
    red, blue = picture.read_bytes(), wide.read_bytes()
    assert [(question, images) for question, images, _, _ in handle.asked] == [
        ("<image><image>two", [red, blue]),
        ("none", [red, blue]),
        ("a <image>?", [red, blue, red]),
    ]
    assert [question for question, _ in handle.asked[-1][2]] == ["<image><image>two", "none"]
    assert conversation.attached == []


def test_the_first_question_reads_as_one_without_a_conversation(picture):
    handle = Handle(max_length=512)
    template = dataclasses.replace(handle.processor.template, after_image="\n")
    handle.processor = dataclasses.replace(handle.processor, template=template)
    conversation = Conversation(handle)
    conversation.attach(picture)
    conversation.attach(picture)
    _say(conversation, "what?")
    question, images, _, _ = handle.asked[0]
    marked = handle.processor.encode_prompt(question, images)
    plain = handle.processor.encode_prompt("what?", images)
    assert marked.token_ids.tolist() == plain.token_ids.tolist()


def test_a_changed_file_does_not_change_the_conversation(picture):
    handle = Handle()
    conversation = Conversation(handle)
    conversation.attach(picture)
    before = picture.read_bytes()
    _say(conversation, "a")
    picture.unlink()
    _say(conversation, "b")
    assert handle.asked[-1][1] == [before]


def test_the_oldest_turns_are_forgotten_with_their_images(picture):
    handle, notices = Handle(), []
    conversation = Conversation(handle, notify=notices.append)
    conversation.attach(picture)
    for text in ("1", "2", "3", "4", "5", "6"):
        _say(conversation, text)
    lengths = [
        len(handle.processor.encode_prompt(question, images, history=history).token_ids)
        for question, images, history, _ in handle.asked
    ]
    # A quarter of the context is kept for the answer.
    assert max(lengths) <= 48 and not notices[1:]
    assert notices == ["the context of 64 tokens is full: the oldest turn was forgotten"]
    assert [len(images) for _, images, _, _ in handle.asked] == [1, 1, 1, 1, 0, 0]
    assert [[question[-1] for question, _ in history] for _, _, history, _ in handle.asked[3:]] == [
        ["1", "2", "3"],
        ["2", "3", "4"],
        ["2", "3", "4", "5"],
    ]
    _say(conversation, "x" * 20)
    assert notices[1:] == ["the context of 64 tokens is full: the 3 oldest turns were forgotten"]
    assert [turn.question for turn in conversation.turns] == ["5", "6", "x" * 20]


def test_room_is_kept_for_the_answer_that_was_asked_for():
    handle = Handle()
    conversation = Conversation(handle, max_new_tokens=54)
    _say(conversation, "1")
    _say(conversation, "2")
    assert [history for _, _, history, _ in handle.asked] == [[], []]


def test_a_question_that_never_fits_changes_nothing(picture):
    handle, notices = Handle(), []
    conversation = Conversation(handle, notify=notices.append)
    _say(conversation, "1")
    conversation.attach(picture)
    turns = list(conversation.turns)
    with pytest.raises(InputError, match="the question has .* tokens, 4 of them for images; the context is 64"):
        conversation.ask("x" * 80)
    assert conversation.turns == turns and len(conversation.attached) == 1 and not notices
    assert _say(conversation, "2") == "2>egami<"


def test_an_error_of_the_model_changes_nothing():
    class Failing(Handle):
        def stream(self, prompt, **rest):
            raise InputError("no room")
            yield

    handle, notices = Failing(), []
    conversation = Conversation(handle, notify=notices.append)
    with pytest.raises(InputError, match="no room"):
        _say(conversation, "a")
    assert conversation.turns == [] and not notices


def test_what_was_said_before_an_interruption_is_the_answer(picture):
    conversation = Conversation(Handle())
    answer = conversation.ask("abc")
    assert next(answer) + next(answer) == "cb"
    answer.close()
    assert [(turn.question, turn.answer) for turn in conversation.turns] == [("abc", "cb")]
    answer = conversation.ask("de")
    next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert conversation.turns[-1].answer == "e"


def test_an_interruption_before_the_first_word_takes_the_question_back(picture):
    class Interrupted(Handle):
        def stream(self, prompt, **rest):
            yield ""
            raise KeyboardInterrupt

    conversation = Conversation(Interrupted())
    conversation.attach(picture)
    with pytest.raises(KeyboardInterrupt):
        _say(conversation, "abc")
    assert conversation.turns == [] and len(conversation.attached) == 1


def test_marks_and_attached_images_must_agree(picture):
    conversation = Conversation(Handle())
    with pytest.raises(InputError, match="the question has 1 <image> marks, and 0 images are attached"):
        conversation.ask("an <image>")
    conversation.attach(picture)
    with pytest.raises(InputError, match="has 2 <image> marks, and 1 images"):
        conversation.ask("<image><image>")


def test_what_cannot_be_attached(tmp_path, picture, wide):
    conversation = Conversation(Handle(max_length=24))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:60])
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("missing.png", "there is no image file"),
        ("pipe.png", "there is no image file"),
        ("text.png", "is not an image of the formats"),
        ("cut.png", "cut short or damaged"),
    ):
        with pytest.raises(InputError, match=message):
            conversation.attach(tmp_path / name)
    conversation.attach(picture)
    with pytest.raises(InputError, match=r"a question about .*wide.png has .* the context is 24"):
        conversation.attach(wide)
    assert [image.name for image in conversation.attached] == [str(picture)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "beams are ranked when they are whole: with num_beams=4"),
        ({"num_answers": 2, "temperature": 1.0}, "only one answer can be streamed, not num_answers=2"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_settings_that_no_conversation_has(settings, message):
    with pytest.raises(InputError, match=message):
        Conversation(Handle(), **settings)


def test_a_model_says_in_a_conversation_what_it_says_without(tmp_path):
    handle = tiny.handle()
    tiny.image(32, 16).save(tmp_path / "picture.png")
    conversation = Conversation(handle, max_new_tokens=6)
    conversation.attach(tmp_path / "picture.png")
    first = _say(conversation, "What is this?")
    images = [tmp_path / "picture.png"]
    assert first == handle.generate("What is this?", images=images, max_new_tokens=6)
    conversation.attach(tmp_path / "picture.png")
    history = [("<image>What is this?", first)]
    second = handle.generate("How <image>?", images=images * 2, history=history, max_new_tokens=6)
    assert _say(conversation, "How <image>?") == second and second
