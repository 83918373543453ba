"""One phase of a run: its state, its compiled steps and its loop."""

import dataclasses
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phantom_jax import accounting
from phantom_jax.errors import Diverged, Preempted
from phantom_jax.objectives import OBJECTIVES
from phantom_jax.training import metrics as metrics_lib
from phantom_jax.training.division import Division
from phantom_jax.training.optimizer import make_optimizer
from phantom_jax.training.places import Places
from phantom_jax.training.profiler import Profiler
from phantom_jax.training.program import Program
from phantom_jax.training.reference import (
    ReferenceIterator,
    compute_references,
    load_references,
    make_reference_step,
)
from phantom_jax.training.state import Progress, TrainState, merge, split, start_phase
from phantom_jax.training.step import make_train_step, make_validation_step
from phantom_jax.training.task import DataIterator, Task
from phantom_jax.training.validation import run_validation
from phantom_jax.trees import Params, flatten

# Keeps the random numbers of adapters apart from those of the data.
_LORA_STREAM = 1

Say = Callable[[str], None]


class Phase:
    """One phase: its state, its compiled steps and its loop.

    Attributes:
      name, steps: of the phase.
      division: of the parameters.
      summary: a line that says how many of them train.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        index: int,
        task: Task,
        shapes: Params,
        division: Division,
        places: Places,
        say: Say,
    ):
        phase = config["phases"][index]
        self.name, self.steps = phase["name"], phase["steps"]
        self._index, self._reads_stored = index, phase["objective"].get("reference") == "stored"
        self._config, self._task, self._say = config, task, say
        self.division = division
        lora, seeds = division.lora, np.random.SeedSequence([config["seed"], index, _LORA_STREAM])
        init_seed, dropout_seed = (int(seed) for seed in seeds.generate_state(2))

        def trainable_shapes():
            factors = jax.eval_shape(lambda: lora.init(shapes, jax.random.key(0)))
            return merge(split(shapes, phase["trainable"])[0], factors)

        optimizer = make_optimizer(
            phase["optimizer"],
            trainable_shapes(),
            groups=phase["groups"],
            steps=phase["steps"],
            what=f"phases[{index}].groups",
        )

        def start(params):
            return start_phase(
                params,
                patterns=phase["trainable"],
                init_optimizer=optimizer.init,
                compute_dtype=config["model"]["dtype"],
                lora=lora,
                key=jax.random.key(init_seed),
            )

        self._places, self._start = places, start
        abstract = jax.eval_shape(start, shapes)
        self._abstract = abstract.replace(frozen=division.quantized_shapes(abstract.frozen))
        self._shardings = places.state(self._abstract)
        objective = dict(phase["objective"])
        step = make_train_step(
            task.score,
            OBJECTIVES[objective.pop("name")](**objective),
            optimizer,
            accumulation=phase["accumulation"],
            constrain_gradients=places.constrain_gradients,
            lora=lora,
            seed=dropout_seed,
        )
        self._count_flops = lambda batch: None
        if task.model is not None:
            flops = accounting.step_flops(task.model, abstract.trainable)
            self._count_flops = lambda batch: flops(metrics_lib.count_work(batch, task.model))
        trained, kept = map(_count, (abstract.trainable, abstract.frozen))
        share = trained / (trained + kept)
        self.summary = f"phase {self.name!r} trains {trained:,} of {trained + kept:,} parameters ({share:.2%})"
        self._meter = metrics_lib.Meter()
        step = jax.jit(places.traced(step), donate_argnums=0, out_shardings=(self._shardings, places.whole))
        self._step = Program(step, f"{self.name} step", self._announce)
        validate = jax.jit(places.traced(make_validation_step(task.score, lora)), out_shardings=places.whole)
        self._validate = Program(validate, f"{self.name} validation", self._announce)

    def _announce(self, line: str) -> None:
        self._meter.pause()
        self._say(line)

    def start(self, params: Params | None, keep_base: Callable[[Params], None] | None = None) -> TrainState:
        """The state before the first step, from the phase before, from a model's folder or from random parameters.

        Args:
          params: from the phase before, used up and emptied here. None for the first phase.
          keep_base: is given all parameters as they are before any of them is quantised or adapted.
        """
        if params is None and self._task.load_params is not None:
            compute_dtype = self._config["model"]["dtype"]
            params = self._task.load_params(
                lambda path: self.division.dtype(path, compute_dtype), self.division.quantize, self._places.parameter
            )
        if params is not None:
            state = self._starting(self._start, params)
            params.clear()
        else:
            key = jax.random.key(self._config["seed"])
            state = self._starting(lambda key: self._start(self._task.init_params(key)), key)
        if keep_base is not None:
            keep_base(self.division.lora.detach(merge(state.trainable, state.frozen)))
        frozen = self.division.quantize_frozen(state.frozen)
        return state.replace(frozen=jax.device_put(frozen, self._shardings.frozen))

    def _starting(self, start: Callable[[Any], TrainState], given: Any) -> TrainState:
        # What is given may hold kernels that are quantised already.
        shardings = self._places.state(jax.eval_shape(start, given))
        with warnings.catch_warnings():
            # What changes its dtype cannot stay in its buffer; all else does, and is never there twice.
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            return jax.jit(start, out_shardings=shardings, donate_argnums=0)(given)

    def abstract_state(self) -> TrainState:
        """Shapes, types and places of the state, to restore into."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self._abstract,
            self._shardings,
        )

    def result(self, state: TrainState) -> Params:
        """All parameters after the last step, the changes of an adapter merged.

        Those on a quantised base cannot be: the factors stay beside their kernels.
        """
        params = merge(state.trainable, state.frozen)
        return params if self.division.adapts_quantized else self.division.lora.merge(params)

    def trace_step(self, batch: Mapping[str, Any]) -> jax.stages.Traced:
        """The step, traced for a batch of such shapes."""
        return self._step.trace(self.abstract_state(), batch)

    def run(
        self,
        state: TrainState,
        iterator: DataIterator,
        progress: Progress,
        *,
        log: metrics_lib.MetricsLog,
        save: Callable[[TrainState, Any], None],
        stop: threading.Event,
        profiler: Profiler,
        total_steps: int,
    ) -> TrainState:
        """Does what is left of the phase, counting in `progress`."""
        meter, pending = self._meter, None
        meter.runs_on(jax.tree.leaves(state)[0].sharding.device_set)
        while progress.phase_step < self.steps:
            meter.step_begins()
            alone = pending is None
            if profiler.step_begins(progress.step + 1, state.step):
                meter.pause()
            # Arrays cross between host and device where it says device_put or device_get, and nowhere else.
            with jax.transfer_guard("disallow"):
                batch = next(iterator)
                meter.data_arrived()
                state, metrics = self._step(state, self._places.batch(batch))
                tokens, images = metrics_lib.count_tokens(batch), metrics_lib.count_images(batch)
                flops = self._count_flops(batch)
                progress.phase_step += 1
                progress.step += 1
                progress.tokens += tokens
                progress.images += images
                # The metrics of the step before: fetching them does not wait for the step just dispatched.
                self._record(pending, log)
            pending = (dataclasses.replace(progress), total_steps, metrics)
            profiler.step_ends(progress.step, metrics)

            ends = progress.phase_step == self.steps
            stopped = stop.is_set()
            validates = self._is_due("validation", progress, ends)
            saves = stopped or ends or self._is_due("checkpoint", progress)
            # What was waited for is the step before. Where there was none, a step that is waited for below has a time
            # of its own, and any other that of its dispatch alone, which says nothing.
            if not alone:
                meter.step_ends(tokens, images, flops)
            if validates or saves:
                jax.block_until_ready(metrics)
            elif alone:
                meter.pause()
            if alone:
                meter.step_ends(tokens, images, flops)
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
        batches = map(self._places.batch, self._task.validation_batches())
        metrics = run_validation(lambda batch: self._validate(state.trainable, state.frozen, batch), batches)
        log.write({"step": progress.step, "phase": self.name} | metrics)
        self._say(
            f"validation after step {progress.phase_step}/{self.steps} {self.name}"
            f" loss {metrics.get('validation/loss', math.nan):.4g}"
            f" exact match {metrics.get('validation/exact_match', math.nan):.1%}"
            f" of {metrics['validation/questions']:.0f} questions"
            f" in {metrics_lib.duration(time.perf_counter() - began)}"
        )

    def with_references(
        self, iterator: DataIterator, state: TrainState, progress: Progress, folder: Path, stop: threading.Event
    ) -> DataIterator:
        """The iterator with what the objective's reference model says, where that is stored.

        It is computed before the first step, with the state that the phase begins with, and read ever after.

        Args:
          iterator: of the phase.
          state: where the phase stands.
          progress: of the run.
          folder: of all phases' stored log-probabilities.
          stop: ends the pass when it is set.
        """
        if not self._reads_stored or progress.phase_step == self.steps:
            return iterator
        pairs, folder = self._task.pairs(self._index), folder / self.name
        if progress.phase_step == 0:
            step = jax.jit(self._places.traced(make_reference_step(self._task.score)), out_shardings=self._places.whole)
            refer = Program(step, f"{self.name} reference", self._announce)

            def score(batch):
                with jax.transfer_guard("disallow"):
                    return jax.device_get(refer(state.trainable, state.frozen, self._places.batch(batch)))

            params = merge(state.trainable, state.frozen)
            compute_references(folder, pairs, params, score, say=self._say, stop=stop)
        return ReferenceIterator(iterator, load_references(folder, pairs))


def _count(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten(params).values())
