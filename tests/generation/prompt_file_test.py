"""Files of prompts: what they may hold, and everything that is wrong with one at once."""

import json
import os

import pytest
from PIL import Image

from phantom_jax.errors import InputError
from phantom_jax.generation.prompt_file import check_lengths, read_prompts
from phantom_jax.generation.settings import Settings
from tests.generation.fake import make_processor


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "images" / "a.png")
    Image.new("RGB", (32, 32)).save(folder / "b.jpg")
    return folder


def _file(folder, rows, name="questions.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_llavas_question_files(folder):
    rows = [
        {"question_id": 7, "image": "images/a.png", "text": "What is it?", "category": "conv"},
        {"question_id": 9, "text": "And without an image?", "category": "detail"},
    ]
    first, second = read_prompts(_file(folder, rows))
    assert (first.question_id, first.text, first.names) == (7, "What is it?", ("images/a.png",))
    assert first.paths == (str(folder / "images" / "a.png"),) and first.sizes == ((40, 30),)
    assert (second.question_id, second.paths, second.line) == (9, (), 2)


def test_other_names_and_defaults(folder):
    rows = [
        {"id": "x", "prompt": "<image> and <image>", "images": ["images/a.png", "b.jpg"]},
        "",
        {"question": " q\u2028r ", "image": None},
    ]
    first, second = read_prompts(_file(folder, rows))
    assert (first.question_id, len(first.paths)) == ("x", 2)
    assert (second.question_id, second.text, second.paths) == (3, " q\u2028r ", ())


def test_lines_of_text(folder):
    path = folder / "questions.txt"
    path.write_bytes("\ufeffWhat?\r\n\r\n  Who is\x0bé?  ".encode())
    assert [(prompt.question_id, prompt.text) for prompt in read_prompts(path)] == [(1, "What?"), (3, "Who is\x0bé?")]


def test_the_image_folder(folder, tmp_path):
    path = _file(tmp_path, [{"text": "q", "image": "a.png"}])
    [prompt] = read_prompts(path, image_folder=folder / "images")
    assert prompt.paths == (str(folder / "images" / "a.png"),)
    with pytest.raises(InputError, match="there is no image folder"):
        read_prompts(path, image_folder=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "list where an object"),
        ({"id": 1}, "no question: write it under 'prompt', 'question' or 'text'"),
        ({"text": " "}, "the question is ' '"),
        ({"text": 3}, "the question is 3"),
        ({"text": "a", "prompt": "b"}, "both 'prompt' and 'text'"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"id": True, "text": "a"}, "question id True"),
        ({"id": "first", "text": "a"}, "question id 'first' stands in line 1 already"),
        ({"text": "a", "image": 3}, "an image is 3"),
        ({"text": "a", "image": ""}, "an image is ''"),
        ({"text": "a", "images": ["b.jpg"], "image": "b.jpg"}, "both 'image' and 'images'"),
        ({"text": "a", "image": "c.jpg"}, "image 'c.jpg' is missing"),
        ({"text": "a", "image": "images"}, "image 'images' is missing"),
        ({"text": "a", "image": "x" * 300}, "is no path|is missing"),
        ({"text": "a", "image": "\ud800"}, "is no path"),
        ({"text": "a", "image": "/etc/hostname"}, "write a path inside"),
        ({"text": "a", "image": "images/../b.jpg"}, "write a path inside"),
        ({"text": "a", "image": "b.jpg\0"}, "write a path inside"),
        ({"text": "a", "image": "out.png"}, "is a link that leaves the image folder"),
        ({"text": "a", "image": "away/secret.png"}, "is a link that leaves the image folder"),
        ({"text": "a", "image": "loop"}, "is no path|is missing"),
        ({"text": "a", "image": "pipe"}, "is missing"),
        ({"text": "a", "image": "questions.jsonl"}, "is not an image of the formats"),
        ({"text": "<image> <image>", "image": "b.jpg"}, "2 <image> marks and 1 images"),
        ({"text": "<image>"}, "1 <image> marks and 0 images"),
    ],
)
def test_what_is_wrong_with_a_line(row, message, folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "away").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    path = _file(folder, [{"id": "first", "text": "fine"}, row])
    with pytest.raises(InputError, match=f"cannot be answered as it is, correct it first:\n  line 2: .*({message})"):
        read_prompts(path)


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "link.png").symlink_to("images/a.png")
    [prompt] = read_prompts(_file(folder, [{"text": "a", "image": "link.png"}]))
    assert prompt.names == ("link.png",) and prompt.paths == (str(folder / "images" / "a.png"),)


def test_all_that_is_wrong_is_said_up_to_ten(folder):
    path = _file(folder, ["{", {"text": "fine"}, *[{"text": ""}] * 12])
    with pytest.raises(InputError) as error:
        read_prompts(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 12 and lines[1].startswith("  line 1: not JSON") and lines[-1] == "  and 3 more"


def test_files_of_another_kind(folder):
    for name in ("questions.json", "questions"):
        with pytest.raises(InputError, match="is no file of prompts: give a .jsonl"):
            read_prompts(_file(folder, [{"text": "a"}], name))
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(_file(folder, ["", " "]))
    (folder / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"line 2: not UTF-8 \(.* at byte 3\)"):
        read_prompts(folder / "latin.txt")


def test_prompts_that_the_context_does_not_hold(folder):
    rows = [{"text": "short"}, {"text": "x" * 80}, {"text": "y" * 40, "image": "images/a.png"}]
    path = _file(folder, rows)
    prompts, processor = read_prompts(path), make_processor()
    with pytest.raises(InputError) as error:
        check_lengths(prompts, processor, Settings(), path=path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[1].startswith("  line 2: ") and "the context is 64" in lines[1]
    assert lines[2].startswith("  line 3: ")
    check_lengths(prompts[:1], processor, Settings(), path=path)
    with pytest.raises(InputError, match="line 1: a prompt of .* leaves .* of the context's 64.*, which needs 60"):
        check_lengths(prompts[:1], processor, Settings(max_new_tokens=60), path=path)
