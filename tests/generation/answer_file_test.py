"""Files of answers: their fields, going on after a kill, and what is never written over."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from phantom_jax.errors import InputError
from phantom_jax.generation.answer_file import AnswerFile, answer_prompts, folder_digest
from phantom_jax.generation.prompt_file import read_prompts
from phantom_jax.generation.settings import Settings
from tests.generation import tiny
from tests.generation.fake import Handle


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8192)
    return folder


@pytest.fixture
def questions(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": f"q{number}", "text": f"question {number}", "image": "a.png"} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _answer(questions, output, model, *, handle=None, batch_size=3, options=None, **settings):
    handle = handle or Handle()
    prompts = read_prompts(questions)
    with AnswerFile(output, prompts, model=model, settings=Settings.of(settings), options=options or {}) as answers:
        done, cut = answers.done, answers.cut
        answer_prompts(handle, answers, batch_size=batch_size, settings=settings)
    return handle, done, cut


def test_the_fields_of_an_answer(questions, model, tmp_path, capsys):
    handle, *_ = _answer(questions, tmp_path / "new" / "out.jsonl", model, options={"quantize": "nf4"}, stop="\n")
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [f"q{number}" for number in range(8)]
    assert list(rows[3]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (rows[3]["prompt"], rows[3]["text"], rows[3]["model_id"]) == ("question 3", "3 noitseuq", "tiny")
    assert rows[3]["metadata"]["images"] == ["a.png"]
    settings = rows[3]["metadata"]["settings"]
    assert (settings["quantize"], settings["stop"], settings["temperature"]) == ("nf4", ["\n"], 0.0)
    assert len({row["answer_id"] for row in rows}) == 8
    assert [len(prompts) for prompts, *_ in handle.asked] == [3, 3, 2]
    image = str(questions.parent / "a.png")
    assert handle.asked[0] == (["question 0", "question 1", "question 2"], [[image]] * 3, 3, {"stop": "\n"})
    shown = capsys.readouterr()
    assert not shown.out and "answered 8 of 8 prompts\n" in shown.err and "\r" not in shown.err


def test_a_terminal_has_a_progress_bar(questions, model, tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    _answer(questions, tmp_path / "out.jsonl", model)
    assert screen.getvalue().rstrip().split("\r")[-1].startswith("100%") and "answered" not in screen.getvalue()


def test_several_answers_are_a_list(questions, model, tmp_path):
    _answer(questions, tmp_path / "out.jsonl", model, num_answers=2, temperature=1.0)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["text"] == ["0 noitseuq 0", "0 noitseuq 1"]


@pytest.mark.parametrize("lines", [1, 3, 5, 8])
@pytest.mark.parametrize("half", [0, 1, 40])
def test_going_on_gives_the_same_file(lines, half, questions, model, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    _answer(questions, whole, model)
    content = whole.read_bytes()
    kept = b"".join(content.splitlines(keepends=True)[:lines])
    output.write_bytes(content[: len(kept) + half])
    handle, done, cut = _answer(questions, output, model)
    assert output.read_bytes() == content
    assert (done, cut) == (lines, half if lines < 8 else 0)
    # The batches are those of the undisturbed run.
    assert all(prompts[0] in ("question 0", "question 3", "question 6") for prompts, *_ in handle.asked)


def test_a_killed_run_goes_on_in_another_process(questions, model, tmp_path, repository):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    _answer(questions, whole, model)
    run = [sys.executable, "-m", "tests.generation.fake", "answer"]
    process = subprocess.Popen([*run, "hanging", questions, output, model], cwd=repository, stderr=subprocess.DEVNULL)
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert output.read_bytes().count(b"\n") == 3
    subprocess.run([*run, "whole", questions, output, model], cwd=repository, check=True, stderr=subprocess.DEVNULL)
    assert output.read_bytes() == whole.read_bytes()


def test_another_batch_size_may_go_on(questions, model, tmp_path):
    output = tmp_path / "out.jsonl"
    _answer(questions, output, model)
    content = output.read_bytes()
    output.write_bytes(b"".join(content.splitlines(keepends=True)[:3]))
    handle, *_ = _answer(questions, output, model, batch_size=2)
    assert output.read_bytes() == content
    assert [prompts[0] for prompts, *_ in handle.asked] == ["question 2", "question 4", "question 6"]


def _other_weights(model):
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)


def _other_question(questions, old, new):
    questions.write_text(questions.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("settings", "its line 1 has other settings, theirs -> yours: temperature 0.0 -> 0.5"),
        ("options", 'its line 1 has other settings, theirs -> yours: quantize null -> "int8"'),
        ("weights", "its line 1 is of a model of this name with other contents"),
        ("name", "its line 1 is of model 'tiny' with other contents"),
        ("text", 'its line 2 has other questions, theirs -> yours: prompt "question 1" -> "question one"'),
        ("id", 'its line 3 has other questions, theirs -> yours: question_id "q2" -> "z2"'),
        ("image", r'its line 1 has other questions, theirs -> yours: images \["a.png"\] -> \["b.png"\]'),
        ("fewer", "it holds 8 answers, to 2 prompts"),
        ("garbage", "its line 2 is not an answer"),
        ("notes", "its line 9 is not an answer"),
    ],
)
def test_an_output_of_another_run_is_kept_as_it_is(change, message, questions, model, tmp_path):
    output, settings, options = tmp_path / "out.jsonl", {}, {}
    _answer(questions, output, model)
    if change == "settings":
        settings = {"temperature": 0.5}
    elif change == "options":
        options = {"quantize": "int8"}
    elif change == "weights":
        _other_weights(model)
    elif change == "name":
        model = model.rename(model.parent / "other")
        _other_weights(model)
    elif change == "text":
        _other_question(questions, "question 1", "question one")
    elif change == "id":
        _other_question(questions, "q2", "z2")
    elif change == "image":
        (tmp_path / "a.png").rename(tmp_path / "b.png")
        _other_question(questions, "a.png", "b.png")
    elif change == "fewer":
        questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:2]))
    elif change == "garbage":
        lines = output.read_text().splitlines()
        output.write_text("\n".join([lines[0], '{"text": "a"}', *lines[2:]]) + "\n")
    elif change == "notes":
        with output.open("a") as file:
            file.write("my notes")
    before = output.read_bytes()
    with pytest.raises(InputError, match=f"output .*out.jsonl is kept as it is: {message}"):
        _answer(questions, output, model, options=options, **settings)
    assert output.read_bytes() == before


def test_the_questions_themselves_are_not_written_over(questions, model):
    before = questions.read_bytes()
    with pytest.raises(InputError, match="its line 1 is not an answer"):
        _answer(questions, questions, model)
    assert questions.read_bytes() == before


def test_two_processes_do_not_write_to_one_file(questions, model, tmp_path):
    output, prompts = tmp_path / "out.jsonl", read_prompts(questions)
    with (
        AnswerFile(output, prompts, model=model, settings=Settings(), options={}),
        pytest.raises(InputError, match="out.jsonl is in use: another process"),
    ):
        AnswerFile(output, prompts, model=model, settings=Settings(), options={})
    AnswerFile(output, prompts, model=model, settings=Settings(), options={}).close()


def test_outputs_that_are_no_files(questions, model, tmp_path):
    for output in (tmp_path, "/dev/null"):
        with pytest.raises(InputError, match="is no file that can be gone on with"):
            _answer(questions, output, model)
    with pytest.raises(InputError, match="there is no model folder"):
        _answer(questions, tmp_path / "out.jsonl", tmp_path / "nowhere")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_digest_sees_the_model_alone(model):
    before = folder_digest(model)
    (model / "answers.jsonl").write_text("{}\n")
    os.utime(model / "config.json")
    assert folder_digest(model) == before
    (model / "params" / "deep").mkdir(parents=True)
    (model / "params" / "deep" / "0").write_text("a")
    assert folder_digest(model) != before


def test_a_model_writes_what_it_says(questions, model, tmp_path):
    handle = tiny.handle()
    _answer(questions, tmp_path / "out.jsonl", model, handle=handle, num_beams=2, num_answers=2, max_new_tokens=4)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    settings = {"num_beams": 2, "num_answers": 2, "max_new_tokens": 4}
    images = [questions.parent / "a.png"]
    for row in (rows[0], rows[7]):
        assert row["text"] == handle.generate(row["prompt"], images=images, **settings) and all(row["text"])


@pytest.mark.parametrize(
    "theirs", ['{"question_id": "q0", "text": "precious"}', '{"question_id": "q0", "prompt": "another", "te', "notes"]
)
def test_a_last_line_that_is_not_ours_is_kept(theirs, questions, model, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text(theirs)
    with pytest.raises(InputError, match="is kept as it is: its line 1 is not an answer"):
        _answer(questions, output, model)
    assert output.read_text() == theirs


def test_nothing_is_cut_or_left_before_the_first_answer(questions, model, tmp_path):
    output, prompts = tmp_path / "out.jsonl", read_prompts(questions)
    AnswerFile(output, prompts, model=model, settings=Settings(), options={}).close()
    assert not output.exists()
    _answer(questions, output, model)
    whole = output.read_bytes()
    for cut in (9, 1):  # the second leaves a line that is whole but for its end
        output.write_bytes(whole[:-cut])
        AnswerFile(output, prompts, model=model, settings=Settings(), options={}).close()
        assert output.read_bytes() == whole[:-cut]
        _answer(questions, output, model)
        assert output.read_bytes() == whole
