"""The command line: verbs, flags, config overrides, and what each mistake says."""

import subprocess
import sys
import types

import pytest

from phantom_jax import cli
from phantom_jax.errors import Diverged, InputError, Preempted

CONFIG = """
from ml_collections import ConfigDict
from phantom_jax.errors import InputError

def get_config(variant=None):
    if variant == "wrong":
        raise InputError("there is no variant 'wrong'. Set objective=sft.")
    if variant == "defect":
        return undefined_name.attribute
    if variant == "attribute":
        return object().attribute
    phase = ConfigDict(dict(steps=3, optimizer=dict(learning_rate=1e-3)))
    return ConfigDict(dict(seed=0, model=dict(name="tiny"), phases=(phase,)))
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the training loop; holds what it was called with."""
    calls = []
    loop = types.ModuleType("phantom_jax.training.loop")
    loop.train = lambda config, workdir: calls.append((config, workdir))
    monkeypatch.setitem(sys.modules, "phantom_jax.training.loop", loop)
    return calls


def test_help_lists_every_verb(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == text
    for verb in ("prepare", "train", "evaluate", "generate", "chat", "convert", "report"):
        assert f"\n  {verb} " in text


@pytest.mark.parametrize("verb", ["prepare", "train", "evaluate", "generate", "chat", "convert", "report"])
def test_verb_help_names_its_flags(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: phantom-jax {verb}")
    assert "  --" in text and "Required." in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cli.__version__


def test_train_gets_the_config_with_its_overrides(config_path, trained):
    arguments = [f"--config={config_path}", "--config.seed=7", "--config.phases[0].optimizer.learning_rate=0.5"]
    assert cli.main(["train", *arguments, "--workdir=somewhere"]) == 0
    [(config, workdir)] = trained
    assert (config.seed, config.phases[0].optimizer.learning_rate, workdir) == (7, 0.5, "somewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "there is no verb 'tarin'. Did you mean train?"),
        (["train", "--workdr=x"], "train has no flag --workdr. Did you mean --workdir?"),
        (["train", "--config={config}"], "train needs --workdir"),
        (["train", "--workdir=x"], "train needs --config"),
        (["train", "--config.seed=1"], "--config.seed is given without --config"),
        (["train", "--config=nowhere.py", "--workdir=x"], "there is no config file 'nowhere.py'"),
        (["train", "--config={config}", "--config.sed=1"], "has no key 'sed' (--config.sed=1). Did you mean 'seed'?"),
        (["train", "--config={config}", "--config.model.nam=a"], "has no key 'nam'"),
        (
            ["train", "--config={config}", "--config.phases[0].optimizer.learning_rat=1"],
            "Did you mean 'learning_rate'?",
        ),
        (["train", "--config={config}", "--config.seed=many"], "config.seed is 'many'; it must be a whole number."),
        (
            ["train", "--config={config}", "--config.phases[1].steps=1"],
            "the config has no phases[1] (--config.phases[1].steps=1): phases are counted from 0.",
        ),
        (
            ["train", "--config={config}", "--config.model.num_layers=1"],
            "has no key 'num_layers' (--config.model.num_layers=1). A field of the model that its config file does not",
        ),
        (["train", "--config={config}:wrong", "--workdir=x"], "there is no variant 'wrong'. Set objective=sft."),
        (["convert", "--source=a", "--target=b", "--to=pickle"], "--to=pickle: value should be one of"),
        (["convert", "a", "b"], "convert takes flags only, got 'a b'"),
        (["evaluate", "--batch_size=0"], "--batch_size=0"),
        (["generate", "--model"], "Missing value for flag --model"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, config_path, trained, capsys):
    assert cli.main([argument.format(config=config_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert not trained


@pytest.mark.parametrize(("variant", "error"), [("defect", NameError), ("attribute", AttributeError)])
def test_a_defect_in_a_config_file_keeps_its_traceback(variant, error, config_path):
    with pytest.raises(error):
        cli.main(["train", f"--config={config_path}:{variant}", "--workdir=x"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("a"), 2), (Diverged("b"), 3), (Preempted("c"), 42), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(values):
        raise error

    verb = cli.Verb("", lambda values, argv: None, fail, ())
    monkeypatch.setitem(cli._VERBS, "fail", verb)
    assert cli.main(["fail"]) == code
    # A run that stopped as it was asked to is no error.
    assert capsys.readouterr().err.startswith("error: ") == (code != 42)


def test_a_crash_is_not_hidden(monkeypatch):
    def fail(values):
        raise ZeroDivisionError

    monkeypatch.setitem(cli._VERBS, "fail", cli.Verb("", lambda values, argv: None, fail, ()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_a_reader_that_leaves_is_no_crash(repository):
    command = [sys.executable, "-m", "phantom_jax", "generate", "--help"]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_the_module_runs_as_a_program(repository):
    command = [sys.executable, "-m", "phantom_jax", "nonsense"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no verb 'nonsense'") and "Traceback" not in done.stderr


def test_training_keeps_what_it_compiles_before_anything_is_compiled(config_path, trained, monkeypatch):
    from phantom_jax import compiled

    monkeypatch.setattr(compiled, "keep_compiled_programs", lambda: trained.append("kept"))
    assert cli.main(["train", f"--config={config_path}", "--workdir=w"]) == 0
    assert trained[0] == "kept" and trained[1][1] == "w"
