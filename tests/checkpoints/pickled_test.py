"""What holds of pickled weights without PyTorch: a module called `torch` in the child's path takes its place."""

import json
import os
import pickle

import pytest

from phantom_jax.checkpoints import model_folder, pickled
from phantom_jax.errors import InputError


class Canary:
    """Unpickled by Python's own loader it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def torch_is(code, tmp_path, monkeypatch):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mm_projector.bin"
    path.write_bytes(b"PK\x03\x04 and more")
    return path


MISSING = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
STUBS = {
    "missing": (MISSING, "not installed: pip install 'torch>=2.6'"),
    "broken": ("raise ImportError('libcudart.so.12 is missing')", "cannot be imported: libcudart.so.12 is missing"),
    "part missing": (
        "raise ModuleNotFoundError(\"No module named 'sympy'\", name='sympy')",
        "cannot be imported: No module named 'sympy'",
    ),
    "old": ("__version__ = '2.5.1+cu121'", "PyTorch is 2.5.1.*pip install 'torch>=2.6'"),
    "killed": (
        "import os, signal\n__version__ = '2.6.0'\ndef load(*_, **__): os.kill(os.getpid(), signal.SIGKILL)",
        "ended by SIGKILL: most likely there was too little memory",
    ),
    "crashed": (
        "import os, signal\n__version__ = '2.6.0'\ndef load(*_, **__): os.kill(os.getpid(), signal.SIGSEGV)",
        "ended by SIGSEGV: the file may be damaged",
    ),
    "failed": (
        "import os, sys\n__version__ = '2.6.0'\ndef load(*_, **__): print('no room', file=sys.stderr); os._exit(9)",
        "exit code 9: no room",
    ),
    "memory": ("__version__ = '2.6.0'\ndef load(*_, **__): raise MemoryError", "not enough memory"),
}


@pytest.mark.parametrize(("code", "message"), STUBS.values(), ids=STUBS.keys())
def test_pytorch_that_cannot_do_it(code, message, weights, scratch, tmp_path, monkeypatch):
    torch_is(code, tmp_path, monkeypatch)
    with pytest.raises(InputError, match=message) as raised:
        pickled.to_safetensors([weights], scratch)
    assert str(weights) in str(raised.value) and "\n" not in str(raised.value)
    assert not list(scratch.iterdir())


ATTEMPTS = {
    "a command": "import os; os.system('touch {canary}')",
    "a process": "import subprocess; subprocess.run(['touch', '{canary}'])",
    "another program": "import os; os.execvp('touch', ['touch', '{canary}'])",
    "a file": "open('{canary}', 'w')",
    "a file descriptor": "import os; os.open('{canary}', os.O_CREAT | os.O_WRONLY)",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "removal": "import os; os.remove('{victim}')",
    "renaming": "import os; os.rename('{victim}', '{canary}')",
    "emptying": "import os; os.open('{victim}', os.O_RDONLY | os.O_TRUNC)",
    "truncation": "import os; os.truncate('{victim}', 0)",
    "appending": "import os; os.open('{victim}', os.O_RDONLY | os.O_APPEND)",
    "an empty file": "import os; os.open('{canary}', os.O_RDONLY | os.O_CREAT)",
    "a folder": "import os; os.mkdir('{canary}')",
    "a link": "import os; os.link('{victim}', '{canary}')",
    "a symbolic link": "import os; os.symlink('{victim}', '{canary}')",
    "a mode": "import os; os.chmod('{victim}', 0)",
    "an owner": "import os; os.chown('{victim}', -1, -1)",
    "a time": "import os; os.utime('{victim}', (0, 0))",
    "an attribute": "import os; os.setxattr('{victim}', 'user.a', b'a')",
    "no attribute": "import os; os.removexattr('{victim}', 'user.a')",
    "a copy": "import shutil; shutil.copyfile('{victim}', '{canary}')",
    "a tree": "import shutil; shutil.rmtree('{victim}')",
    "a data base": "import sqlite3; sqlite3.connect('{canary}')",
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_what_gets_past_the_loader_still_reaches_nothing(attempt, weights, scratch, tmp_path, monkeypatch):
    """If a file ever made PyTorch run code, the process it runs in refuses what that code would do."""
    canary, victim = tmp_path / "canary", tmp_path / "victim"
    victim.write_bytes(b"mine")
    before = victim.stat()
    code = attempt.format(canary=canary, victim=victim, port=9)
    torch_is(f"__version__ = '2.6.0'\ndef load(*_, **__):\n    {code}\n    return {{}}\n", tmp_path, monkeypatch)
    with pytest.raises(InputError, match="attempted .* which reading weights does not need"):
        pickled.to_safetensors([weights], scratch)
    assert not os.path.lexists(canary) and not list(scratch.iterdir())
    after = victim.stat()
    assert victim.read_bytes() == b"mine"
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, before.st_nlink)


def test_the_environment_stays_here(weights, scratch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    torch_is(
        "import os, sys\n__version__ = '2.6.0'\n"
        "def load(*_, **__): print(sorted(os.environ), file=sys.stderr); os._exit(9)",
        tmp_path,
        monkeypatch,
    )
    with pytest.raises(InputError, match="PYTHONPATH") as raised:
        pickled.to_safetensors([weights], scratch)
    assert "HF_TOKEN" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "no PyTorch file, it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer: run git lfs pull"),
    ],
)
def test_something_else_under_the_name(content, message, scratch, tmp_path, monkeypatch):
    torch_is("__version__ = '2.6.0'", tmp_path, monkeypatch)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        pickled.to_safetensors([path], scratch)
    assert path.read_bytes() == content


def test_targets_that_are_taken(weights, scratch, tmp_path):
    with pytest.raises(InputError, match="there is no file .*absent.bin"):
        pickled.to_safetensors([tmp_path / "absent.bin"], scratch)
    other = tmp_path / "other" / weights.name
    other.parent.mkdir()
    other.write_bytes(b"x")
    with pytest.raises(InputError, match="which is taken"):
        pickled.to_safetensors([weights, other], scratch)
    (scratch / "mm_projector.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="which is taken"):
        pickled.to_safetensors([weights], scratch)
    assert (scratch / "mm_projector.safetensors").read_bytes() == b"mine"


def test_weight_files(tmp_path):
    assert pickled.weight_files(tmp_path) == []
    (tmp_path / "pytorch_model.bin").touch()
    assert pickled.weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    shards = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    index = {"weight_map": {"a": shards[1], "b": shards[0], "c": shards[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"names the shard '{shards[0]}'"):
        pickled.weight_files(tmp_path)
    for shard in shards:
        (tmp_path / shard).touch()
    assert pickled.weight_files(tmp_path) == [tmp_path / shard for shard in shards]


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]}])
def test_index_without_a_map(index, tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no 'weight_map'"):
        pickled.weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "sub/model.bin", ".."])
def test_index_that_leads_out_of_the_folder(name, tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.bin", folder / "sub" / "model.bin"):
        path.touch()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="names the shard"):
        pickled.weight_files(folder)


def test_without_being_allowed_nothing_is_unpickled(golden, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "config.json").write_bytes((golden / "llava-hf" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Canary(canary)}))
    with pytest.raises(InputError, match="weights are pickled .*convert --allow_pickle"):
        model_folder.read(tmp_path)
    assert not canary.exists()
