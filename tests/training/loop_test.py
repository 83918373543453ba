import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.checkpoints import manager as checkpoints
from phantom_jax.errors import Diverged, InputError, Preempted
from phantom_jax.sharding.mesh import training_mesh
from phantom_jax.training import loop
from phantom_jax.training.division import divide
from phantom_jax.training.phase import Phase
from phantom_jax.training.places import Places
from phantom_jax.training.workdir import sole_owner
from phantom_jax.trees import flatten
from tests.training.toy import Scores, SelfStopping, ToyIterator, make_task, score, toy_config

TIMES = ("_per_second", "data_wait", "tower_share", "mfu", "device_memory_bytes")


def records(workdir):
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]


def run(workdir, config=None, *, seen=None, **task):
    lines = []
    params = loop.train(config or toy_config(), workdir, task=make_task(seen, **task), say=lines.append)
    assert lines.pop(0) == "the mesh is 1 of 8 devices: set mesh.fsdp to -1 to train on all of them"
    return params, lines


def final_state(workdir):
    """All items of the last checkpoint, as stored."""
    manager = checkpoints.open_manager(workdir / "checkpoints", keep=3)
    step = manager.latest_step()
    data, meta = checkpoints.restore_meta(manager, step)
    config = json.loads((workdir / "config.json").read_text())
    shapes = jax.eval_shape(make_task().init_params, jax.random.key(0))
    places = Places(training_mesh(config["mesh"], print), config["mesh"]["strategy"], {})
    index = meta["progress"]["phase"]
    division = divide(config["phases"], list(flatten(shapes)))[index]
    last = Phase(config, index, make_task(), shapes, division, places, print)
    state = checkpoints.restore_state(manager, step, last.abstract_state())
    manager.close()
    return jax.device_get(state), data, meta


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


class StopsAt(ToyIterator):
    """Raises, as a crash would, when a given batch is asked for."""

    at = (0, 0)

    def __next__(self):
        if (self.phase, self.position) == self.at:
            raise RuntimeError("crash")
        return super().__next__()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, to compare with."""
    workdir, seen = tmp_path_factory.mktemp("whole"), []
    params, lines = run(workdir, seen=seen)
    return {"workdir": workdir, "params": params, "lines": lines, "seen": seen}


def test_a_run_goes_through_its_phases(whole):
    train = [record for record in records(whole["workdir"]) if "train/loss" in record]
    assert [(record["step"], record["phase"]) for record in train] == [
        (step, "first" if step <= 7 else "second") for step in range(1, 14)
    ]
    names = {"loss", "sft", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate", "skipped"}
    assert {f"train/{name}" for name in names} <= train[0].keys() & train[-1].keys()
    assert {"train/rewards/accuracies", "train/logps/chosen", "train/preference"} <= train[0].keys()
    assert not any("rewards" in key for key in train[-1])
    validations = [record for record in records(whole["workdir"]) if "validation/loss" in record]
    # Every fourth step, and at the end of each phase.
    assert [record["step"] for record in validations] == [4, 7, 8, 12, 13]
    assert all(0 <= record["validation/exact_match"] <= 1 for record in validations)
    assert all(record["validation/questions"] == 8 for record in validations)
    assert train[-1]["train/num_tokens"] == 13 * 8 * 10
    assert json.loads((whole["workdir"] / "config.json").read_text())["phases"][1]["name"] == "second"


def test_learning_rates_follow_the_phase_and_end_with_it(whole):
    rates = [record["train/learning_rate"] for record in records(whole["workdir"]) if "train/loss" in record]
    assert rates[:3] == [0.0, pytest.approx(5e-3), pytest.approx(1e-2)]
    assert rates[7] == pytest.approx(3e-3) and rates[12] < 1e-3


def test_the_lines_say_what_happens(whole):
    lines = whole["lines"]
    assert lines[0] == "opening the data ..." and lines[2] == "compiling the first step ..."
    total = sum(leaf.size for leaf in jax.tree.leaves(whole["params"]))
    head = sum(leaf.size for leaf in jax.tree.leaves(whole["params"]["head"]))
    assert lines[1] == f"phase 'first' trains {head:,} of {total:,} parameters ({head / total:.2%})"
    assert f"phase 'second' trains {total:,} of {total:,} parameters (100.00%)" in lines
    assert re.fullmatch(
        r"compiled the first step in .*s, .*iB of arguments and .*iB in between on each device", lines[3]
    )
    [line] = [line for line in lines if line.startswith("step 3/7 first loss ")]
    for part in (" gnorm ", " lr 1.0e-02 ", " tok/s ", " img/s ", " data ", " eta "):
        assert part in line
    assert any(line.startswith("validation after step 7/7 first loss") for line in lines)
    assert lines[-1].startswith("done: 13 steps, 1,040 tokens")


def test_the_same_run_twice_is_bit_equal(whole, tmp_path):
    params, _ = run(tmp_path)
    assert_equal(params, whole["params"])
    assert records(tmp_path) == records(whole["workdir"])


def test_a_finished_run_started_again_does_nothing(whole):
    before = (whole["workdir"] / "metrics.jsonl").read_bytes()
    params, lines = run(whole["workdir"])
    assert_equal(params, whole["params"])
    assert not any("compil" in line for line in lines)
    assert (whole["workdir"] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("crashes", [[(0, 5)], [(0, 0)], [(1, 0)], [(0, 4), (1, 1), (1, 5)]])
def test_resume_after_crashes_is_bit_exact(whole, tmp_path, crashes):
    """Crashes before the first checkpoint, between checkpoints, at a phase boundary, and several in one run."""
    rows = {}
    for at in (*crashes, None):
        iterator = type("Crashing", (StopsAt,), {"at": at})
        seen = []
        if at is None:
            params, _ = run(tmp_path, seen=seen, iterator=iterator)
        else:
            with pytest.raises(RuntimeError, match="crash"):
                run(tmp_path, seen=seen, iterator=iterator)
        for row_ids in seen:
            rows[row_ids[0]] = row_ids
    assert_equal(params, whole["params"])
    assert records(tmp_path) == records(whole["workdir"])
    assert [rows[first] for first in sorted(rows)] == sorted(whole["seen"])
    for mine, theirs in zip(final_state(tmp_path), final_state(whole["workdir"]), strict=True):
        assert_equal(mine, theirs)


def test_resume_asks_for_exactly_the_next_row(whole, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, iterator=type("Crashing", (StopsAt,), {"at": (0, 5)}))
    seen = []
    run(tmp_path, seen=seen)
    # The last checkpoint was written after step 3.
    assert seen == whole["seen"][3:]


def test_a_signal_finishes_the_step_saves_and_is_exact(whole, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Preempted, match="after step 5/13, which is saved") as error:
        run(tmp_path, iterator=SelfStopping)
    assert error.value.exit_code == 42
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 4, 5]
    seen = []
    params, lines = run(tmp_path, seen=seen)
    assert lines[0].startswith("going on after step 5/13")
    assert seen == whole["seen"][5:]
    assert_equal(params, whole["params"])
    assert records(tmp_path) == records(whole["workdir"])


def test_a_run_in_another_thread_takes_no_signals(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path, toy_config(steps=(1, 1))))
    thread.start()
    thread.join(timeout=120)
    assert [record["step"] for record in records(tmp_path) if "train/loss" in record] == [1, 2]


def child(workdir, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.toy", str(workdir), *options],
        cwd=os.getcwd(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_processes_leave_a_run_that_goes_on_exactly(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    reference, _ = run(tmp_path / "whole", toy_config(steps=(30, 30)))
    workdir = tmp_path / "killed"
    for at_line in (5, 40):
        process = child(workdir)
        metrics = workdir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= at_line:
                break
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
    params, lines = run(workdir, toy_config(steps=(30, 30)))
    assert lines[0].startswith("going on after step ")
    assert_equal(params, reference)
    assert records(workdir) == records(tmp_path / "whole")
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_a_stopped_process_exits_with_42(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    process = child(tmp_path, "stop")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 42, output
    assert "after step 5/60, which is saved" in output


def test_metrics_lose_a_torn_line_and_steps_that_are_done_again(whole, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, iterator=type("Crashing", (StopsAt,), {"at": (0, 5)}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "phase": "fir')
    run(tmp_path)
    assert records(tmp_path) == records(whole["workdir"])


def test_nothing_compiles_after_the_first_step_of_a_phase(tmp_path):
    events = []

    def listen(name, seconds, **_):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    counts, traces = {}, []

    class Counting(ToyIterator):
        def __next__(self):
            compiled = sum("backend_compile" in name for name in events)
            counts[self.phase, self.position] = (compiled, len(traces))
            return super().__next__()

    def traced(params, batch):
        traces.append(batch["token_ids"].shape)
        return score(params, batch)

    config = toy_config(validation={"every": 0, "split": "", "batch_size": 1, "images": 0})
    try:
        _, lines = run(tmp_path, config, iterator=Counting, score=traced)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [line for line in lines if line.startswith("compiling")] == [
        "compiling the first step ...",
        "compiling the second step ...",
    ]
    for phase, steps in ((0, 7), (1, 6)):
        assert counts[phase, 1] > counts[phase, 0]
        # From the second step on not even a small operation outside the step is compiled.
        assert counts[phase, steps - 1] == counts[phase, 1]


def test_an_array_that_crosses_unasked_is_refused(tmp_path):
    class Careless(ToyIterator):
        def __next__(self):
            batch = super().__next__()
            return batch | {"row_ids": jnp.asarray(batch["row_ids"]) + 1}

    with pytest.raises(Exception, match="[Dd]isallowed.*transfer"):
        run(tmp_path, iterator=Careless)


def test_steps_that_are_not_finite_end_the_run_with_its_metrics(tmp_path):
    def failing(params, batch):
        scores = score(params, batch)
        bad = jnp.any(batch["row_ids"] >= 8 * 4)
        return Scores(jnp.where(bad, jnp.nan, 1.0) * scores.log_probs, scores.correct)

    config = toy_config(steps=(20, 1), max_skipped_in_a_row=3, validation={**toy_config().validation, "every": 0})
    with pytest.raises(Diverged, match="3 steps in a row, the last of them step 7") as error:
        run(tmp_path, config, score=failing)
    assert error.value.exit_code == 3
    seen = records(tmp_path)
    assert [record["step"] for record in seen] == list(range(1, 8))
    assert [record["train/skipped"] for record in seen] == [0, 0, 0, 0, 1, 2, 3]
    assert np.isnan(seen[-1]["train/loss"])
    state, _, _ = final_state(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


def test_single_bad_steps_are_skipped_and_the_run_goes_on(tmp_path):
    def failing(params, batch):
        scores = score(params, batch)
        return Scores(jnp.where(jnp.any(batch["row_ids"] == 8 * 2), jnp.inf, 1.0) * scores.log_probs, scores.correct)

    params, lines = run(tmp_path, toy_config(max_skipped_in_a_row=2), score=failing)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    skipped = [record["train/skipped"] for record in records(tmp_path) if "train/loss" in record]
    assert skipped == [0, 0, 1, 1, 1, 1, 1] + [0] * 6
    assert any("skipped 1" in line for line in lines)


def test_a_workdir_of_another_config_is_refused_with_the_difference(whole):
    before = {path: path.read_bytes() for path in sorted(whole["workdir"].glob("*.json*"))}
    config = toy_config()
    config.phases[0].optimizer.learning_rate = 0.5
    with pytest.raises(InputError, match=r"phases\[0\]\.optimizer\.learning_rate: 0\.01 -> 0\.5"):
        run(whole["workdir"], config)
    assert {path: path.read_bytes() for path in sorted(whole["workdir"].glob("*.json*"))} == before


def test_a_workdir_has_one_process(tmp_path):
    with sole_owner(tmp_path), pytest.raises(InputError, match="is in use: another process"):
        run(tmp_path, toy_config())
    run(tmp_path, toy_config())


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path, toy_config())
    latest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(latest / "state" / "d")
    with pytest.raises(InputError, match=f"Checkpoint .*{latest.name} cannot be read, it may be damaged"):
        run(tmp_path, toy_config())


def test_what_decides_nothing_may_change_when_a_run_goes_on(tmp_path):
    run(tmp_path, toy_config())
    config = toy_config()
    config.log_every, config.checkpoint.keep, config.data.data_dir = 7, 9, "moved"
    _, lines = run(tmp_path, config)
    assert any("going on after step" in line for line in lines)


def test_folders_that_are_no_workdir_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "file")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="holds checkpoints but no config.json"):
        run(tmp_path / "other")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path / "torn")


def test_a_wrong_config_is_refused_before_anything_is_written(tmp_path):
    config = toy_config()
    config.phases[0].accumulation = 3
    with pytest.raises(InputError, match="accumulation"):
        run(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


def test_a_mistake_about_a_later_phase_comes_up_before_anything_is_written(tmp_path):
    class Refusing(ToyIterator):
        def __init__(self, phase, seen):
            super().__init__(phase, seen)
            if phase == 1:
                raise InputError("no such split")

    with pytest.raises(InputError, match="no such split"):
        run(tmp_path / "new", iterator=Refusing)
    config = toy_config()
    config.phases[1].groups[0].patterns = ("embedding/**",)
    with pytest.raises(InputError, match="'embedding/\\*\\*' of phases\\[1\\].groups.*: embed"):
        run(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


def test_models_are_exported_after_each_phase_once(tmp_path):
    written = []

    def export(params, folder):
        folder.mkdir(parents=True)
        written.append((folder.name, jax.tree.map(np.asarray, params)))

    params, _ = run(tmp_path, export=export)
    run(tmp_path, export=export)
    assert [name for name, _ in written] == ["first", "model"]
    assert_equal(written[1][1], jax.device_get(params))
    assert (tmp_path / "models" / "first").is_dir() and (tmp_path / "model").is_dir()


def test_frozen_parameters_of_a_phase_stay_as_they_were(whole, tmp_path):
    params, _ = run(tmp_path, toy_config(steps=(7, 6), phases=toy_config().phases[:1]))
    start = jax.jit(make_task().init_params)(jax.random.key(0))
    np.testing.assert_array_equal(params["embed"]["table"], start["embed"]["table"])
    assert not np.array_equal(params["head"]["kernel"], start["head"]["kernel"])
