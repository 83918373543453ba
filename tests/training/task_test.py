"""The real thing at its smallest: the model, the records and the tokenizer of the quickstart through the loop."""

import json

import jax
import numpy as np
import pytest

from phantom_jax import pretrained
from phantom_jax.config import default_config, default_phase
from phantom_jax.data import sources
from phantom_jax.errors import InputError
from phantom_jax.training.loop import train

NAME = "handwritten_numbers/tiny"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sources.prepare(NAME, folder)
    return folder


def config_for(data_dir):
    config = default_config()
    config.model.update(name="phantom-quickstart", num_layers=1, mlp_dim=32)
    config.data.update(name=NAME, data_dir=str(data_dir))
    config.processor = {"template": "qwen2", "tile_size": 32, "max_tiles": 6, "max_length": 64}
    rows = {"questions_per_image": 2, "images_per_row": 2}
    config.phases = (
        default_phase(
            "step_1",
            trainable=("projector/**", "**/phantom/**"),
            objective={"name": "phantom_optimization"},
            data=rows,
            batch_size=4,
            accumulation=2,
            steps=3,
            optimizer={"learning_rate": 1e-2, "end_learning_rate": 1e-3},
        ),
        default_phase("step_2", data=rows, batch_size=4, steps=3, optimizer={"learning_rate": 1e-3}),
    )
    config.validation.update(every=2, batch_size=4, images=4)
    config.checkpoint.update(every=1, keep=2)
    return config


def records_of(workdir):
    """What was logged, without the figures that a clock gives."""
    timed = ("per_second", "seconds", "data_wait", "tokens_per", "images_per", "tower_share", "mfu", "memory")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in lines]


def test_a_phantom_trains_in_two_steps_and_resumes_to_the_bit(data_dir, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lines = []
    expected = train(config_for(data_dir), whole, say=lines.append)
    compiled = [line for line in lines if line.startswith("compiled")]
    assert len(compiled) == 4, f"one step and one validation for each of two phases: {compiled}"

    class Crash(Exception):
        pass

    def crash_at(prefix):
        def say(line):
            if line.startswith(prefix):
                raise Crash

        return say

    for prefix in ("step 2/3 step_1", "step 1/3 step_2"):
        with pytest.raises(Crash):
            train(config_for(data_dir), cut, say=crash_at(prefix))
    resumed = train(config_for(data_dir), cut, say=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    assert records_of(cut) == records_of(whole)
    names = {name for record in records_of(whole) for name in record}
    assert {"train/rewards/margins", "train/logps/chosen", "validation/exact_match", "train/grad_norm"} <= names

    # Step 1 trains what it names and nothing else.
    after_first = pretrained.load(whole / "models" / "step_1")
    final = pretrained.load(whole / "model")
    jax.tree.map(np.testing.assert_array_equal, final.checkpoint().params, expected)
    moved = [
        not np.array_equal(first, last)
        for first, last in zip(jax.tree.leaves(after_first.params), jax.tree.leaves(final.params), strict=True)
    ]
    assert all(moved[:1]) and sum(moved) > len(moved) / 2, "step 2 trains everything"
    answer = final.generate("Read the number.", images=[sources.open_records(NAME, "test", data_dir)[0].image])
    assert isinstance(answer, str)


def test_dpo_begins_at_its_stored_reference_whatever_the_packing(data_dir, tmp_path):
    config = config_for(data_dir)
    config.phases[0].objective = {"name": "dpo", "beta": 0.1, "reference": "stored"}
    config.phases[0].data.kind_weights = {"read": 1.0, "count": 0.0}
    config.phases = config.phases[:1]
    config.validation.every = 0
    lines = []
    train(config, tmp_path / "run", say=lines.append)
    records = sources.open_records(NAME, "train", data_dir)
    pairs = sum(bool(one.rejected) for record in records for one in record.questions if one.kind != "count")
    assert any(line.startswith(f"reference log-probabilities of {pairs:,} pairs: ") for line in lines)
    losses = [record["train/loss"] for record in records_of(tmp_path / "run")]
    # The pass has one image a row, training two: log-probabilities agree, so nothing is preferred yet.
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert all(abs(loss - np.log(2)) > 1e-4 for loss in losses[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"processor.tile_size": 64}, "processor.tile_size is 64, but the vision tower takes 32"),
        ({"processor.max_length": 30}, "the context is 30"),
        ({"model.vocab_size": 100}, "model.vocab_size is 100, but the tokenizer has"),
        ({"model.name": "phantom-quickstar"}, "did you mean 'phantom-quickstart'"),
        ({"model.attention_backend": "flash"}, "model.attention_backend is 'flash'; it must be one of xla, chunked"),
        ({"model.attention_backend": "cudnn"}, "'cudnn' runs on a GPU, and this is compiled for a CPU"),
        ({"data.name": "mnist"}, "no data set 'mnist'"),
        (
            {"phases[0].objective": {"name": "dpo", "beta": 0.1, "reference": "adapter_off"}},
            "lora.rank is 0, so there is none",
        ),
        ({"phases[0].trainable": ("projectr/**",)}, "'projectr/\\*\\*' .* matches no parameter"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_workdir_is_claimed(data_dir, tmp_path, change, message):
    config = config_for(data_dir)
    for path, value in change.items():
        if path.startswith("phases[0]."):
            config.phases[0][path.removeprefix("phases[0].")] = value
        else:
            section, key = path.split(".")
            with config[section].unlocked():
                config[section][key] = value
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()
