import json

import jax
import numpy as np
import pytest

from phantom_jax import accounting
from phantom_jax.batch import IGNORE
from phantom_jax.training import metrics
from tests.models import small


def test_counts_leave_padding_out():
    batch = {
        # Row 0: two conversations with an image and one without. Row 1: one with two images. Row 2: padding.
        "segment_ids": np.array([[1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 0, 0], [0] * 6]),
        "image_slots": np.array([[0, 1, 2, -1, -1, -1], [0, 1, 2, -1, -1, -1], [-1] * 6]),
    }
    assert metrics.count_tokens(batch) == 9
    assert metrics.count_images(batch) == 3
    assert type(metrics.count_images(batch)) is int


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (7, "7s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (200_000, "2d07h")]
)
def test_durations(seconds, text):
    assert metrics.duration(seconds) == text


@pytest.mark.parametrize("value, text", [(3.25, "3.2"), (80, "80"), (950, "950"), (5120, "5.1k"), (2.5e6, "2.5M")])
def test_thousands(value, text):
    assert metrics.thousands(value) == text


def test_step_line():
    values = {"loss": 1.23412, "grad_norm": 0.8, "learning_rate": 1.5e-3, "skipped": 0.0}
    rates = {"tokens_per_second": 5100.0, "images_per_second": 80.0, "data_wait": 0.01}
    record = {f"train/{name}": value for name, value in (values | rates).items()}
    line = metrics.step_line(step=120, steps=770, phase="pretrain", metrics=record, eta=192)
    assert line == ("step 120/770 pretrain loss 1.234 gnorm 0.8 lr 1.5e-03 | 5.1k tok/s 80 img/s data 1% | eta 3m12s")
    chip = {"train/mfu": 0.414, "train/device_memory_bytes": 61.2 * 2**30}
    line = metrics.step_line(step=120, steps=770, phase="pretrain", metrics=record | chip, eta=192)
    assert line.endswith(" | 5.1k tok/s 80 img/s data 1% | mfu 41% mem 61.2 GiB | eta 3m12s")
    record = {f"train/{name}": value for name, value in values.items()} | {"train/rewards/accuracies": 0.75}
    line = metrics.step_line(step=1, steps=2, phase="a", metrics=record | {"train/skipped": 3.0}, eta=None)
    assert line == "step 1/2 a loss 1.234 gnorm 0.8 lr 1.5e-03 preferred 75% skipped 3"


def test_meter_leaves_paused_steps_out(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 10.0, 10.5, 12.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    meter = metrics.Meter()
    meter.step_begins()
    meter.data_arrived()
    meter.pause()
    meter.step_ends(100, 10, None)
    assert meter.read() == {} and meter.remaining_seconds(5) is None
    next(clock)
    meter.step_begins()
    meter.data_arrived()
    meter.step_ends(100, 10, None)
    assert meter.read() == {"tokens_per_second": 50.0, "images_per_second": 5.0, "data_wait": 0.25}
    assert meter.remaining_seconds(5) == 10.0


class Chip:
    """Stands for a device that says what it is and how full it was."""

    device_kind, process_index = "NVIDIA H100 80GB HBM3", 0

    def __init__(self, peak):
        self.peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self.peak}


def test_meter_reads_the_share_of_the_peak_and_the_fullest_device(monkeypatch):
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    meter = metrics.Meter()
    meter.runs_on([Chip(5), Chip(7)])
    meter.step_begins()
    meter.data_arrived()
    flops = accounting.Flops(vision_tower=989e12, projector=0.0, language_model=989e12, phantom=0.0, head=0.0)
    meter.step_ends(100, 10, flops)
    rates = meter.read()
    assert rates["mfu"] == pytest.approx(0.5) and rates["flops_per_second"] == 989e12
    assert rates["tower_share"] == 0.5 and rates["device_memory_bytes"] == 7


def test_devices_that_do_not_say_give_neither():
    meter = metrics.Meter()
    meter.runs_on(jax.devices()[:1])
    meter.step_begins()
    meter.data_arrived()
    meter.step_ends(1, 1, accounting.Flops(1.0, 1.0, 1.0, 1.0, 1.0))
    assert meter.read().keys() == {
        "tokens_per_second", "images_per_second", "data_wait", "flops_per_second", "tower_share"
    }  # fmt: skip


def test_work_of_a_batch():
    batch = {
        # A prefix of three tokens, two of an image, with two branches; a conversation of two tokens; padding.
        "segment_ids": np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0]]),
        "positions": np.array([[0, 1, 2, 3, 4, 3, 0, 1, 0]]),
        "targets": np.array([[IGNORE, IGNORE, IGNORE, 5, 6, 7, IGNORE, 8, IGNORE]]),
        "image_slots": np.array([[0, 1, 2, 3, -1, -1, -1, -1, -1]]),
    }
    assert small.CONFIG.tokens_per_tile == 4
    assert metrics.count_work(batch, small.CONFIG) == accounting.Work(tokens=8, pairs=22, targets=4, tiles=1)


@pytest.mark.parametrize("count, text", [(512, "0 KiB"), (3_000_000, "2.9 MiB"), (65_712_345_678, "61.2 GiB")])
def test_bytes(count, text):
    assert metrics.gibibytes(count) == text


def test_the_log_keeps_what_came_before_and_drops_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path, last_step=0)
    for step in (1, 2, 2, 3):
        log.write({"step": step, "phase": "a", "train/loss": float("nan") if step == 1 else 1 / 3})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 3, "pha')
    log = metrics.MetricsLog(path, last_step=2)
    log.write({"step": 3, "phase": "a", "train/loss": 0.5})
    log.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 2, 3]
    assert np.isnan(records[0]["train/loss"]) and records[1]["train/loss"] == 1 / 3
