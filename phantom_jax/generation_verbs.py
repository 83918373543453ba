"""The verbs `generate` and `chat`, and the flags that they share."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from phantom_jax.config import DTYPES
from phantom_jax.errors import InputError
from phantom_jax.layouts import QUANTIZATIONS

# Flags that stand for fields of `Settings`, where the defaults are.
_SETTINGS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "repetition_penalty",
    "stop",
    "num_answers",
)
# How a model is loaded, as far as it changes the answers.
_OPTIONS = ("adapter", "dtype", "template", "quantize", "int8_cache")
_EARLY_STOPPING = {"true": True, "false": False, "never": "never"}


def define_generate(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _define_model(values)
    text = "Image file. Given once for each image, in order."
    flags.DEFINE_multi_string("image", [], text, flag_values=values)
    text = "The question. `<image>` says where an image stands; without it, images come first."
    flags.DEFINE_string("prompt", None, text, flag_values=values)
    flags.DEFINE_boolean("stream", False, "Print the answer while it is generated.", flag_values=values)
    text = "Instead of --prompt: a file of questions, .txt with one a line, or .jsonl with an object a line."
    flags.DEFINE_string("prompts", None, text, flag_values=values)
    text = "With --prompts: the .jsonl file for the answers. What it holds already is not answered again."
    flags.DEFINE_string("output", None, text, flag_values=values)
    text = "With --prompts: what paths of images start from. By default the folder of the file."
    flags.DEFINE_string("image_folder", None, text, flag_values=values)
    text = "With --prompts: questions answered at once. When not given 32."
    flags.DEFINE_integer("batch_size", None, text, flag_values=values, lower_bound=1)
    _define_settings(values)


def generate(values: flags.FlagValues) -> None:
    """Answers one prompt, or a file of them."""
    _check_combination(values)
    if values.prompts is not None:
        _answer_file(values)
        return
    from phantom_jax.generation.settings import Settings

    settings = _settings(values)
    checked = Settings.of(settings)
    if values.stream:
        checked.check_streamable()
        for piece in _load(values).stream(values.prompt, images=values.image, **settings):
            print(_shown(piece), end="", flush=True)
        print()
        return
    answers = _load(values).generate(values.prompt, images=values.image, **settings)
    if isinstance(answers, str):
        print(_shown(answers))
        return
    for number, answer in enumerate(answers, 1):
        print(f"--- answer {number} of {len(answers)} ---\n{_shown(answer)}")


def _shown(text: str) -> str:
    """What goes to a terminal must not steer it; what goes to a file stays as it is."""
    from phantom_jax.generation.terminal import printable

    return printable(text) if sys.stdout.isatty() else text


def define_chat(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _define_model(values)
    _define_settings(values)


def chat(values: flags.FlagValues) -> None:
    """Talks in the terminal."""
    from phantom_jax.generation.settings import Settings
    from phantom_jax.generation.terminal import run

    settings = _settings(values)
    Settings.of(settings).check_streamable()
    run(_load(values), input=sys.stdin, output=sys.stdout, **settings)


def _define_model(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "Model folder, of any layout that `convert` writes.", flag_values=values)
    text = "Folder of a LoRA adapter that is worked into the weights: PEFT's, LLaVA's or ours."
    flags.DEFINE_string("adapter", None, text, flag_values=values)
    text = "Name of the chat template, for published folders. By default the model's own."
    flags.DEFINE_string("template", None, text, flag_values=values)
    text = "Of the computation. By default that of the weights as stored."
    flags.DEFINE_enum("dtype", None, DTYPES, text, flag_values=values)
    text = "Keep the language model's weights in 8 or 4 bits."
    flags.DEFINE_enum("quantize", None, QUANTIZATIONS, text, flag_values=values)
    flags.DEFINE_boolean("int8_cache", False, "Keep keys and values in 8 bits.", flag_values=values)
    text = "Devices to spread the model over: tensor:8, for instance."
    flags.DEFINE_string("mesh", None, text, flag_values=values)


def _define_settings(values: flags.FlagValues) -> None:
    text = "Longest answer, in tokens. When not given 512, or what the context leaves."
    flags.DEFINE_integer("max_new_tokens", None, text, flag_values=values)
    flags.DEFINE_integer("min_new_tokens", None, "Shortest answer, in tokens.", flag_values=values)
    flags.DEFINE_integer("num_beams", None, "Width of a beam search. Without it there is none.", flag_values=values)
    text = "Of a beam search: above 0 favours long answers, below 0 short ones. When not given 1."
    flags.DEFINE_float("length_penalty", None, text, flag_values=values)
    text = "When a beam search ends: `true` with the first num_beams answers, `false` when a better one is unlikely, "
    text += "`never` when there can be none. When not given `false`."
    flags.DEFINE_enum("early_stopping", None, list(_EARLY_STOPPING), text, flag_values=values)
    text = "Above 0 tokens are sampled, 0.7 for instance. When not given 0, the most likely token."
    flags.DEFINE_float("temperature", None, text, flag_values=values)
    flags.DEFINE_integer("top_k", None, "Sample among so many of the most likely tokens.", flag_values=values)
    text = "Sample among the fewest tokens that have this probability together."
    flags.DEFINE_float("top_p", None, text, flag_values=values)
    flags.DEFINE_integer("seed", None, "Of the sampling. When not given 0.", flag_values=values)
    text = "Above 1 tokens that occurred already are less likely. When not given there is none."
    flags.DEFINE_float("repetition_penalty", None, text, flag_values=values)
    text = "The answer ends before this string. May be given several times."
    flags.DEFINE_multi_string("stop", None, text, flag_values=values)
    text = "Answers to each prompt: samples, or the best beams. When not given 1."
    flags.DEFINE_integer("num_answers", None, text, flag_values=values)


def _given(values: flags.FlagValues, names: Sequence[str]) -> dict[str, Any]:
    """The flags that stand on the command line, so that defaults are written down in one place alone."""
    return {name: values[name].value for name in names if values[name].present}


def _settings(values: flags.FlagValues) -> dict[str, Any]:
    settings = _given(values, _SETTINGS)
    if "early_stopping" in settings:
        settings["early_stopping"] = _EARLY_STOPPING[settings["early_stopping"]]
    return settings


def _load(values: flags.FlagValues) -> Any:
    import jax.numpy as jnp

    from phantom_jax.compiled import keep_compiled_programs
    from phantom_jax.pretrained import load

    keep_compiled_programs()
    options = _given(values, (*_OPTIONS, "mesh"))
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    if "mesh" in options:
        options["mesh"] = parse_mesh(options["mesh"])
    handle = load(values.model, **options)
    if handle.processor is None:
        raise InputError(f"the model has no tokenizer: put the tokenizer's files into {values.model}")
    return handle


def _answer_file(values: flags.FlagValues) -> None:
    from phantom_jax.data.stop_strings import check_stops
    from phantom_jax.generation.answer_file import AnswerFile, answer_prompts
    from phantom_jax.generation.prompt_file import check_lengths, read_prompts
    from phantom_jax.generation.settings import Settings
    from phantom_jax.pretrained import BATCH_SIZE

    given = _settings(values)
    settings = Settings.of(given)
    prompts = read_prompts(values.prompts, image_folder=values.image_folder)
    options = {name: values[name].value for name in _OPTIONS}
    with AnswerFile(values.output, prompts, model=values.model, settings=settings, options=options) as answers:
        if answers.done == len(prompts):
            print(f"all {len(prompts):,} prompts are answered in {values.output}: nothing to do")
            return
        if answers.done:
            print(f"{answers.done:,} of {len(prompts):,} prompts are answered already, going on", file=sys.stderr)
        handle = _load(values)
        check_lengths(prompts, handle.processor, settings, path=values.prompts)
        check_stops(settings.stop, handle.processor.tokenizer)
        if answers.cut:
            print(f"cut off half a line at the end of {values.output} ({answers.cut} bytes)", file=sys.stderr)
        answer_prompts(handle, answers, batch_size=values.batch_size or BATCH_SIZE, settings=given)
    print(f"{len(prompts):,} answers are in {values.output}")


def parse_mesh(text: str) -> dict[str, int]:
    """Axes of a mesh: "tensor:8" is {"tensor": 8}.

    Raises:
      InputError: it does not read AXIS:COUNT, or several of these with commas between them.
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, colon, count = part.strip().partition(":")
        if not colon or not axis.isidentifier() or not count.isdecimal() or int(count) < 1:
            raise InputError(f"--mesh={text}: {part!r} is no axis with its number of devices. Write tensor:8, say.")
        if axis in mesh:
            raise InputError(f"--mesh={text} has axis {axis!r} twice. Write each once.")
        mesh[axis] = int(count)
    return mesh


def _check_combination(values: flags.FlagValues) -> None:
    """What can be refused before anything is loaded."""
    if values.prompt is not None and values.prompts is not None:
        raise InputError("--prompt is one question and --prompts a file of them. Leave one of them out.")
    if values.prompt is None and values.prompts is None:
        raise InputError("generate needs --prompt, the question, or --prompts and --output, files.")
    if values.mesh is not None:
        parse_mesh(values.mesh)
    if values.prompts is None:
        for name in ("output", "image_folder", "batch_size"):
            if values[name].present:
                raise InputError(f"--{name} goes with --prompts, a file of questions. Give that, or leave it out.")
        return
    if values.output and os.path.realpath(values.output) == os.path.realpath(values.prompts):
        raise InputError(f"--output is the file of prompts itself, {values.prompts!r}. Set it to another file.")
    if values.output is None:
        raise InputError("--prompts needs --output: the .jsonl file that the answers are written to.")
    if values.stream:
        raise InputError("--stream shows one answer, --prompts has many. Leave one of them out.")
    if values.image:
        raise InputError("--image goes with --prompt; with --prompts the file names the images of each question.")
