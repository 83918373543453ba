"""The terminal: commands, mistakes, pipes, and a real terminal with its keys."""

import io
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from PIL import Image

from phantom_jax.errors import InputError
from phantom_jax.generation import terminal
from tests.generation.fake import Handle


def _talk(text, handle=None, **settings):
    output = io.StringIO()
    terminal.run(handle or Handle(max_length=512), input=io.StringIO(text), output=output, **settings)
    return output.getvalue()


def test_through_a_pipe_there_are_answers_alone():
    assert _talk("abc\n\nde\n") == "cba\ned\n"
    assert _talk("abc\n/exit\nde\n") == "cba\n"
    assert _talk("abc") == "cba\n"


def test_commands(tmp_path):
    handle = Handle(max_length=512)
    for name in ("one.png", "the other.png", "third.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    text = _talk(
        f"/image {tmp_path}/one.png\n/image {tmp_path}/the other.png\nab\n"
        f"/image '{tmp_path}/the other.png' {tmp_path}/third.png\nc\n/reset\n/help\nd\n",
        handle,
    )
    assert text.count("40 x 30 pixels, goes with the next question") == 4
    assert "(the conversation starts anew)" in text and "/image PATH" in text
    assert [(question.removeprefix("<image><image>"), len(images)) for question, images, _, _ in handle.asked] == [
        ("ab", 2),
        ("c", 4),
        ("d", 0),
    ]
    assert handle.asked[-1][2] == []


def test_a_mistake_is_one_line_and_the_chat_goes_on(tmp_path):
    text = _talk(f"/imgae x\n/image\n/image {tmp_path}/nothing.png\n/image ~nobody/x.png\n/foo\n<image>?\nab\n")
    *errors, answer = text.splitlines()
    assert answer == "ba" and len(errors) == 6 and all(line.startswith("error: ") for line in errors)
    assert "there is no command /imgae: did you mean /image?" in errors[0]
    assert "/image needs a path" in errors[1]
    assert "there is no image file" in errors[2] and "there is no image file" in errors[3]
    assert "no command /foo: /help lists them." in errors[4]
    assert "1 <image> marks" in errors[5]


def test_a_path_is_a_question_and_a_space_hides_a_command():
    assert _talk("/usr/bin?\n /reset\n") == "?nib/rsu/\nteser/\n"


def test_forgotten_turns_are_said():
    text = _talk("".join(f"{number}\n" for number in range(8)), Handle())
    assert "(the context of 64 tokens is full: the oldest turn was forgotten)\n" in text


def test_a_model_cannot_steer_the_terminal():
    assert _talk("a\x1b[2J\x9bb\tc\n") == "c\tb\N{REPLACEMENT CHARACTER}J2[\N{REPLACEMENT CHARACTER}a\n"


def test_beams_are_refused_at_once():
    with pytest.raises(InputError, match="beams are ranked when they are whole"):
        _talk("a\n", num_beams=2)


def test_input_that_is_not_utf8(repository):
    command = [sys.executable, "-m", "tests.generation.fake", "chat", "whole"]
    done = subprocess.run(command, input=b"a\xffb\n/exit\n", cwd=repository, capture_output=True, check=True)
    assert done.stdout.decode() == "b\N{REPLACEMENT CHARACTER}a\n" and not done.stderr


class _Typist:
    """Types into a program that runs in a terminal, and waits for what it shows."""

    def __init__(self, command, cwd):
        self._screen, side = pty.openpty()
        env = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True
        )
        os.close(side)
        self.shown = ""

    def wait_for(self, text):
        """What is shown up to this text, which must come."""
        for _ in range(60):
            if self._shows(text, seconds=2):
                before, self.shown = self.shown.split(text, 1)
                return before
        raise AssertionError(f"{text!r} does not come after {self.shown!r}")

    def interrupt(self, text):
        """Ctrl-C, until this text is shown: the first may come before the program listens."""
        for _ in range(60):
            os.kill(self.process.pid, signal.SIGINT)
            if self._shows(text, seconds=2):
                return self.wait_for(text)
        raise AssertionError(f"{text!r} does not come after {self.shown!r}")

    def _shows(self, text, seconds):
        while text not in self.shown and select.select([self._screen], [], [], seconds)[0]:
            self.shown += os.read(self._screen, 4096).decode()
        return text in self.shown

    def type(self, text):
        os.write(self._screen, text.encode())


def _start(repository, kind):
    typist = _Typist([sys.executable, "-m", "tests.generation.fake", "chat", kind], repository)
    typist.wait_for("you> ")
    return typist


def test_a_terminal(repository):
    typist = _start(repository, "whole")
    typist.interrupt("/exit or Ctrl-D leaves")
    typist.wait_for("you> ")
    typist.type("abc\n")
    assert "cba" in typist.wait_for("you> ")
    typist.type("/reset\n")
    assert "starts anew" in typist.wait_for("you> ")
    typist.type("\x04")
    assert typist.process.wait(timeout=120) == 0


def test_an_answer_is_stopped_in_a_terminal(repository):
    typist = _start(repository, "hanging")
    typist.type("silence\n")
    typist.wait_for("thinking")
    typist.interrupt("(stopped: nothing was said, the question does not count)")
    typist.wait_for("you> ")
    typist.type("abc\n")
    typist.wait_for("cba")
    typist.interrupt("(stopped)")
    typist.wait_for("you> ")
    typist.type("/exit\n")
    assert typist.process.wait(timeout=120) == 0
