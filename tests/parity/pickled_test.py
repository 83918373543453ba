"""Pickled weights as PyTorch writes them."""

import argparse
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from phantom_jax import cli
from phantom_jax.checkpoints import pickled
from phantom_jax.errors import InputError
from tests.checkpoints import peft_folder, refusals

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def refused(content, scratch, match, **options):
    """Saves it, and checks that it is refused and leaves nothing behind."""
    path = scratch.parent / "model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, **options)
    with pytest.raises(InputError, match=match) as raised:
        pickled.to_safetensors([path], scratch)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not list(scratch.iterdir())


def same_bytes(left, right):
    assert left.dtype == right.dtype and left.shape == right.shape
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    assert torch.equal(*flat)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_byte_stays(zipped, scratch, tmp_path):
    torch.manual_seed(0)
    tensors = {f"a.{name}": (torch.randn(3, 5) * 50).to(getattr(torch, name)) for name in DTYPES}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).t(),
        "every other": torch.randn(10)[1::2],
        "one wide": torch.ones(1).expand(7),
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
        "weights": torch.nn.Parameter(torch.randn(2, 3)),
        "modèle.ß": torch.zeros(2),
    }
    tensors["tied"] = tensors["weights"]
    torch.save(tensors, tmp_path / "pytorch_model-00001-of-00002.bin", _use_new_zipfile_serialization=zipped)
    linear = torch.nn.Linear(3, 2).state_dict()
    torch.save(linear, tmp_path / "mm_projector.bin", _use_new_zipfile_serialization=zipped)
    files = [tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "mm_projector.bin"]
    written = pickled.to_safetensors(files, scratch)
    assert [path.name for path in written] == ["pytorch_model-00001-of-00002.safetensors", "mm_projector.safetensors"]
    for path, expected in zip(written, (tensors, linear), strict=True):
        found = load_file(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            same_bytes(found[name], tensor)


class Canary:
    """Unpickled by Python's own loader it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(form, scratch, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    content = {"weight": torch.zeros(3), "more": Canary(canary)}
    # The user's environment does not open it either.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if form == "pickle":
        content = pickle.dumps(content, protocol=2)
        refused(content, scratch, "cannot read it|GLOBAL")
    else:
        refused(
            content,
            scratch,
            "GLOBAL posix.system.*nothing of the file was run",
            _use_new_zipfile_serialization=form == "zip",
        )
    assert not canary.exists()
    # The canary sings where it is let.
    pickle.loads(pickle.dumps(Canary(canary)))  # noqa: S301
    assert canary.exists()


CONTENTS = {
    "arguments": (lambda: {"w": torch.zeros(2), "args": argparse.Namespace(a=1)}, "GLOBAL argparse.Namespace"),
    "list": (lambda: [torch.zeros(2)], "holds list, not a dictionary"),
    "tensor": (lambda: torch.zeros(2), "holds Tensor, not a dictionary"),
    "nothing": (dict, "holds no tensor"),
    "step": (lambda: {"w": torch.zeros(2), "step": 3}, "entry 'step' is int, not a tensor"),
    "state_dict": (lambda: {"state_dict": {"w": torch.zeros(2)}}, "one level down, under 'state_dict'"),
    "module": (lambda: {"module": {"w": torch.zeros(2)}, "step": 3}, "one level down, under 'module'"),
    "number": (lambda: {0: torch.zeros(2)}, "entry 0 is no name"),
    "reserved": (lambda: {"__metadata__": torch.zeros(2)}, "'__metadata__' is no name"),
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, "'w' is torch.sparse_coo on cpu"),
    "meta": (lambda: {"w": torch.zeros(3, device="meta")}, "'w' is torch.strided on meta"),
    "complex": (lambda: {"w": torch.zeros(3, dtype=torch.complex64)}, "'w' is complex64: use one of float64"),
    "more than the disk": (lambda: {"w": torch.zeros(1).expand(10**15)}, "take 4,000,000,000,000,000 bytes"),
}


@pytest.mark.parametrize(("content", "match"), CONTENTS.values(), ids=CONTENTS.keys())
def test_other_contents(content, match, scratch):
    refused(content(), scratch, match)


@pytest.mark.parametrize("zipped", [True, False])
def test_half_a_file(zipped, scratch, tmp_path):
    torch.save({"w": torch.zeros(3000)}, tmp_path / "whole.bin", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.bin").read_bytes()
    refused(whole[: len(whole) // 2], scratch, "may be damaged .*: download it again")
    refused(whole[:60], scratch, "may be damaged .*: download it again")


def test_one_bad_file_takes_the_others_with_it(scratch, tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "good.bin")
    torch.save({"w": 3}, tmp_path / "bad.bin")
    (scratch / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="bad.bin: its entry 'w'"):
        pickled.to_safetensors([tmp_path / "good.bin", tmp_path / "bad.bin"], scratch)
    assert [path.name for path in scratch.iterdir()] == ["mine.txt"]


def peak_memory(path, target):
    """Highest bytes of the reading process's own memory, mapped pages of files aside, as the kernel says."""
    reader = pathlib.Path(pickled.__file__).with_name("pickled_reader.py")
    peak = 0
    with subprocess.Popen([sys.executable, str(reader), str(target), str(path)], stdout=subprocess.PIPE) as child:
        while child.poll() is None:
            status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.002)
    assert child.returncode == 0
    return peak * 1024


def test_about_one_tensor_is_held(tmp_path):
    side, count = 4096, 6
    # Turned, each has to be copied to be written.
    torch.save({f"w.{index}": torch.zeros(side, side).t() for index in range(count)}, tmp_path / "large.bin")
    torch.save({"w": torch.zeros(2)}, tmp_path / "small.bin")
    one = side * side * 4
    assert (tmp_path / "large.bin").stat().st_size > count * one
    assert peak_memory(tmp_path / "large.bin", tmp_path) - peak_memory(tmp_path / "small.bin", tmp_path) < 1.5 * one


@pytest.fixture
def model(golden, tmp_path):
    """A published Phantom, its weights pickled."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(golden / "phantom-0.5b" / "config.json", folder / "config.json")
    torch.save(load_file(golden / "phantom-0.5b" / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_convert_reads_what_it_is_allowed_to(model, golden, tmp_path):
    command = ["convert", f"--source={model}", f"--target={tmp_path / 'new'}", "--to=phantom", "--allow_pickle"]
    assert cli.main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "new"}
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "new", golden / "phantom-0.5b"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        same_bytes(ours[name], tensor)


def test_convert_runs_no_code_of_a_file(model, tmp_path, capsys):
    canary, path = tmp_path / "canary", model / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "more": Canary(canary)}, path)
    command = ["convert", f"--source={model}", f"--target={tmp_path / 'new'}", "--to=phantom"]
    for allowed, text in (([], "--allow_pickle"), (["--allow_pickle"], "GLOBAL posix.system")):
        refusals.refused(capsys, tmp_path, [*command, *allowed], model, text)
    assert not canary.exists()


def test_merge_runs_no_code_of_an_adapter(golden, tmp_path, capsys):
    base, canary = golden / "phantom-0.5b", tmp_path / "canary"
    adapter = peft_folder.write(tmp_path / "adapter", peft_folder.factors(base))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": torch.zeros(3), "more": Canary(canary)}, adapter / "adapter_model.bin")
    command = ["merge", f"--model={base}", f"--adapter={adapter}", f"--target={tmp_path / 'new'}"]
    for allowed, text in (([], "--allow_pickle"), (["--allow_pickle"], "GLOBAL posix.system")):
        refusals.refused(capsys, tmp_path, [*command, *allowed], adapter, text)
    assert not canary.exists()
