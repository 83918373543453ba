"""One run, from top to bottom: all phases of a config in one workdir, from wherever it stands.

A workdir holds `config.json` (the resolved config), `metrics.jsonl`, `checkpoints/STEP/`, `models/PHASE/` (the model
after each phase but the last) and `model/` (after the last).
"""

import contextlib
import dataclasses
import fcntl
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from phantom_jax import config as configs
from phantom_jax.checkpoints import manager as checkpoints
from phantom_jax.errors import Diverged, InputError, Preempted
from phantom_jax.json_files import write_json
from phantom_jax.objectives import OBJECTIVES
from phantom_jax.training import metrics as metrics_lib
from phantom_jax.training.optimizer import make_optimizer
from phantom_jax.training.state import Params, TrainState, merge, split, start_phase
from phantom_jax.training.step import make_train_step, make_validation_step
from phantom_jax.training.task import DataIterator, Task, assemble

Say = Callable[[str], None]


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
      phase: index of the phase.
      phase_step: steps done of it.
      step: steps done over all phases; names checkpoints.
      tokens: real tokens seen over all phases.
      images: images seen over all phases.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    tokens: int = 0
    images: int = 0


def train(config: Any, workdir: str | Path, *, task: Task | None = None, say: Say | None = None) -> Params:
    """Trains all phases of a config, or what is left of them.

    Interrupted anywhere and started again, it gives bit-equal losses, rows and weights on the same machine: everything
    that decides them is in the checkpoints.

    Args:
      config: a ConfigDict, see `phantom_jax.config`.
      workdir: folder of the run.
      task: model and data; None builds those that the config names.
      say: prints a line.

    Returns:
      The parameters after the last phase.

    Raises:
      InputError: the config is wrong, or the workdir belongs to another one. Nothing is overwritten.
      Diverged: loss or gradient was not finite too many times in a row.
      Preempted: SIGTERM or SIGINT came; the step was finished and the run saved.
    """
    say = say or _print
    config = configs.resolve(config)
    workdir = Path(workdir)
    known = check_workdir(workdir, config)
    task = task or assemble(config)
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    phases = [_Phase(config, index, task, shapes, say) for index in range(len(config["phases"]))]
    total_steps = sum(phase.steps for phase in phases)
    iterators = {}
    if not known:
        # A mistake about any phase comes up here, before the workdir belongs to this config.
        say("opening the data ...")
        iterators = {index: task.train_iterator(index) for index in range(len(phases))}
        claim_workdir(workdir, config)
    with (
        _sole_owner(workdir),
        contextlib.closing(
            checkpoints.open_manager(workdir / "checkpoints", keep=config["checkpoint"]["keep"])
        ) as manager,
        _stop_signal() as stop,
    ):
        latest = manager.latest_step()
        progress, data_state = Progress(), None
        if latest is not None:
            data_state, meta = checkpoints.restore_meta(manager, latest)
            progress = Progress(**meta["progress"])
            say(f"going on after step {progress.step}/{total_steps}, from {manager.directory / str(latest)}")
        params = None
        with contextlib.closing(metrics_lib.MetricsLog(workdir / "metrics.jsonl", last_step=progress.step)) as log:
            for index, phase in list(enumerate(phases))[progress.phase :]:
                iterator = iterators.pop(index) if iterators else task.train_iterator(index)
                if params is None and latest is not None:
                    state = checkpoints.restore_state(manager, latest, phase.abstract_state())
                    iterator.set_state(data_state)
                else:
                    state = phase.start(params)
                    progress.phase, progress.phase_step = index, 0

                def save(state, data_state):
                    meta = {"progress": dataclasses.asdict(progress), "config": config}
                    checkpoints.save(manager, progress.step, state=state, data=data_state, meta=meta)

                state = phase.run(state, iterator, progress, log=log, save=save, stop=stop, total_steps=total_steps)
                params = merge(state.trainable, state.frozen)
                # The optimiser's state must be gone before the next phase makes its own.
                del state
                last = phase is phases[-1]
                _export(task, params, workdir / "model" if last else workdir / "models" / phase.name, say)
        say(f"done: {progress.step} steps, {progress.tokens:,} tokens, {progress.images:,} images")
    return params


class _Phase:
    """One phase: its state, its compiled steps and its loop."""

    def __init__(self, config: Mapping[str, Any], index: int, task: Task, shapes: Params, say: Say):
        phase = config["phases"][index]
        self.name, self.steps = phase["name"], phase["steps"]
        self._config, self._task, self._say = config, task, say
        optimizer = make_optimizer(
            phase["optimizer"],
            split(shapes, phase["trainable"])[0],
            groups=phase["groups"],
            steps=phase["steps"],
        )

        def start(params):
            return start_phase(
                params,
                patterns=phase["trainable"],
                init_optimizer=optimizer.init,
                compute_dtype=config["model"]["dtype"],
            )

        self._start, self._shapes = start, shapes
        objective = dict(phase["objective"])
        step = make_train_step(
            task.score, OBJECTIVES[objective.pop("name")](**objective), optimizer, accumulation=phase["accumulation"]
        )
        self._meter = metrics_lib.Meter()
        self._step = _Compiled(jax.jit(step, donate_argnums=0), f"{self.name} step", self._announce)
        self._validate = _Compiled(jax.jit(make_validation_step(task.score)), f"{self.name} validation", self._announce)

    def _announce(self, line: str) -> None:
        self._meter.pause()
        self._say(line)

    def start(self, params: Params | None) -> TrainState:
        """The state before the first step, from the phase before or from a fresh initialisation."""
        if params is not None:
            return jax.jit(self._start)(params)
        key = jax.random.key(self._config["seed"])
        return jax.jit(lambda key: self._start(self._task.init_params(key)))(key)

    def abstract_state(self) -> TrainState:
        """Shapes, types and places of the state, to restore into."""
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self._start, self._shapes),
        )

    def run(
        self,
        state: TrainState,
        iterator: DataIterator,
        progress: Progress,
        *,
        log: metrics_lib.MetricsLog,
        save: Callable[[TrainState, Any], None],
        stop: threading.Event,
        total_steps: int,
    ) -> TrainState:
        """Does what is left of the phase, counting in `progress`."""
        meter, pending = self._meter, None
        while progress.phase_step < self.steps:
            meter.step_begins()
            # Arrays cross between host and device where it says device_put or device_get, and nowhere else.
            with jax.transfer_guard("disallow"):
                batch = next(iterator)
                meter.data_arrived()
                state, metrics = self._step(state, jax.device_put(dict(batch)))
                tokens, images = metrics_lib.count_tokens(batch), metrics_lib.count_images(batch)
                progress.phase_step += 1
                progress.step += 1
                progress.tokens += tokens
                progress.images += images
                # The metrics of the step before: fetching them does not wait for the step just dispatched.
                self._record(pending, log)
            pending = (dataclasses.replace(progress), total_steps, metrics)

            ends = progress.phase_step == self.steps
            stopped = stop.is_set()
            validates = self._is_due("validation", progress, ends)
            saves = stopped or ends or self._is_due("checkpoint", progress)
            if validates or saves:
                # Nothing else waits for this step, and its time is its own.
                jax.block_until_ready(metrics)
            meter.step_ends(tokens, images)
            if validates or saves:
                self._record(pending, log)
                pending = None
            if validates:
                self._run_validation(state, progress, log)
            if saves:
                save(state, iterator.get_state())
            if stopped and not (ends and progress.step == total_steps):
                raise Preempted(
                    f"Stopped as asked after step {progress.step}/{total_steps}, which is saved. Start again to go on."
                )
        return state

    def _is_due(self, what: str, progress: Progress, ends: bool = False) -> bool:
        every = self._config[what]["every"]
        return bool(every) and (ends or progress.step % every == 0)

    def _record(self, pending: tuple | None, log: metrics_lib.MetricsLog) -> None:
        if pending is None:
            return
        progress, total_steps, metrics = pending
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
        record = {"step": progress.step, "phase": self.name, **values, "train/num_tokens": progress.tokens}
        ends = progress.phase_step == self.steps
        if progress.phase_step % self._config["log_every"] == 0 or ends:
            record |= {f"train/{name}": value for name, value in self._meter.read().items()}
            line = metrics_lib.step_line(
                step=progress.phase_step,
                steps=self.steps,
                phase=self.name,
                metrics=record,
                eta=self._meter.remaining_seconds(total_steps - progress.step),
            )
            self._say(line)
        log.write(record)
        limit = self._config["max_skipped_in_a_row"]
        if record["train/skipped_in_a_row"] >= limit:
            raise Diverged(
                f"Loss or gradient was not finite in {limit} steps in a row, the last of them step {progress.step}"
                f" (phase {self.name!r}, step {progress.phase_step}). None of them was applied. Set a lower"
                " learning_rate, a clip_norm or a longer warm-up, and look at the rows before that step."
            )

    def _run_validation(self, state: TrainState, progress: Progress, log: metrics_lib.MetricsLog) -> None:
        began = time.perf_counter()
        with jax.transfer_guard("disallow"):
            sums = [
                self._validate(state.trainable, state.frozen, jax.device_put(dict(batch)))
                for batch in self._task.validation_batches()
            ]
            sums = jax.device_get(sums)
        means = {}
        for name in sums[0] if sums else ():
            total, weight = (sum(float(part[name][which]) for part in sums) for which in (0, 1))
            means[f"validation/{name}"] = total / weight if weight else 0.0
        questions = sum(float(part["exact_match"][1]) for part in sums)
        log.write({"step": progress.step, "phase": self.name, **means, "validation/questions": questions})
        self._say(
            f"validation after step {progress.phase_step}/{self.steps} {self.name}"
            f" loss {means.get('validation/loss', 0.0):.4g} exact match {means.get('validation/exact_match', 0.0):.1%}"
            f" of {questions:.0f} questions in {metrics_lib.duration(time.perf_counter() - began)}"
        )


class _Compiled:
    """A jitted function, compiled ahead once for each shape of its last argument, which it announces.

    What was compiled takes no other shapes, so nothing is ever compiled unseen.
    """

    def __init__(self, jitted: Any, what: str, announce: Say):
        self._jitted, self._what, self._announce = jitted, what, announce
        self._programs = {}

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args[-1])
        shapes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if shapes not in self._programs:
            self._announce(f"compiling the {self._what} ...")
            began = time.perf_counter()
            self._programs[shapes] = self._jitted.lower(*args).compile()
            self._announce(f"compiled the {self._what} in {time.perf_counter() - began:.1f}s")
        return self._programs[shapes](*args)


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this config's run already; False for one that is new. Writes nothing.

    Raises:
      InputError: it is another run's, with the difference, or what is in it is nobody's.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} cannot be read as a config: {error}. Choose another workdir.") from error
        difference = configs.config_difference(theirs, config)
        if not all(map(configs.decides_nothing, difference)):
            raise InputError(
                f"Workdir {workdir} holds a run of another config; theirs -> yours:\n"
                + "\n".join(f"  {line}" for line in difference)
                + "\nSet --workdir to a new folder, or the config back to theirs."
            )
        return True
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"Workdir {workdir} is a file; set --workdir to a folder.")
    for name in ("checkpoints", "metrics.jsonl", "models", "model"):
        if (workdir / name).exists():
            raise InputError(
                f"Workdir {workdir} holds {name} but no config.json, so whose it is cannot be told. Choose another one."
            )
    return False


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder and writes its config.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / "config.json.tmp"
    write_json(temporary, config)
    temporary.replace(workdir / "config.json")


@contextlib.contextmanager
def _sole_owner(workdir: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of a workdir; a killed process keeps nobody out."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Workdir {workdir} is in use: another process trains in it. Wait for it, stop it, or set --workdir to"
                " a new folder."
            ) from error
        yield


def _export(task: Task, params: Params, target: Path, say: Say) -> None:
    # A run that is started again finds the models of finished phases written.
    if task.export is not None and not target.exists():
        task.export(params, target)
        say(f"wrote {target}")


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second one acts as ever.

    Outside the main thread, where Python takes no handlers, it is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number, frame):
        del frame
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(line: str) -> None:
    print(line, flush=True)
