"""A handle that answers without a model. As a program it runs a verb's work in a process of its own."""

import signal
import sys
import time

from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.data.tokenizer import train_tokenizer
from phantom_jax.generation.answer_file import AnswerFile, answer_prompts
from phantom_jax.generation.prompt_file import read_prompts
from phantom_jax.generation.settings import Settings
from phantom_jax.generation.terminal import run
from phantom_jax.processor import Processor


def make_processor(*, max_length=64):
    return Processor(
        train_tokenizer(["user\n", "assistant\n"]),
        TEMPLATES["qwen2"],
        tile_size=32,
        max_tiles=6,
        tokens_per_tile=4,
        max_length=max_length,
    )


class Handle:
    """Answers with the question turned around, letter by letter.

    Attributes:
      asked: (question, images, history, settings) of every answer.
    """

    def __init__(self, max_length=64):
        self.processor = make_processor(max_length=max_length)
        self.asked = []

    def stream(self, prompt, *, images=(), history=(), **settings):
        self.processor.encode_prompt(prompt, images, history=history)
        self.asked.append((prompt, list(images), list(history), settings))
        yield from reversed(prompt)

    def generate(self, prompts, *, images, batch_size, **settings):
        assert len(prompts) == len(images) <= batch_size
        self.asked.append((list(prompts), list(images), batch_size, settings))
        answers = ["".join(reversed(prompt)) for prompt in prompts]
        count = settings.get("num_answers", 1)
        return answers if count == 1 else [[f"{answer} {number}" for number in range(count)] for answer in answers]


class Hanging(Handle):
    """Never comes to the end of an answer: not to the first word of "silence", and of a file to one batch."""

    def stream(self, prompt, **rest):
        if prompt == "silence":
            print("thinking", file=sys.stderr)
        else:
            yield from super().stream(prompt, **rest)
        time.sleep(3600)

    def generate(self, prompts, **rest):
        if self.asked:
            time.sleep(3600)
        return super().generate(prompts, **rest)


def main(what, kind, *paths):
    # Tests that run in the background of a script inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handle = {"whole": Handle, "hanging": Hanging}[kind](max_length=512)
    if what == "chat":
        run(handle, input=sys.stdin, output=sys.stdout)
        return
    prompts, output, model = paths
    with AnswerFile(output, read_prompts(prompts), model=model, settings=Settings(), options={}) as answers:
        answer_prompts(handle, answers, batch_size=3, settings={})


if __name__ == "__main__":
    main(*sys.argv[1:])
