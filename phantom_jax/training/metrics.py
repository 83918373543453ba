"""What a run says about itself: metrics.jsonl, one readable line per step, and how fast it goes."""

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phantom_jax import accounting
from phantom_jax.batch import IGNORE, Batch
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.training.writers import Writer


class MetricsLog:
    """Appends records to metrics.jsonl, each a line of JSON, written through at once.

    Every record has `step`, counted over all phases from 1, and `phase`. Training metrics begin with `train/`, those of
    a validation with `validation/`. Values that are not finite are written as NaN and Infinity, as Python reads them.

    Args:
      path: the file.
      last_step: records of later steps are dropped first, since those steps will be done again: the file stays the
        record of one uninterrupted run. So is a last line that a kill cut off.
      writers: where every record goes too.
    """

    def __init__(self, path: str | Path, *, last_step: int, writers: Collection[Writer] = ()):
        self._path, self._writers = Path(path), writers
        self._drop_after(last_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for writer in self._writers:
            writer.close()

    def _drop_after(self, last_step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["step"] <= last_step:
                kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)


def count_tokens(batch: Batch) -> int:
    """Real tokens of a batch: all but padding."""
    return int(np.count_nonzero(batch["segment_ids"]))


def count_images(batch: Batch) -> int:
    """Conversations with an image. Several images of one conversation count once, padded tiles never."""
    segment_ids = np.where(np.asarray(batch["image_slots"]) >= 0, batch["segment_ids"], 0)
    return int(sum(np.count_nonzero(np.unique(row)) for row in segment_ids))


def count_work(batch: Batch, model: VisionLanguageConfig) -> accounting.Work:
    """What there is to compute in a batch. Tiles count by the image tokens that stand in rows, padded ones never."""
    real = np.asarray(batch["segment_ids"]) > 0
    return accounting.Work(
        tokens=np.count_nonzero(real),
        # A branch goes on from its prefix, so a token's position says how many it sees, also there.
        pairs=np.sum(np.where(real, np.asarray(batch["positions"], np.int64) + 1, 0)),
        targets=np.count_nonzero(np.asarray(batch["targets"]) != IGNORE),
        tiles=np.count_nonzero(np.asarray(batch["image_slots"]) >= 0) / model.tokens_per_tile,
    )


def device_memory(devices: Collection[jax.Device]) -> int | None:
    """The most bytes that were in use on any of the devices of this process; None where they do not say, as CPUs."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return max(peaks, default=None)


def compiled_memory(program: Any) -> str:
    """`, 1.2 GiB of arguments and 3.4 GiB in between on each device`, as the compiler plans it; empty without plan."""
    plan = program.memory_analysis()
    if plan is None:
        return ""
    arguments, between = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    return f", {gibibytes(arguments)} of arguments and {gibibytes(between)} in between on each device"


class Meter:
    """How fast training goes, over steps bracketed by `step_begins`, `data_arrived` and `step_ends`.

    A step that `pause` was called in, since it compiled, validated or saved, counts nowhere.
    """

    _KEEP = 0.9
    """How much of the average time of a step stays at each new one."""

    def __init__(self):
        self._seconds_per_step = None
        self._began = self._arrived = 0.0
        self._paused = False
        self._devices: Collection[jax.Device] = ()
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._images = 0
        self._seconds = self._waited = self._flops = self._tower_flops = 0.0

    def runs_on(self, devices: Collection[jax.Device]) -> None:
        """Whose peak and memory the readings are about."""
        self._devices = devices

    def step_begins(self) -> None:
        self._began = time.perf_counter()
        self._paused = False

    def data_arrived(self) -> None:
        self._arrived = time.perf_counter()

    def pause(self) -> None:
        self._paused = True

    def step_ends(self, tokens: int, images: int, flops: accounting.Flops | None) -> None:
        if self._paused:
            return
        seconds = time.perf_counter() - self._began
        self._tokens += tokens
        self._images += images
        if flops is not None:
            self._flops += flops.total
            self._tower_flops += flops.vision_tower
        self._seconds += seconds
        self._waited += self._arrived - self._began
        if self._seconds_per_step is None:
            self._seconds_per_step = seconds
        self._seconds_per_step += (1 - self._KEEP) * (seconds - self._seconds_per_step)

    def read(self) -> dict[str, float]:
        """Since the last reading. Empty without a step.

        `tokens_per_second`, `images_per_second`; `data_wait`, the share of the time that went into waiting for data;
        `flops_per_second` and `tower_share`, the share of those that is the vision tower's, where FLOPs are counted;
        `mfu` where the peak of the devices is known too; `device_memory_bytes`, the most on any device so far, where
        they say it.
        """
        rates = {}
        if self._seconds > 0:
            rates = {
                "tokens_per_second": self._tokens / self._seconds,
                "images_per_second": self._images / self._seconds,
                "data_wait": self._waited / self._seconds,
            }
            if self._flops:
                rates["flops_per_second"] = self._flops / self._seconds
                rates["tower_share"] = self._tower_flops / self._flops
                kind = next(iter(self._devices)).device_kind
                share = accounting.mfu(self._flops, self._seconds, len(self._devices), kind)
                rates |= {} if share is None else {"mfu": share}
            peak = device_memory(self._devices)
            rates |= {} if peak is None else {"device_memory_bytes": peak}
        self._reset()
        return rates

    def remaining_seconds(self, steps: int) -> float | None:
        """Time that so many more steps take at the present rate."""
        return None if self._seconds_per_step is None else steps * self._seconds_per_step


def step_line(*, step: int, steps: int, phase: str, metrics: Mapping[str, float], eta: float | None) -> str:
    """`step 9/77 sft loss 1.234 gnorm 0.81 lr 1.5e-05 | 5.1k tok/s 3 img/s data 1% | mfu 41% mem 61.2 GiB | eta 3m12s`.

    What a run does not know is left out.

    Args:
      step: of the phase, from 1.
      steps: length of the phase.
      phase: its name.
      metrics: a record of the log.
      eta: seconds that the run still takes.
    """
    parts = [
        f"step {step}/{steps} {phase} loss {metrics['train/loss']:.4g} gnorm {metrics['train/grad_norm']:.2g}"
        f" lr {metrics['train/learning_rate']:.1e}"
    ]
    if "train/rewards/accuracies" in metrics:
        parts[0] += f" preferred {metrics['train/rewards/accuracies']:.0%}"
    if metrics["train/skipped"]:
        parts[0] += f" skipped {metrics['train/skipped']:.0f}"
    if "train/tokens_per_second" in metrics:
        tokens, images = (thousands(metrics[f"train/{what}_per_second"]) for what in ("tokens", "images"))
        parts.append(f"{tokens} tok/s {images} img/s data {metrics['train/data_wait']:.0%}")
    chip = []
    if "train/mfu" in metrics:
        chip.append(f"mfu {metrics['train/mfu']:.0%}")
    if "train/device_memory_bytes" in metrics:
        chip.append(f"mem {gibibytes(metrics['train/device_memory_bytes'])}")
    parts += [" ".join(chip)] if chip else []
    if eta is not None:
        parts.append(f"eta {duration(eta)}")
    return " | ".join(parts)


def thousands(value: float) -> str:
    """950 -> `950`, 5120 -> `5.1k`, 2.5e6 -> `2.5M`, 3.25 -> `3.2`."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def gibibytes(count: float) -> str:
    """65712345678 -> `61.2 GiB`, 3000000 -> `2.9 MiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """7 -> `7s`, 192 -> `3m12s`, 7500 -> `2h05m`, 200000 -> `2d07h`."""
    seconds = round(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit}{name}{seconds % unit // part:02d}{part_name}"
    return f"{seconds}s"
