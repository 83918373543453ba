import json
import struct
import sys
import types

import pytest

from phantom_jax.errors import InputError
from phantom_jax.training import loop, writers
from tests.training.toy import ToyIterator, make_task, toy_config


class Crashes(ToyIterator):
    """Dies after the ninth step, of which six are in a checkpoint."""

    def __next__(self):
        if (self.phase, self.position) == (1, 2):
            raise RuntimeError("crash")
        return super().__next__()


def run_with_a_crash(workdir, config):
    with pytest.raises(RuntimeError, match="crash"):
        loop.train(config, workdir, task=make_task(iterator=Crashes), say=str)
    loop.train(config, workdir, task=make_task(), say=str)


def logged(workdir):
    """Every number of metrics.jsonl as (name, step, value)."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(name, record["step"], value) for record in records for name, value in writers.numbers(record).items()]


def events(folder):
    """Scalars of all event files in order, without what a later file takes back, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            # Length, its checksum, the message, its checksum.
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = [entry for entry in found if entry[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_each_number_once_after_a_restart(tmp_path):
    run_with_a_crash(tmp_path, toy_config(writers=("tensorboard",)))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found, expected = events(tmp_path / "tensorboard"), logged(tmp_path)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-6)


class FakeWandb(types.ModuleType):
    """Records what it is told; like the original, a run that is resumed stands behind the last step it knows."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = "there"
        self.settings, self.history, self.finished = [], [], 0

    def init(self, **settings):
        self.settings.append(settings)
        self.resumed = len(self.settings) > 1
        self.step = max((step for step, _ in self.history), default=-1) + 1
        return self

    def log(self, values, step):
        assert not self.history or step >= self.history[-1][0]
        self.history.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_takes_a_run_up_again(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_with_a_crash(tmp_path, toy_config(writers=("wandb",)))
    first, second = wandb.settings
    assert first == second and first["resume"] == "allow" and first["name"] == tmp_path.name
    assert first["id"] == (tmp_path / "wandb" / "run_id").read_text() and first["dir"] == str(tmp_path)
    assert first["config"]["phases"][0]["name"] == "first"
    assert wandb.finished == 2
    found = [(name, step) for step, values in wandb.history for name in values]
    # The clock's figures of steps that were done twice may differ in what there is of them.
    assert sorted(found) == sorted(entry[:2] for entry in logged(tmp_path))
    assert [step for step, _ in wandb.history] == sorted(step for step, _ in wandb.history)


def test_who_is_not_let_in_is_told_what_to_do(tmp_path, monkeypatch):
    wandb = FakeWandb()

    def init(**settings):
        raise wandb.Error("No API key.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(InputError, match=r"No API key\. Log in with `wandb login`, set WANDB_MODE=offline"):
        loop.train(toy_config(writers=("wandb",)), tmp_path, task=make_task(), say=str)


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'phantom-jax\[wandb\]'"):
        loop.train(toy_config(writers=("wandb",)), tmp_path / "run", task=make_task(), say=str)
    assert not (tmp_path / "run").exists()
