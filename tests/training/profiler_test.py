from phantom_jax.training import loop
from tests.training.toy import make_task, toy_config


def traces(workdir):
    return sorted((workdir / "profile").rglob("*.xplane.pb"))


def test_the_steps_asked_for_are_traced(tmp_path):
    """Steps 6 to 9, across the end of the first phase."""
    lines = []
    config = toy_config(profile={"first_step": 6, "num_steps": 4})
    loop.train(config, tmp_path, task=make_task(), say=lines.append)
    assert len(traces(tmp_path)) == 1 and traces(tmp_path)[0].stat().st_size > 1000
    assert f"wrote a trace of steps 6 to 9 to {tmp_path / 'profile'}" in lines


def test_a_run_that_ends_earlier_writes_what_there_is(tmp_path):
    lines = []
    config = toy_config(steps=(2, 2), profile={"first_step": 4, "num_steps": 4})
    loop.train(config, tmp_path, task=make_task(), say=lines.append)
    assert len(traces(tmp_path)) == 1
    assert f"wrote a trace of what there was from step 4 on to {tmp_path / 'profile'}" in lines


def test_nothing_is_traced_unasked(tmp_path):
    loop.train(toy_config(steps=(1, 1)), tmp_path, task=make_task(), say=str)
    assert not (tmp_path / "profile").exists()
