"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, extras that are imported when asked for."""

import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from phantom_jax.errors import InputError

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Writer(Protocol):
    """Takes records of the log, in the order of their steps."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes every number of a record at the record's `step`."""

    def close(self) -> None:
        """Waits until everything is written."""


def check_writers(names: Sequence[str]) -> None:
    """Raises an `InputError` where a writer's package is not installed; imports nothing."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise InputError(
                f"writers holds {name!r}, which needs the package {_PACKAGES[name]}, and it is not installed."
                f" Install it with `pip install 'phantom-jax[{name}]'`, or leave {name!r} out."
            )


def open_writers(
    names: Sequence[str], workdir: Path, *, config: Mapping[str, Any], last_step: int
) -> tuple[Writer, ...]:
    """The writers of a config, ready to go on after `last_step`.

    Args:
      names: of `config.WRITERS`.
      workdir: of the run; curves are named for it, and local files go into its folders `tensorboard` and `wandb`.
      config: the resolved config, shown beside the curves.
      last_step: the last step that is done; 0 at the beginning.

    Raises:
      InputError: a package is not there, or Weights & Biases lets nobody in.
    """
    if jax.process_index():
        return ()  # every process has the same numbers: the first one writes them
    make = {
        "tensorboard": lambda: TensorBoardWriter(workdir, last_step=last_step),
        "wandb": lambda: WandbWriter(workdir, config=config),
    }
    return tuple(make[name]() for name in names)


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record can be drawn: all numbers but the step."""
    return {key: value for key, value in record.items() if key != "step" and isinstance(value, (int, float))}


class TensorBoardWriter:
    """Event files in WORKDIR/tensorboard.

    A run that goes on begins a new file, which tells TensorBoard to forget what older files have of later steps.
    """

    def __init__(self, workdir: Path, *, last_step: int):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases that is taken up again under the same id, kept in WORKDIR/wandb/run_id.

    Its steps only rise: those that are done again after a crash, with equal values, are left out. Where and whether it
    sends anything is up to its own settings, `WANDB_PROJECT` and `WANDB_MODE=offline` for instance.
    """

    def __init__(self, workdir: Path, *, config: Mapping[str, Any]):
        import wandb

        path = workdir / "wandb" / "run_id"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                dir=str(workdir),
                id=path.read_text(encoding="utf-8").strip(),
                name=workdir.resolve().name,
                config=dict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise InputError(
                f"Weights & Biases cannot be used: {error} Log in with `wandb login`, set WANDB_MODE=offline, or leave"
                " 'wandb' out of writers."
            ) from error

        self._next_step = self._run.step if self._run.resumed else 0

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] >= self._next_step:
            self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
