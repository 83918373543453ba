"""The verbs: `phantom-jax VERB --flag=value`.

Each verb reads its flags and calls one library function, imported only then: asking for help loads none of jax, flax,
transformers, orbax or grain. Exit codes: 0 done, 1 crash, 2 bad config or input, 3 diverged, 42 preempted and saved.
"""

import contextlib
import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from phantom_jax import checkpoint_verbs, generation_verbs
from phantom_jax.errors import Diverged, InputError, Mismatch, Preempted
from phantom_jax.version import __version__

PROGRAM = "phantom-jax"
# What the system says where a path is the user's mistake, and not ours.
_WRONG_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, the flags it takes and needs, and the function that does it."""

    summary: str
    define: Callable[[flags.FlagValues, Sequence[str]], None]
    run: Callable[[flags.FlagValues], None]
    required: tuple[str, ...]


def _define_prepare(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("source", "handwritten_numbers", "Name of the data set.", flag_values=values)
    flags.DEFINE_string("target", None, "Folder for the records and the tokenizer.", flag_values=values)


def _prepare(values: flags.FlagValues) -> None:
    import tensorflow_datasets

    from phantom_jax.data.sources import prepare

    # Dozens of lines for some seconds of work, and news of a download that there is not.
    tensorflow_datasets.disable_progress_bar()
    with contextlib.redirect_stdout(None):
        folder = prepare(values.source, values.target)
    print(f"records and tokenizer are in {folder}")


def _define_train(values: flags.FlagValues, argv: Sequence[str]) -> None:
    text = "configs/NAME.py, or configs/NAME.py:variant=value. Single values: --config.a.b=c, given after it."
    config_flags.DEFINE_config_file("config", help_string=text, flag_values=values, sys_argv=list(argv))
    text = "Folder of the run: metrics, checkpoints, model. A restart goes on from there."
    flags.DEFINE_string("workdir", None, text, flag_values=values)


def _train(values: flags.FlagValues) -> None:
    from phantom_jax.compiled import keep_compiled_programs
    from phantom_jax.training.loop import train

    keep_compiled_programs()
    train(values.config, values.workdir)


def _define_evaluate(values: flags.FlagValues, argv: Sequence[str]) -> None:
    text = "Model folder, or NAME=FOLDER. Given several times, the table has a column for each."
    flags.DEFINE_multi_string("model", None, text, flag_values=values)
    flags.DEFINE_string("source", "handwritten_numbers", "Name of the data set.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", flag_values=values)
    flags.DEFINE_string("split", "test", "Split of the data set.", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "Questions answered at once.", flag_values=values, lower_bound=1)
    text = "Ask only this many questions, spread evenly over the split. All when not given."
    flags.DEFINE_integer("limit", None, text, flag_values=values, lower_bound=1)
    text = "Folder for results.json, and for some images with their answers."
    flags.DEFINE_string("output", None, text, flag_values=values)


def _evaluate(values: flags.FlagValues) -> None:
    from phantom_jax.compiled import keep_compiled_programs
    from phantom_jax.evaluation.exact_match import evaluate, table

    keep_compiled_programs()
    results = evaluate(
        values.model,
        source=values.source,
        data_dir=values.data_dir,
        split=values.split,
        batch_size=values.batch_size,
        limit=values.limit,
        output=values.output,
    )
    print(table(results))


def _define_report(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("workdir", None, "Folder of a run; its metrics.jsonl gives the curves.", flag_values=values)
    text = "Folder that `evaluate --output` wrote; its images are shown."
    flags.DEFINE_string("evaluation", None, text, flag_values=values)
    flags.DEFINE_string("output", None, "Picture to write: .png, .svg or .pdf.", flag_values=values)


def _report(values: flags.FlagValues) -> None:
    from phantom_jax.report import report

    print(report(values.workdir, values.output, evaluation=values.evaluation))


_VERBS = {
    "prepare": Verb("write a data set's records, train its tokenizer", _define_prepare, _prepare, ("target",)),
    "train": Verb("run all phases of a config", _define_train, _train, ("config", "workdir")),
    "evaluate": Verb("exact match of answers over a split", _define_evaluate, _evaluate, ("model", "data_dir")),
    "generate": Verb(
        "answer a prompt about images, or a file of prompts",
        generation_verbs.define_generate,
        generation_verbs.generate,
        ("model",),
    ),
    "chat": Verb("talk about images, in the terminal", generation_verbs.define_chat, generation_verbs.chat, ("model",)),
    "convert": Verb(
        "rewrite a model or an adapter in another layout, or put a model together",
        checkpoint_verbs.define_convert,
        checkpoint_verbs.convert,
        ("target", "to"),
    ),
    "merge": Verb(
        "work an adapter into its model",
        checkpoint_verbs.define_merge,
        checkpoint_verbs.merge,
        ("model", "adapter", "target"),
    ),
    "report": Verb("draw loss curves and answered images", _define_report, _report, ("workdir", "output")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: arguments after the program's name; those of the process when None.

    Returns:
      The exit code.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader left, `| head` for instance: what is still held back has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except (InputError, Mismatch, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _WRONG_PATH or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Give another path.", file=sys.stderr)
        return InputError.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(_usage())
    elif name == "--version":
        print(__version__)
    elif name not in _VERBS:
        raise InputError(f"there is no verb {name!r}.{_nearest(name, _VERBS)} `{PROGRAM} --help` lists them all.")
    elif "--help" in rest or "-h" in rest:
        print(_verb_usage(name))
    else:
        _VERBS[name].run(_parse(name, rest))
    return 0


def _usage() -> str:
    width = max(map(len, _VERBS))
    lines = [f"usage: {PROGRAM} VERB [--flag=value ...]", "", "verbs:"]
    lines += [f"  {name:<{width}}  {verb.summary}" for name, verb in _VERBS.items()]
    lines += ["", f"`{PROGRAM} VERB --help` lists the flags of a verb."]
    return "\n".join(lines)


def _verb_usage(name: str) -> str:
    verb = _VERBS[name]
    values = flags.FlagValues()
    verb.define(values, [])
    lines = [f"usage: {PROGRAM} {name} [--flag=value ...]", "", verb.summary, "", "flags:"]
    for flag_name in values:
        flag = values[flag_name]
        default = "" if flag.default in (None, [], False) else f" Default: {flag.default}."
        note = " Required." if flag_name in verb.required else default
        lines.append(f"  --{flag_name}\n      {flag.help}{note}")
    return "\n".join(lines)


def _parse(name: str, rest: list[str]) -> flags.FlagValues:
    verb = _VERBS[name]
    for argument in rest:
        config = re.match(r"--?config=([^:]*)", argument)
        if config and not config[1].endswith(".py"):
            raise InputError(
                f"--config is {config[1]!r}, which is no Python file. Set it to one: configs/quickstart.py, say."
            )
    values = flags.FlagValues()
    command = [f"{PROGRAM} {name}", *rest]
    verb.define(values, command)
    values.set_gnu_getopt(True)  # flags after a stray word are still read as flags
    try:
        positional = values(command)[1:]
    except flags.UnrecognizedFlagError as error:
        flag = error.flagname
        if flag.startswith("config."):
            raise InputError(f"--{flag} is given without --config. Set --config=configs/NAME.py first.") from error
        nearest = _nearest(flag, values, "--")
        raise InputError(f"{name} has no flag --{flag}.{nearest} `{PROGRAM} {name} --help` lists them.") from error
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _explained(error, name, rest) from error
    if positional:
        raise InputError(f"{name} takes flags only, got {' '.join(positional)!r}. Write --flag=value.")
    if "config" in values and values["config"].present:
        path = values["config"].config_filename.split(":")[0]
        if not Path(path).is_file():
            raise InputError(f"there is no config file {path!r}. Set --config to one: configs/quickstart.py, say.")
    for flag in verb.required:
        if not values[flag].present:
            raise InputError(f"{name} needs --{flag}: {values[flag].help}")
    return values


def _explained(error: Exception, name: str, rest: list[str]) -> Exception:
    """What to show for an error that came up while flags and the config were read.

    A wrong value is the user's mistake (`InputError`); a mistake in the code of a config file keeps its traceback.
    """
    link: BaseException | None = error
    said = None
    while link is not None:
        if isinstance(link, InputError):
            said = link  # the innermost: flag parsers wrap what a config file raised in text of their own
        link = link.__cause__ or link.__context__
    if said is not None:
        return InputError(str(said))
    cause = error
    while cause.args and isinstance(cause.args[0], Exception):
        cause = cause.args[0]
    text = str(cause.args[0] if cause.args else cause).strip()
    missing_key = re.fullmatch(r"'(\w+)'(?:\nDid you mean \"(\w+)\".*)?", text)
    if missing_key:
        key, nearest = missing_key.groups()
        flag = next((argument for argument in rest if re.match(rf"--?config\..*\b{key}\b", argument)), "")
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        if not hint and flag.lstrip("-").startswith("config.model."):
            hint = f" A field of the model that its config file does not name is set there: config.model.{key} = ..."
        return InputError(f"the config has no key {key!r} ({flag}).{hint}")
    if isinstance(cause, IndexError):
        for argument in rest:
            past_the_end = re.match(r"--?config\.(.*?)\[(\d+)\]", argument)
            if past_the_end:
                key, index = past_the_end.groups()
                return InputError(f"the config has no {key}[{index}] ({argument}): {key} are counted from 0.")
    number = re.fullmatch(r"flag --(config\.\S+)=(.*?): (invalid literal for int|could not convert string).*", text)
    if number:
        kind = "a whole number" if "int" in number[3] else "a number"
        return InputError(f"{number[1]} is {number[2]!r}; it must be {kind}.")
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, flags.Error) and "ml_collections" not in frames[-1].filename:
        return error
    return InputError(f"{name}: {text}")


def _nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
