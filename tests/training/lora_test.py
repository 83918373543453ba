"""Low-rank adapters and quantised bases through the loop: what is trained, written, restored and refused."""

import json

import jax
import numpy as np
import pytest

from phantom_jax import pretrained
from phantom_jax.checkpoints import adapter_folder, model_folder
from phantom_jax.checkpoints.adapter import merge
from phantom_jax.config import default_config, default_phase
from phantom_jax.data import sources
from phantom_jax.errors import InputError
from phantom_jax.lora import Lora
from phantom_jax.models.quantization import quantize_linear
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.training.division import Division
from phantom_jax.training.exports import Exports
from phantom_jax.training.loop import train
from phantom_jax.training.task import Task
from phantom_jax.trees import flatten, unflatten
from tests.generation import tiny
from tests.training.task_test import NAME, records_of

EVERY = ("language_model/layers/**", "vision_tower/layers/**")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sources.prepare(NAME, folder)
    return folder


def config_for(data_dir, *phases, **model):
    config = default_config()
    with config.model.unlocked():
        config.model.update(model or {"name": "phantom-quickstart", "num_layers": 1, "mlp_dim": 32})
    config.data.update(name=NAME, data_dir=str(data_dir))
    config.processor = {"template": "qwen2", "tile_size": 32, "max_tiles": 6, "max_length": 64}
    config.phases = phases
    config.checkpoint.update(every=1, keep=2)
    return config


def phase(name, **values):
    return default_phase(
        name,
        **{"trainable": ("projector/**",), "batch_size": 4, "steps": 2, "optimizer": {"learning_rate": 1e-2}, **values},
    )


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "patterns": EVERY}
NF4 = {"kind": "nf4", "patterns": EVERY}


def quiet(line):
    del line


class Crash(Exception):
    pass


def crash_at(prefix):
    def say(line):
        if line.startswith(prefix):
            raise Crash

    return say


@pytest.fixture(scope="module")
def adapted(data_dir, tmp_path_factory):
    """A run with an adapter, from random parameters; the factors beside their kernels."""
    workdir = tmp_path_factory.mktemp("adapted")
    config = config_for(data_dir, phase("tune", lora=LORA, accumulation=2, steps=3))
    return config, workdir, train(config, workdir, say=quiet)


def test_an_adapter_is_written_beside_its_base(adapted, data_dir):
    _, workdir, params = adapted
    base = workdir / "models" / "tune.base"
    adapter = adapter_folder.read(workdir / "model")
    assert adapter.base == str(base) and adapter.template == "qwen2" and adapter.dropout == 0.1
    names = {path.removeprefix("params/") for path in adapter.low_rank}
    assert len(names) == 7 + 6 and not any("phantom" in name or "head" in name for name in names)
    assert {change.ranks for change in adapter.low_rank.values()} == {(4,), (4,) * 4}
    assert all(path.startswith("params/projector/") for path in adapter.others)
    assert all(np.abs(np.asarray(change.b)).max() > 0 for change in adapter.low_rank.values())

    checkpoint, processor = model_folder.read(base)
    merged = flatten(merge(checkpoint, adapter).params)
    for path, expected in flatten(Lora(tuple(sorted(names)), 4, 8.0).merge(params)).items():
        np.testing.assert_allclose(np.asarray(merged[path]), expected, rtol=0, atol=1e-6, err_msg=path)
        changed = not np.array_equal(np.asarray(flatten(checkpoint.params)[path]), expected)
        assert changed == (path in names or path.startswith("projector/")), path
    others = {path: np.asarray(leaf) + 1 for path, leaf in checkpoint.flat().items()}
    with pytest.raises(InputError, match=f"trained on another model of the same shape: .* Give .*{base}"):
        merge(checkpoint.with_flat(others), adapter_folder.read(workdir / "model"))
    handle = pretrained.load(base, adapter=workdir / "model")
    assert isinstance(
        handle.generate("Read the number.", images=[sources.open_records(NAME, "test", data_dir)[0].image]), str
    )


def test_a_restart_within_an_adapter_is_exact_to_the_bit(adapted, tmp_path):
    config, whole, expected = adapted
    with pytest.raises(Crash):
        train(config, tmp_path, say=crash_at("step 2/3 tune"))
    jax.tree.map(np.testing.assert_array_equal, train(config, tmp_path, say=quiet), expected)
    assert records_of(tmp_path) == records_of(whole)


@pytest.fixture(scope="module")
def quantized(adapted, data_dir, tmp_path_factory):
    """From the base of the other run: its codes alone in full tuning of the rest, then with an adapter."""
    _, source, _ = adapted
    workdir = tmp_path_factory.mktemp("quantized")
    rest = phase("rest", trainable=("projector/**", "**/phantom/**"), quantize=NF4)
    config = config_for(data_dir, rest, phase("tune", lora=LORA, quantize=NF4), weights=f"{source}/models/tune.base")
    return config, workdir, train(config, workdir, say=quiet)


def test_a_quantised_base_stays_as_it_was(quantized, adapted):
    config, workdir, params = quantized
    begun = flatten(model_folder.read(config.model.weights)[0].params)
    rest = flatten(model_folder.read(workdir / "models" / "rest")[0].params)
    codes = {path for path, leaf in flatten(params).items() if isinstance(leaf, QuantizedTensor)}
    assert len(codes) == 13
    for path, array in rest.items():
        if "/phantom/" in path:
            continue
        # The floats that the codes were made from, not what they stand for.
        same = np.array_equal(np.asarray(begun[path]), np.asarray(array))
        assert same != path.startswith("projector/"), path
    adapter = adapter_folder.read(workdir / "model")
    assert adapter.base == str(workdir / "models" / "rest")
    pretrained.load(adapter.base, adapter=workdir / "model")


def test_the_base_of_a_second_adapter_has_floats_in_place_of_codes(adapted, tmp_path):
    """Where the first phase adapts some kernels and keeps others as codes, and the second begins with what it made."""
    _, source, _ = adapted
    weights = f"{source}/models/tune.base"
    params = dict(flatten(model_folder.read(weights)[0].params))
    coded, changed = "vision_tower/layers/up/kernel", Lora(("language_model/layers/gate/kernel",), 2, 4.0)
    begun = np.asarray(params[coded])
    params[coded] = quantize_linear(coded, begun, "nf4")
    divisions = [Division(frozenset(), changed, frozenset({coded}), "nf4")] * 2
    written = {}
    task = Task(None, None, export=lambda params, folder: written.update(flatten(params)))
    config = {"phases": [{"name": "one"}, {"name": "two"}], "model": {"weights": weights}}
    Exports(task, config, tmp_path, divisions, quiet).keep_base(1)(unflatten(params))
    np.testing.assert_array_equal(np.asarray(written[coded]), begun)


@pytest.mark.parametrize("prefix", ["step 1/2 rest", "step 2/2 tune"])
def test_a_restart_on_a_quantised_base_is_exact_to_the_bit(quantized, prefix, tmp_path):
    config, whole, expected = quantized
    with pytest.raises(Crash):
        train(config, tmp_path, say=crash_at(prefix))
    jax.tree.map(np.testing.assert_array_equal, train(config, tmp_path, say=quiet), expected)
    assert records_of(tmp_path) == records_of(whole)


def test_after_an_adapter_its_changes_are_the_models(adapted, data_dir, tmp_path):
    _, source, _ = adapted
    phases = phase("tune", lora=LORA, steps=1), phase("all", trainable=("**/final_norm/**",), steps=1)
    params = train(config_for(data_dir, *phases, weights=f"{source}/models/tune.base"), tmp_path, say=quiet)
    base = model_folder.read(f"{source}/models/tune.base")[0]
    merged = flatten(merge(base, adapter_folder.read(tmp_path / "models" / "tune")).params)
    for path, leaf in flatten(params).items():
        if "final_norm" not in path:
            np.testing.assert_allclose(np.asarray(merged[path]), leaf, rtol=0, atol=1e-6, err_msg=path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["name"] == ""
    assert not (tmp_path / "models" / "tune.base").exists()


def refused(config, tmp_path, message):
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "phases, message",
    [
        ([phase("a", lora={**LORA, "patterns": ("language_model/layer/**",)})], "lora.patterns matches no kernel of a"),
        ([phase("a", lora={**LORA, "patterns": ("**/embedding",)})], "'\\*\\*/embedding' of phases.0..lora.patterns"),
        ([phase("a", lora={**LORA, "patterns": ("**/head/**",)})], r"phases\[0\].lora.dropout is 0.1 and .* the head"),
        (
            [phase("a", trainable=("**",), lora=LORA)],
            r"phases\[0\].trainable trains in full and phases\[0\].lora adapts",
        ),
        ([phase("a", trainable=("**",), quantize=NF4)], r"12 more: .* phases\[0\].quantize.kind=nf4 keeps in few bits"),
        ([phase("a", quantize=NF4), phase("b")], r"phases\[1\] needs the float values of .* 12 more"),
        (
            [phase("a", quantize=NF4), phase("b", quantize={**NF4, "kind": "int8"})],
            r"keeps nf4 codes alone. Keep the same kernels quantised to nf4",
        ),
        (
            [phase("a", lora=LORA, quantize=NF4), phase("b", quantize=NF4)],
            r"phases\[0\] trains an adapter on kernels that are quantised to nf4.*phantom-jax merge",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(phases, message, data_dir, tmp_path):
    refused(config_for(data_dir, *phases), tmp_path, message)


def test_folders_that_a_run_cannot_begin_with(adapted, data_dir, tmp_path):
    _, source, _ = adapted
    base = f"{source}/models/tune.base"
    begin = {"name": "phantom-quickstart", "num_layers": 2, "mlp_dim": 32, "weights": base}
    refused(config_for(data_dir, phase("a"), **begin), tmp_path, r"num_layers is 1 in the folder and 2 in the config")
    refused(config_for(data_dir, phase("a"), weights=f"{source}/model"), tmp_path, "holds an adapter: merge it")
    refused(config_for(data_dir, phase("a"), weights=base, num_layers=1), tmp_path, "model.num_layers is set, but not")
    config = config_for(data_dir, phase("a"), weights=base)
    config.processor.template = "phi3"
    refused(config, tmp_path, "processor.template is 'phi3', and .* was trained with qwen2 or internlm2")
    pretrained.save(tiny.handle(), tmp_path / "other")
    with pytest.raises(InputError, match=f"the model has .*: the adapter is for {base}"):
        pretrained.load(tmp_path / "other", adapter=f"{source}/model")
    handle = pretrained.load(base, quantize="int8")
    pretrained.save(handle, tmp_path / "int8")
    refused(
        config_for(data_dir, phase("a"), weights=str(tmp_path / "int8")),
        tmp_path,
        "is quantised to int8: set it",
    )
