"""Whole runs on meshes: the same as on one device, and continued to the bit; meshes that cannot be."""

import dataclasses

import jax
import numpy as np
import pytest

from phantom_jax import axes, config
from phantom_jax.data import sources
from phantom_jax.errors import InputError
from phantom_jax.sharding.mesh import make_mesh, training_mesh
from phantom_jax.training.loop import train
from phantom_jax.training.places import Places, check_mesh
from tests.training.loop_test import records
from tests.training.task_test import config_for
from tests.training.toy import ToyIterator, make_task, toy_config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sources.prepare("handwritten_numbers/tiny", folder)
    return folder


def small_run(data_dir, **mesh):
    settings = config_for(data_dir)
    settings.phases = settings.phases[:1]
    settings.phases[0].update(trainable=("**",), batch_size=8, steps=2)
    # Large: where a gradient is small, a step of Adam's is the sign of its rounding.
    settings.phases[0].optimizer.eps = 1e-2
    settings.validation.every = 2
    settings.mesh.update(mesh)
    return settings


def test_a_run_on_a_mesh_is_that_of_one_device(data_dir, tmp_path):
    lines = []
    expected = train(small_run(data_dir), tmp_path / "one", say=lambda line: None)
    mesh = {"data": -1, "fsdp": 2, "tensor": 2, "seq": 2, "strategy": "zero3_tensor"}
    actual = train(small_run(data_dir, **mesh), tmp_path / "eight", say=lines.append)
    assert not any(line.startswith("the mesh is 1 of") for line in lines)
    kernel = actual["language_model"]["layers"]["gate"]["kernel"]
    assert kernel.sharding.mesh.shape == {"data": 1, "fsdp": 2, "tensor": 2, "seq": 2}
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    for mine, theirs in zip(records(tmp_path / "eight"), records(tmp_path / "one"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if name != "phase":
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


NAMES = {
    "embed/table": (axes.VOCAB, axes.EMBED),
    "hidden/kernel": (axes.EMBED, axes.MLP),
    "head/kernel": (axes.EMBED, axes.VOCAB),
}


class Crashing(ToyIterator):
    def __next__(self):
        if (self.phase, self.position) == (1, 2):
            raise RuntimeError("crash")
        return super().__next__()


def toy_run(workdir, iterator=ToyIterator):
    settings = toy_config(steps=(4, 4))
    settings.mesh.update(data=4, fsdp=2)
    settings.phases[0].accumulation = 1
    task = dataclasses.replace(make_task(iterator=iterator), parameter_names=NAMES)
    return train(settings, workdir, task=task, say=lambda line: None)


def test_a_run_goes_on_to_the_bit_on_the_same_mesh(tmp_path):
    expected = toy_run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        toy_run(tmp_path / "cut", Crashing)
    actual = toy_run(tmp_path / "cut")
    table = actual["embed"]["table"]
    assert table.addressable_shards[0].data.shape == (11, 3)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail("placed elsewhere"), actual, expected)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def sizes(**given):
    return {"data": 1, "fsdp": 1, "tensor": 1, "seq": 1} | given


def test_a_mesh_takes_all_devices_or_one():
    lines = []
    assert training_mesh(sizes(fsdp=-1, tensor=2), lines.append).shape == sizes(fsdp=4, tensor=2)
    assert training_mesh(sizes(data=2, fsdp=4), lines.append).size == 8 and not lines
    assert training_mesh(sizes(), lines.append).size == 1
    assert lines == ["the mesh is 1 of 8 devices: set mesh.fsdp to -1 to train on all of them"]
    with pytest.raises(InputError, match="data=2, fsdp=2, tensor=1, seq=1, which takes 4 devices, and there are 8"):
        training_mesh(sizes(data=2, fsdp=2), print)
    with pytest.raises(InputError, match="its other axes take 3 devices, which does not divide the 8 that there are"):
        training_mesh(sizes(data=-1, tensor=3), print)
    assert any("mesh.data and mesh.fsdp are both -1" in line for line in config.validate(_meshed(data=-1, fsdp=-1)))


def _meshed(rows=8, accumulation=1, validation=8, length=2048, **mesh):
    settings = toy_config()
    settings.mesh.update(mesh)
    settings.validation.batch_size = validation
    settings.processor.max_length = length
    for phase in settings.phases:
        phase.update(batch_size=rows, accumulation=accumulation)
    return settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            _meshed(rows=16, accumulation=4, data=2, fsdp=4),
            r"phases\[0\].batch_size / accumulation is 16 / 4, 4 rows, which mesh.data x mesh.fsdp, 2 x 4, .*set"
            " accumulation to 2, which takes more memory and changes no result",
        ),
        (
            _meshed(rows=20, accumulation=2, data=2, fsdp=4),
            "is 20 / 2, 10 rows, which .* set batch_size to a multiple of 16, 32 for instance",
        ),
        (_meshed(validation=20, fsdp=8), "validation.batch_size is 20, .* multiple of 8, 24 for instance"),
        (_meshed(length=31, data=4, seq=2), "processor.max_length is 31, which mesh.seq, 2, .* set it to 32"),
        (
            _meshed(fsdp=4, tensor=2),
            "mesh.tensor is 2, but mesh.strategy 'zero3' splits no parameter over it: set mesh.tensor to 1, or"
            " mesh.strategy to 'tensor' or 'zero3_tensor' or 'zero2_tensor'",
        ),
        (
            _meshed(fsdp=4, tensor=2, strategy="tensor"),
            "mesh.fsdp is 4, but mesh.strategy 'tensor' splits no .* mesh.strategy to 'zero3_tensor' or 'zero2_tensor'",
        ),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused_at_once(settings, message, tmp_path):
    resolved = config.resolve(settings)
    with pytest.raises(InputError, match=message):
        check_mesh(resolved, make_mesh({axis: resolved["mesh"][axis] for axis in sizes()}))
    with pytest.raises(InputError, match=message):
        train(settings, tmp_path / "run", task=make_task(), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_what_tensor_leaves_whole_is_said():
    names = {"embedding": (axes.VOCAB, axes.EMBED), "up/kernel": (axes.EMBED, axes.MLP), "scale": (axes.NORM,)}
    params = {"embedding": np.zeros((31, 4)), "up": {"kernel": np.zeros((4, 8))}, "scale": np.zeros(4)}
    [line] = Places(make_mesh({"tensor": 2}), "tensor", names).remarks(params)
    assert line == (
        "124 parameters are computed whole on each of the 2 devices of mesh.tensor, which does not divide their widths:"
        " embedding"
    )
    params["embedding"] = np.zeros((32, 4))
    assert not list(Places(make_mesh({"tensor": 2}), "tensor", names).remarks(params))
    assert not list(Places(make_mesh({"fsdp": 2}), "zero3", names).remarks(params))


def test_one_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="train runs in one process and this is one of 2: start one, which uses all"):
        train(toy_config(), tmp_path / "run", task=make_task())
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_could_not_split_the_model_is_refused():
    params = {"layers": {"query": {"kernel": np.zeros((3, 6, 6, 4))}}}
    names = {"layers/query/kernel": (axes.LAYERS, axes.EMBED, axes.HEADS, axes.HEAD_DIM)}
    with pytest.raises(InputError, match="mesh.tensor is 4, which does not divide the 6 heads of layers/query/kernel"):
        Places(make_mesh({"tensor": 4}), "tensor", names).check(params)
    with pytest.raises(InputError, match="mesh.fsdp is 8, which divides no axis of any parameter"):
        Places(make_mesh({"fsdp": 8}), "zero3", names).check(params)
    Places(make_mesh({"fsdp": 2, "tensor": 3}), "zero3_tensor", names).check(params)
