"""The verbs `generate` and `chat`: what their flags become, and combinations that are refused."""

import io
import json
import sys
import types

import jax.numpy as jnp
import pytest
from PIL import Image

from phantom_jax import cli
from phantom_jax.errors import InputError
from phantom_jax.generation_verbs import parse_mesh
from tests.generation.fake import Handle


@pytest.fixture
def loaded(monkeypatch):
    """Stands in for loading; holds what was loaded, and the handles."""
    calls = []

    class OneOrMany(Handle):
        def generate(self, prompt, *, images, batch_size=1, **settings):
            if not isinstance(prompt, str):
                return super().generate(prompt, images=images, batch_size=batch_size, **settings)
            return super().generate([prompt], images=[images], batch_size=batch_size, **settings)[0]

    def load(path, **options):
        calls.append((path, options, OneOrMany()))
        return calls[-1][-1]

    module = types.ModuleType("phantom_jax.pretrained")
    module.load, module.BATCH_SIZE = load, 32
    monkeypatch.setitem(sys.modules, "phantom_jax.pretrained", module)
    return calls


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return str(tmp_path / "tiny")


def test_flags_left_out_are_not_passed_on(loaded, capsys):
    assert cli.main(["generate", "--model=m", "--prompt=abc"]) == 0
    [(path, options, handle)] = loaded
    assert (path, options) == ("m", {}) and handle.asked == [(["abc"], [[]], 1, {})]
    assert capsys.readouterr().out == "cba\n"


def test_every_flag_arrives(loaded, capsys):
    flags = ["--dtype=bfloat16", "--quantize=nf4", "--int8_cache", "--template=vicuna_v1", "--mesh=data:2,tensor:4"]
    settings = {
        "max_new_tokens": 7,
        "min_new_tokens": 2,
        "num_beams": 3,
        "length_penalty": -0.5,
        "early_stopping": "never",
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "seed": 11,
        "repetition_penalty": 1.2,
        "num_answers": 2,
    }
    flags += [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--stop=a,b", "--stop=###", "--image=x.png", "--image=y.png"]
    assert cli.main(["generate", "--model=m", "--prompt=abc", *flags]) == 0
    [(_, options, handle)] = loaded
    assert options == {
        "dtype": jnp.bfloat16,
        "quantize": "nf4",
        "int8_cache": True,
        "template": "vicuna_v1",
        "mesh": {"data": 2, "tensor": 4},
    }
    assert handle.asked == [(["abc"], [["x.png", "y.png"]], 1, settings | {"stop": ["a,b", "###"]})]
    assert capsys.readouterr().out == "--- answer 1 of 2 ---\ncba 0\n--- answer 2 of 2 ---\ncba 1\n"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("never", "never")])
def test_early_stopping(text, value, loaded):
    assert cli.main(["generate", "--model=m", "--prompt=a", "--num_beams=2", f"--early_stopping={text}"]) == 0
    assert loaded[0][-1].asked[0][-1] == {"num_beams": 2, "early_stopping": value}


def test_streaming(loaded, capsys):
    assert cli.main(["generate", "--model=m", "--prompt=abc", "--stream", "--seed=3"]) == 0
    assert loaded[0][-1].asked == [("abc", [], [], {"seed": 3})]
    assert capsys.readouterr().out == "cba\n"


def test_chat(loaded, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n/exit\n"))
    assert cli.main(["chat", "--model=m", "--quantize=int8", "--temperature=0.5"]) == 0
    [(path, options, handle)] = loaded
    assert (path, options) == ("m", {"quantize": "int8"})
    assert handle.asked == [("abc", [], [], {"temperature": 0.5})]
    assert capsys.readouterr().out == "cba\n"


def test_a_file_of_prompts(loaded, model, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "questions.jsonl").write_text('{"text": "abc", "image": "a.png"}\n{"text": "de"}\n{"text": "f"}\n')
    output = tmp_path / "out.jsonl"
    command = [
        *("generate", f"--model={model}", f"--prompts={tmp_path}/questions.jsonl", f"--output={output}"),
        *(f"--image_folder={tmp_path}/images", "--batch_size=2", "--seed=1"),
    ]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["question_id"], row["text"]) for row in rows] == [(1, "cba"), (2, "ed"), (3, "f")]
    assert rows[0]["metadata"]["settings"]["seed"] == 1
    assert [(len(prompts), size) for prompts, _, size, _ in loaded[0][-1].asked] == [(2, 2), (1, 2)]
    assert capsys.readouterr().out == f"3 answers are in {output}\n"
    # A complete file costs no loading.
    assert cli.main(command) == 0 and len(loaded) == 1
    assert capsys.readouterr().out == f"all 3 prompts are answered in {output}: nothing to do\n"
    output.write_bytes(output.read_bytes()[:-10])
    assert cli.main(command) == 0 and len(loaded) == 2
    said = capsys.readouterr().err
    assert f"cut off half a line at the end of {output}" in said and "2 of 3 prompts are answered already" in said
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert cli.main([*command, "--seed=2"]) == 2
    assert "seed 1 -> 2" in capsys.readouterr().err and len(loaded) == 2


def test_prompts_that_do_not_fit_are_known_before_the_first_answer(loaded, model, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text(f"short\n{'x' * 80}\n")
    command = [f"--model={model}", f"--prompts={tmp_path}/questions.txt", f"--output={tmp_path}/out.jsonl"]
    assert cli.main(["generate", *command]) == 2
    assert "line 2: " in capsys.readouterr().err
    assert not loaded[0][-1].asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "generate needs --prompt, the question, or --prompts and --output"),
        (["--prompt=a", "--prompts=f.txt"], "--prompt is one question and --prompts a file of them"),
        (["--prompts=f.txt"], "--prompts needs --output"),
        (["--prompt=a", "--output=o.jsonl"], "--output goes with --prompts"),
        (["--prompt=a", "--batch_size=3"], "--batch_size goes with --prompts"),
        (["--prompt=a", "--image_folder=x"], "--image_folder goes with --prompts"),
        (["--prompts=f.txt", "--output=o", "--stream"], "--stream shows one answer, --prompts has many"),
        (["--prompts=f.txt", "--output=o", "--image=a.png"], "--image goes with --prompt;"),
        (["--prompt=a", "--stream", "--num_beams=3"], "beams are ranked when they are whole: with num_beams=3"),
        (["--prompt=a", "--stream", "--num_answers=2", "--temperature=1"], "only one answer can be streamed"),
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens is 0: set it to a whole number, 1 or more"),
        (["--prompt=a", "--top_p=2", "--temperature=1"], "top_p is 2.0"),
        (["--prompt=a", "--mesh=8"], "--mesh=8: '8' is no axis with its number of devices. Write tensor:8, say."),
        (["--prompt=a", "--quantize=int4"], "--quantize=int4: value should be one of <int8|nf4>"),
        (["--prompts=nowhere.txt", "--output=o"], "nowhere.txt: No such file"),
        (["--prompts=a.json", "--output=o"], "a.json is no file of prompts"),
    ],
)
def test_combinations_that_are_refused(arguments, message, loaded, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "--model=m", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert not captured.out and not loaded and not list(tmp_path.iterdir())


def test_chat_refuses_beams_before_it_loads(loaded, capsys):
    assert cli.main(["chat", "--model=m", "--num_beams=2"]) == 2
    assert "beams are ranked when they are whole" in capsys.readouterr().err and not loaded


@pytest.mark.parametrize("text", ["", "tensor", "tensor:", ":8", "tensor:0", "tensor:-1", "tensor:8,", "8:tensor"])
def test_meshes_that_are_none(text):
    with pytest.raises(InputError, match="is no axis with its number of devices"):
        parse_mesh(text)


def test_meshes():
    assert parse_mesh("tensor:8") == {"tensor": 8} and parse_mesh("data:2, tensor:4") == {"data": 2, "tensor": 4}
    with pytest.raises(InputError, match="has axis 'tensor' twice"):
        parse_mesh("tensor:2,tensor:4")
