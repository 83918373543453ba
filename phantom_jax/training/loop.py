"""One run, from top to bottom: all phases of a config in one workdir, from wherever it stands.

A workdir holds `config.json` (the resolved config), `metrics.jsonl`, `checkpoints/STEP/`, `models/PHASE/` (the model
after each phase but the last) and `model/` (after the last). Phases with low-rank factors write adapters, see
`exports`. Where asked for it also holds `reference/PHASE/` (an objective's stored reference, see `reference`),
`tensorboard/`, `wandb/` and `profile/`.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from phantom_jax import config as configs
from phantom_jax.checkpoints import manager as checkpoints
from phantom_jax.errors import InputError
from phantom_jax.sharding.mesh import training_mesh
from phantom_jax.training import metrics as metrics_lib
from phantom_jax.training.assembly import assemble
from phantom_jax.training.division import divide
from phantom_jax.training.exports import Exports
from phantom_jax.training.phase import Phase, Say
from phantom_jax.training.places import Places, check_mesh
from phantom_jax.training.profiler import Profiler
from phantom_jax.training.state import Progress, merge
from phantom_jax.training.task import Task
from phantom_jax.training.workdir import check_workdir, claim_workdir, sole_owner
from phantom_jax.training.writers import check_writers, open_writers
from phantom_jax.trees import Params, flatten


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
      The parameters after the last phase, the factors of an adapter beside their kernels.

    Raises:
      InputError: the config is wrong, or the workdir belongs to another one. Nothing is overwritten.
      Diverged: loss or gradient was not finite too many times in a row.
      Preempted: SIGTERM or SIGINT came; the step was finished and the run saved.
    """
    say = say or _print
    if jax.process_count() > 1:
        raise InputError(
            f"train runs in one process and this is one of {jax.process_count()}: start one, which uses all devices of"
            " its machine."
        )
    config = configs.resolve(config)
    workdir = Path(workdir)
    known = check_workdir(workdir, config)
    mesh = training_mesh(config["mesh"], say)
    check_mesh(config, mesh)
    check_writers(config["writers"])
    task = task or assemble(config, mesh)
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    places = Places(mesh, config["mesh"]["strategy"], task.parameter_names)
    places.check(shapes)
    for line in places.remarks(shapes):
        say(line)
    divisions = divide(config["phases"], list(flatten(shapes)))
    phases = [Phase(config, index, task, shapes, division, places, say) for index, division in enumerate(divisions)]
    exports = Exports(task, config, workdir, divisions, say)
    total_steps = sum(phase.steps for phase in phases)
    iterators = {}
    if not known:
        # A mistake about any phase comes up here, before the workdir belongs to this config.
        say("opening the data ...")
        iterators = {index: task.train_iterator(index) for index in range(len(phases))}
        claim_workdir(workdir, config)
    with (
        jax.set_mesh(mesh),
        sole_owner(workdir),
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
        writers = open_writers(config["writers"], workdir, config=config, last_step=progress.step)
        with (
            contextlib.closing(
                metrics_lib.MetricsLog(workdir / "metrics.jsonl", last_step=progress.step, writers=writers)
            ) as log,
            contextlib.closing(Profiler(**config["profile"], folder=workdir / "profile", say=say)) as profiler,
        ):
            for index, phase in list(enumerate(phases))[progress.phase :]:
                iterator = iterators.pop(index) if iterators else task.train_iterator(index)
                if params is None and latest is not None:
                    state = checkpoints.restore_state(manager, latest, phase.abstract_state())
                    iterator.set_state(data_state)
                else:
                    state, params = phase.start(params, exports.keep_base(index)), None
                    progress.phase, progress.phase_step = index, 0

                for line in (phase.summary, *task.remarks(index)):
                    say(line)
                iterator = phase.with_references(iterator, state, progress, workdir / "reference", stop)

                def save(state, data_state):
                    meta = {"progress": dataclasses.asdict(progress), "config": config}
                    checkpoints.save(manager, progress.step, state=state, data=data_state, meta=meta)

                state = phase.run(
                    state,
                    iterator,
                    progress,
                    log=log,
                    save=save,
                    stop=stop,
                    profiler=profiler,
                    total_steps=total_steps,
                )
                exports.write(index, state)
                # Merged for the phase that goes on from there; after the last one nobody would read it.
                last = index + 1 == len(phases)
                params = merge(state.trainable, state.frozen) if last else phase.result(state)
                # The optimiser's state must be gone before the next phase makes its own.
                del state
        say(f"done: {progress.step} steps, {progress.tokens:,} tokens, {progress.images:,} images")
    return params


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
