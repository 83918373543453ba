"""Answers through the library's handle: batches, shared prefixes, streaming, and what compiles."""

import dataclasses

import jax
import numpy as np
import pytest

from phantom_jax.errors import InputError
from phantom_jax.generation import engine, prefix
from phantom_jax.generation.settings import Settings
from tests.generation import tiny

NEW = {"max_new_tokens": 9}
EVERY_KIND = pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.0, "num_answers": 2, "seed": 3}, {"num_beams": 3}, {"repetition_penalty": 1.5}],
    ids=["greedy", "sampled", "beams", "penalty"],
)


@pytest.fixture(scope="module")
def vlm():
    return tiny.handle()


def requests():
    """Mixed: text alone, one image, two images, a large image, and one image asked twice."""
    one = tiny.image(16, 16, seed=1)
    return [
        ("What is this?", []),
        ("Read the number.", [one]),
        ("How many digits are there? Read the number.", [tiny.image(48, 16, seed=2), tiny.image(16, 32, seed=3)]),
        ("Is <image> this?", [tiny.image(48, 32, seed=4)]),
        ("How many?", [one]),
    ]


@EVERY_KIND
def test_a_batch_equals_its_rows_one_by_one(vlm, settings):
    questions, images = zip(*requests(), strict=True)
    together = vlm.generate(list(questions), images=list(images), **NEW, **settings)
    for question, pictures, answer in zip(questions, images, together, strict=True):
        vlm.engine.prefixes.clear()
        assert vlm.generate(question, images=pictures, **NEW, **settings) == answer
    by_two = vlm.generate(list(questions), images=list(images), batch_size=2, **NEW, **settings)
    assert by_two == together


@pytest.mark.parametrize("ends_in_an_image", [False, True])
def test_the_prefix_changes_no_token(vlm, ends_in_an_image):
    """A prompt read in two parts gives the tokens that it gives in one."""
    if ends_in_an_image:
        # As LLaVA's `plain`: images, and nothing behind them.
        template = dataclasses.replace(vlm.processor.template, assistant="", image_end="")
        vlm = dataclasses.replace(vlm, processor=dataclasses.replace(vlm.processor, template=template))
    for question, pictures in requests():
        prompt = vlm.processor.encode_prompt("<image>" * len(pictures) if ends_in_an_image else question, pictures)
        assert (prompt.image_slots[-1] >= 0) == (ends_in_an_image and bool(pictures))
        [[ours]] = vlm.engine.answer([prompt], Settings(max_new_tokens=9))
        row = np.concatenate([prompt.token_ids, ours])[None].astype(np.int32)
        slots = np.full_like(row, -1)
        slots[0, : len(prompt.image_slots)] = prompt.image_slots
        batch = {"token_ids": row, "positions": np.arange(row.size)[None], "segment_ids": np.ones_like(row)}
        if len(prompt.tiles):
            pixels = prefix.normalize_pixels(prompt.tiles[None], vlm.processor.mean, vlm.processor.std)
            batch |= {"image_slots": slots, "pixels": pixels}
        logits = vlm.model.apply({"params": vlm.params}, batch, rope_length=64)
        best = np.argmax(np.asarray(logits)[0, len(prompt.token_ids) - 1 : -1], axis=-1)
        assert ours.tolist() == best.tolist()


def test_an_image_is_encoded_once_for_many_questions():
    vlm = tiny.handle()
    picture = tiny.image(48, 32)
    questions = ["What is this?", "Read the number.", "How many digits are there?"]
    separate = []
    for question in questions:
        vlm.engine.prefixes.clear()
        separate.append(vlm.generate(question, images=[picture], **NEW))
    before = vlm.engine.prefixes.tokens_read
    vlm.engine.prefixes.clear()
    assert vlm.generate(questions, images=[[picture]] * 3, **NEW) == separate
    length = vlm.processor.encode_prompt("What is this?", [picture]).prefix_length
    assert vlm.engine.prefixes.tokens_read - before == length
    assert vlm.generate("What is this?", images=[picture], **NEW) == separate[0]
    assert vlm.engine.prefixes.tokens_read - before == length, "a later call finds it too"
    vlm.generate("What is this?", images=[tiny.image(48, 32, seed=9)], **NEW)
    assert vlm.engine.prefixes.tokens_read - before == 2 * length, "another image of that size is another prefix"


def test_the_next_turn_reads_only_what_is_new():
    vlm = tiny.handle()
    pictures = [tiny.image(48, 16)]
    history = []
    seen = 0
    for question in ("What is this?", "Read the number.", "How many digits are there?"):
        prompt = vlm.processor.encode_prompt(question, pictures, history=history)
        answer = vlm.generate(question, images=pictures, history=history, **NEW)
        assert vlm.engine.prefixes.tokens_read == prompt.prefix_length, "each token of the prefix is read once"
        assert vlm.engine.prefixes.tokens_reused == seen
        seen += prompt.prefix_length
        kept = vlm.engine.prefixes.tokens_read
        fresh = tiny.handle().generate(question, images=pictures, history=history, **NEW)
        assert answer == fresh and vlm.engine.prefixes.tokens_read == kept
        history.append((question, answer))


def test_prefixes_beyond_the_capacity_are_given_up_oldest_first():
    vlm = tiny.handle()
    pictures = [tiny.image(16, 16, seed=seed) for seed in range(3)]
    vlm.generate("What?", images=pictures[:1], **NEW)
    vlm.engine.prefixes.capacity = 2 * vlm.engine.prefixes.bytes
    for picture in pictures[1:]:
        vlm.generate("What?", images=[picture], **NEW)
    read = vlm.engine.prefixes.tokens_read
    vlm.generate("What?", images=[pictures[2]], **NEW)
    vlm.generate("What?", images=[pictures[1]], **NEW)
    assert vlm.engine.prefixes.tokens_read == read
    vlm.generate("What?", images=[pictures[0]], **NEW)
    assert vlm.engine.prefixes.tokens_read > read


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "seed": 4}, {"stop": ["e", "数"]}, {"min_new_tokens": 30}]
)
def test_the_stream_joined_is_the_answer(vlm, settings):
    for seed, (question, pictures) in enumerate(requests()):
        asked = {"max_new_tokens": 40} | settings | ({"seed": seed} if "temperature" in settings else {})
        pieces = list(vlm.stream(question, images=pictures, **asked))
        assert "".join(pieces) == vlm.generate(question, images=pictures, **asked)


def test_stop_strings_are_no_part_of_the_answer(vlm):
    free = vlm.generate("What is this?", max_new_tokens=40)
    stop = next(free[at : at + 2] for at in range(len(free) // 2, len(free)) if free[at : at + 2].isascii())
    assert vlm.generate("What is this?", max_new_tokens=40, stop=stop) == free[: free.index(stop)].strip()
    [[tokens]] = vlm.engine.answer([vlm.processor.encode_prompt("What is this?")], Settings(stop=stop))
    assert len(tokens) < 40, "the loop stops there too"


def test_the_same_question_samples_the_same_answer_and_others_differ(vlm):
    settings = {"temperature": 2.0, "max_new_tokens": 12}
    answers = vlm.generate(["What is this?", "Read the number.", "What is this?"], **settings)
    assert answers[0] == answers[2] != answers[1]
    assert vlm.generate("What is this?", seed=1, **settings) != answers[0]
    several = vlm.generate("What is this?", num_answers=4, **settings)
    assert several[0] == answers[0] and len(set(several)) == 4


def test_beams_give_as_many_answers_as_asked(vlm):
    answers = vlm.generate("What is this?", num_beams=4, num_answers=4, max_new_tokens=6)
    assert len(answers) == 4 and answers[0] == vlm.generate("What is this?", num_beams=4, max_new_tokens=6)


@pytest.fixture
def compiled():
    """Names of what is compiled while the test runs."""
    names = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_requests_of_a_size_compile_nothing(vlm, compiled):
    vlm.generate(["What is this?", "How?"], images=[[tiny.image(48, 16, seed=20)], []], **NEW)
    list(vlm.stream("What is this?", images=[tiny.image(48, 16, seed=20)], **NEW))
    compiled.clear()
    # Questions and images of other contents and lengths, but of the same sizes.
    vlm.generate(["Read it. Read!", "Is this?"], images=[[tiny.image(48, 17, seed=21)], []], max_new_tokens=5)
    vlm.generate(["What?", "How many?"], images=[[], [tiny.image(50, 16, seed=22)]], min_new_tokens=2, **NEW)
    list(vlm.stream("Read it.", images=[tiny.image(48, 16, seed=23)], max_new_tokens=5))
    assert not compiled
    vlm.generate("What is this?", images=[tiny.image(16, 48, seed=20)], num_beams=2, **NEW)
    assert compiled, "the listener sees what is compiled"


def test_a_cache_of_8_bits_answers_alike():
    exact, coarse = tiny.handle(), tiny.handle()
    coarse.int8_cache = True
    first = [
        handle.engine.answer(
            [handle.processor.encode_prompt(*request) for request in requests()], Settings(max_new_tokens=4)
        )
        for handle in (exact, coarse)
    ]
    same = [a[0][0] == b[0][0] for a, b in zip(*first, strict=True)]
    assert sum(same) >= 4


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ("a " * 200, {}, "The prompt has .* tokens, 0 of them for images; the context is 160"),
        ("What?", {"max_new_tokens": 155}, "leaves .* of the context's 160 .* ask for at most .* instead of 155"),
        ("What?", {"stop": ""}, "stop"),
        ("What?", {"stop": "<|eot|>"}, r"<\|eot\|>.* no special token"),
        ("What?", {"num_beams": 0}, "num_beams is 0: set it to a whole number, 1 or more"),
        ("What?", {"temperature": -0.5}, "temperature is -0.5: set it to a number, 0 or more"),
        ("What?", {"temperatur": 1}, "no setting 'temperatur': did you mean 'temperature'"),
        ("What?", {"images": [b"no image at all"]}, "is not an image of the formats"),
        ("What?", {"images": b"abc"}, "images is one image"),
        (["What?", "How?"], {"images": [[]]}, "2 prompts need as many lists of images, got 1"),
        (["What?", "How?"], {"history": [("a", "b")]}, "no common history"),
        (3, {}, "prompt is int"),
        (" ", {}, "prompt is ' ', and there is no image"),
        ("What?", {"history": [("a",)]}, "give pairs of a question and its answer"),
        ("a\ud800", {}, "holds half a surrogate pair"),
    ],
)
def test_bad_input_is_one_clear_error(vlm, prompt, arguments, message):
    with pytest.raises(InputError, match=message):
        vlm.generate(prompt, **arguments)


def test_beams_and_several_answers_are_not_streamed(vlm):
    with pytest.raises(InputError, match="beams are ranked when they are whole: with num_beams=3"):
        vlm.stream("What?", num_beams=3)
    with pytest.raises(InputError, match="only one answer can be streamed, not num_answers=2"):
        vlm.stream("What?", num_answers=2, temperature=1.0)
    with pytest.raises(InputError, match="is not an image"):
        vlm.stream("What?", images=[b"no image at all"])
    with pytest.raises(InputError, match="ask for at most"):
        vlm.stream("What?", max_new_tokens=155)
    with pytest.raises(InputError, match="prompt is list"):
        vlm.stream(["What?"])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_answers": 2}, {"temperature": 1.0, "num_answers": 2}])
def test_long_answers_get_more_room_on_the_way(settings, monkeypatch):
    long = {"max_new_tokens": 60, "min_new_tokens": 50, **settings}
    whole = tiny.handle().generate("What is this?", **long)
    monkeypatch.setattr(engine, "_FIRST_SLOTS", 16)
    assert tiny.handle().generate("What is this?", **long) == whole
    if not settings:
        assert "".join(tiny.handle().stream("What is this?", **long)) == whole


def test_no_prompts_no_answers(vlm):
    assert vlm.generate([]) == []


def test_a_system_text_is_read_once():
    vlm = tiny.handle()
    template = dataclasses.replace(vlm.processor.template, system="<|im_start|>Read the number.<|im_end|>")
    vlm = dataclasses.replace(vlm, processor=dataclasses.replace(vlm.processor, template=template))
    length = vlm.processor.encode_prompt("What?").prefix_length
    assert length > 0
    vlm.generate(["What is this?", "How many?"], **NEW)
    assert vlm.engine.prefixes.tokens_read == length and vlm.engine.prefixes.tokens_reused == length


def test_sampled_beams_follow_the_seed(vlm):
    settings = {"num_beams": 3, "num_answers": 3, "temperature": 1.5, "top_k": 30, **NEW}
    answers = vlm.generate("What is this?", **settings)
    assert answers == vlm.generate(["How many?", "What is this?"], **settings)[1]
    assert len(set(answers)) == 3
    assert vlm.generate("What is this?", seed=1, **settings) != answers
