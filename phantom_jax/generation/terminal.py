"""The conversation in a terminal, or through a pipe."""

import builtins
import contextlib
import difflib
import os
import re
import shlex
import sys
from typing import Any, TextIO

from phantom_jax.errors import InputError
from phantom_jax.generation.chat import Conversation

_COMMANDS = {
    "/image": "/image PATH    attach an image to the next question; several paths, or several times, for more",
    "/reset": "/reset         forget the conversation and the attached images",
    "/help": "/help          this list",
    "/exit": "/exit          leave; so does Ctrl-D",
}
_HELP = "\n".join(
    [
        *_COMMANDS.values(),
        "Ctrl-C stops an answer. Write <image> where an attached image belongs; without it, images come first.",
    ]
)
_LEAVE = "/exit or Ctrl-D leaves, /help lists the commands"


def run(handle: Any, *, input: TextIO, output: TextIO, **settings: Any) -> None:
    """Talks until the input ends or says /exit.

    In a terminal there is a prompt, with line editing where Python has readline, and Ctrl-C stops an answer; otherwise
    nothing but answers and notices is written. A mistake is one line, and the conversation goes on.

    Args:
      handle: what `phantom_jax.load` gives.
      input: where questions and commands come from, one a line.
      output: where answers go.
      settings: fields of `phantom_jax.generation.settings.Settings`.

    Raises:
      InputError: a setting is wrong, or answers with it cannot be streamed.
    """
    _Terminal(handle, input, output, settings).run()


class _Terminal:
    def __init__(self, handle: Any, input: TextIO, output: TextIO, settings: dict[str, Any]):
        self._input, self._output = input, output
        # Only these two have line editing, and only there does Ctrl-C mean the answer alone.
        self._interactive = input is sys.stdin and output is sys.stdout and input.isatty() and output.isatty()
        self._chat = Conversation(handle, notify=lambda notice: self._say(f"({notice})"), **settings)

    def run(self) -> None:
        if hasattr(self._input, "reconfigure"):
            self._input.reconfigure(errors="replace")
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (what `input` edits lines with)
            self._say(_LEAVE)
        while True:
            try:
                line = self._read()
                if re.match(r"/exit(\s|$)", line):
                    return
                self._turn(line)
            except EOFError:
                if self._interactive:
                    self._say("")
                return
            except InputError as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._say(f"\n({_LEAVE})")

    def _read(self) -> str:
        if self._interactive:
            return builtins.input("you> ")
        line = self._input.readline()
        if not line:
            raise EOFError
        return line

    def _turn(self, line: str) -> None:
        command = re.match(r"(/\w+)(?:\s|$)", line)
        if command:
            self._command(command[1], line[command.end() :].strip())
        elif line.strip():
            self._answer(line.strip())

    def _command(self, name: str, rest: str) -> None:
        if name == "/image":
            self._attach(rest)
        elif name == "/reset":
            self._chat.reset()
            self._say("(the conversation starts anew)")
        elif name == "/help":
            self._say(_HELP)
        else:
            nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "/help lists them."
            raise InputError(f"there is no command {name}: {hint} A question may begin with a space before the slash.")

    def _attach(self, rest: str) -> None:
        paths = [rest] if os.path.isfile(os.path.expanduser(rest)) else _words(rest)
        if not paths:
            raise InputError("/image needs a path: /image photo.png")
        for path in paths:
            image = self._chat.attach(os.path.expanduser(path))
            width, height = image.size
            self._say(f"({image.name}, {width} x {height} pixels, goes with the next question)")

    def _answer(self, text: str) -> None:
        turns = self._chat.turns
        try:
            with contextlib.closing(self._chat.ask(text)) as pieces:
                for piece in pieces:
                    self._output.write(printable(piece))
                    self._output.flush()
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            unanswered = self._chat.turns is turns
            self._say("\n(stopped: nothing was said, the question does not count)" if unanswered else "\n(stopped)")
        else:
            self._say("")

    def _say(self, line: str) -> None:
        print(printable(line), file=self._output, flush=True)


def _words(rest: str) -> list[str]:
    """Paths as a shell reads them: quotes and backslashes are what a terminal writes for a file dropped on it."""
    try:
        return shlex.split(rest)
    except ValueError:
        return [rest]


def printable(text: str) -> str:
    """What a model says must not steer the terminal: control characters become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
