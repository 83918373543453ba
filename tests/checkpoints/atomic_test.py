"""A target is complete or not there: full disks, killed and stopped processes, two at once, targets that cannot be."""

import collections
import json
import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phantom_jax import cli
from tests.checkpoints import forks, peft_folder
from tests.checkpoints.refusals import everything, refused

ROWS = 40_000
LAYOUTS = ("ours", "phantom")
DELAYS = {signal.SIGKILL: (0.0, 0.05, 0.2, 0.4), signal.SIGTERM: (0.0, 0.1), signal.SIGINT: (0.0, 0.1)}


def arguments(source, target, layout):
    return ["convert", f"--source={source}", f"--target={target}", f"--to={layout}"]


@pytest.fixture(scope="module")
def source(golden, tmp_path_factory):
    """A Phantom with an embedding of some megabytes, which takes a moment to be written."""
    folder = tmp_path_factory.mktemp("large") / "source"
    folder.mkdir()
    content = json.loads((golden / "phantom-0.5b" / "config.json").read_text())
    rows = content["llm_config"]["vocab_size"]
    content["llm_config"]["vocab_size"] = ROWS
    (folder / "config.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    tensors = load_file(golden / "phantom-0.5b" / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.shape[0] == rows:
            tensors[name] = rng.standard_normal((ROWS, tensor.shape[1]), dtype=np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def outcome(source, tmp_path_factory):
    """What happened to each command, by layout and name: the answer, the folder that it ran in, what lay there then."""
    root, running = tmp_path_factory.mktemp("atomic"), {}
    for layout in LAYOUTS:
        tasks, folders = [], []

        def add(name, layout=layout, tasks=tasks, folders=folders, again=None, **task):
            folder = root / layout / (again or name)
            folder.mkdir(parents=True, exist_ok=True)
            tasks.append({"arguments": arguments(source, folder / "new", layout), **task})
            tasks[-1]["waits"] = str(folder / ".new.partial")
            folders.append((name, folder))

        for number, delays in DELAYS.items():
            for delay in delays:
                add(f"{number.name} {delay}", signal=number, delay=delay)
        add("small disk", limit=1 << 18)
        add("larger disk", limit=6 << 20)
        both = arguments(source, root / layout / "two" / "new", layout)
        add("two", **{"and": {"arguments": both}})
        add("again", again="SIGKILL 0.0")
        running[layout] = (forks.run(tasks), folders)
    found = {}
    for layout, (child, folders) in running.items():
        for (name, folder), answer in zip(folders, forks.answers(child), strict=True):
            found[layout, name] = (answer, folder)
    return found


def check_whole(source, folder, tmp_path):
    """Nothing but the target is there, and it holds what the source does."""
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert not (folder / "new" / ".lock").exists()
    back = folder / "new"
    if (back / "phantom_jax.json").exists():
        assert cli.main(arguments(back, tmp_path / "back", "phantom")) == 0
        back = tmp_path / "back"
    ours, theirs = (load_file(path / "model.safetensors") for path in (back, source))
    assert {name: tensor.tobytes() for name, tensor in ours.items()} == {
        name: tensor.tobytes() for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed(layout, outcome, source, tmp_path):
    """At any moment: what is half done lies under a name that no reader takes for a model."""
    codes = collections.Counter()
    for delay in DELAYS[signal.SIGKILL]:
        answer, folder = outcome[layout, f"SIGKILL {delay}"]
        codes[answer["code"]] += 1
        if delay == 0.0:
            continue  # the one that was started again
        if (folder / "new").exists():
            check_whole(source, folder, tmp_path / str(delay))
        else:
            assert [path.name for path in folder.iterdir()] == [".new.partial"]
    assert codes[-signal.SIGKILL], "the process was killed too late to see anything"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_started_again_after_it_was_killed(layout, outcome, source, tmp_path):
    answer, folder = outcome[layout, "again"]
    assert outcome[layout, "SIGKILL 0.0"][0]["code"] == -signal.SIGKILL
    assert answer["code"] == 0 and answer["error"] == ""
    check_whole(source, folder, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped(layout, number, outcome):
    stopped = 0
    for delay in DELAYS[number]:
        answer, folder = outcome[layout, f"{number.name} {delay}"]
        # Python may be where an interrupt cannot be raised, and goes on.
        if answer["code"] == 0:
            assert [path.name for path in folder.iterdir()] == ["new"]
            continue
        stopped += 1
        assert answer["code"] == 128 + number, answer
        assert answer["error"] == ("error: interrupted\n" if number == signal.SIGINT else "")
        assert not list(folder.iterdir())
    assert stopped


@pytest.mark.parametrize("name", ["small disk", "larger disk"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_becomes_full(layout, name, outcome):
    answer, folder = outcome[layout, name]
    assert answer["code"] == 2 and answer["output"] == ""
    assert answer["error"] == (
        f"error: the disk of '{folder / 'new'}' became full: nothing was left there, make room or choose another disk\n"
    )
    assert not list(folder.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_at_once(layout, outcome, source, tmp_path):
    answer, folder = outcome[layout, "two"]
    assert sorted([answer["code"], answer["and"]["code"]]) == [0, 2]
    (refusal,) = [one["error"] for one in (answer, answer["and"]) if one["code"]]
    assert "another process is writing" in refusal or "exists and is not an empty folder" in refusal
    check_whole(source, folder, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_is_seen_to_be_full(layout, source, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    command = arguments(source, tmp_path / "a" / "b" / "new", layout)
    refused(capsys, tmp_path, command, f"'{tmp_path}/a/b/new' needs 0.0 GB and its disk has 0.0 GB left", "make room")


# ---- targets


@pytest.fixture
def small(golden):
    return golden / "phantom-0.5b"


def test_targets_that_cannot_be(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "full" / "sub").mkdir(parents=True)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    shutil.copytree(small, tmp_path / "source", ignore=shutil.ignore_patterns("g*"))
    for name in ("full", "file", "full/", "source", "source/../full", "link", "lost"):
        refused(
            capsys, tmp_path, arguments(tmp_path / "source", f"{tmp_path}/{name}", "ours"), name, "nothing was written"
        )
    for name in ("file/new", "file/a/b/new", "x" * 300, "x" * 250):
        refused(capsys, tmp_path, arguments(tmp_path / "source", tmp_path / name, "ours"), "Give another path")
    monkeypatch.chdir(tmp_path / "empty")
    refused(capsys, tmp_path, arguments(tmp_path / "source", ".", "ours"), "is the folder that you are in")
    # Not even the user that tests run as, who may be root, can write here.
    said = refused(capsys, tmp_path, arguments(tmp_path / "source", "/proc/self/new", "ours"), "/proc/self")
    assert "Give another path" in said
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("disk"))
    (tmp_path / "disk").mkdir()
    refused(capsys, tmp_path, arguments(tmp_path / "source", tmp_path / "disk", "ours"), "disk' is a mount point")


@pytest.mark.parametrize("name", ["new", "new/", "./a/../b/new", "with space", "naïve 模型", "-x", "source/inside"])
def test_targets_of_all_kinds(name, small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "source", ignore=shutil.ignore_patterns("g*"))
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path / "source")
    assert cli.main(arguments("source", name, "phantom")) == 0
    assert (tmp_path / os.path.normpath(name) / "model.safetensors").is_file()
    after = everything(tmp_path / "source")
    assert {path: content for path, content in after.items() if not path.startswith("inside")} == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "source",
        *([] if "inside" in name else [os.path.normpath(name).split("/")[0]]),
    }


def test_an_empty_folder_is_taken(small, tmp_path):
    (tmp_path / "new").mkdir()
    assert cli.main(arguments(small, tmp_path / "new", "phantom")) == 0
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_a_target_that_fills_meanwhile_is_left_alone(small, tmp_path, capsys, monkeypatch):
    from phantom_jax.checkpoints import hf

    save = hf.save

    def meanwhile(*arguments):
        save(*arguments)
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mine").write_text("precious")

    monkeypatch.setattr(hf, "save", meanwhile)
    assert cli.main(arguments(small, tmp_path / "new", "phantom")) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert everything(tmp_path).keys() == {"new", "new/mine"}


def test_merge_leaves_nothing_either(small, tmp_path, capsys):
    peft_folder.write(tmp_path / "adapter", peft_folder.factors(small))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    command = ["merge", f"--model={small}", f"--adapter={tmp_path / 'adapter'}", f"--target={tmp_path / 'a' / 'new'}"]
    refused(capsys, tmp_path, command, "adapter_model.safetensors", "no readable safetensors file")
    refused(capsys, tmp_path, [*command, "--allow_pickle"], "no readable safetensors file")
