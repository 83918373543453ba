"""Two steps of every phase of one recipe of each family and method."""

import json

import jax
import numpy as np
import pytest

from phantom_jax.checkpoints import adapter_folder, model_folder
from phantom_jax.config import resolve
from phantom_jax.data import sources
from phantom_jax.errors import InputError
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.processor import CLIP_MEAN, IMAGENET_MEAN
from phantom_jax.recipes import llava, phantom
from phantom_jax.sharding.mesh import make_mesh
from phantom_jax.training.abstract import abstract_phase
from phantom_jax.training.loop import train
from phantom_jax.trees import flatten

NAME = "handwritten_numbers/tiny"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sources.prepare(NAME, folder)
    return folder


def smoke(family, size, arg, data_dir):
    config = family.recipe(size, f"smoke,{arg}")
    config.data.update(name=NAME, data_dir=str(data_dir))
    return config


def run(config, workdir):
    """Trains, and gives the names of the phases and the losses of their steps."""
    lines = []
    train(config, workdir, say=lines.append)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["train/loss"]) and record["train/skipped"] == 0 for record in records)
    return [(record["phase"], record["train/learning_rate"]) for record in records]


def read(folder):
    checkpoint, processor = model_folder.read(folder)
    return {path: np.asarray(leaf) for path, leaf in flatten(checkpoint.params).items()}, processor


def changed(before, after):
    """The paths of what two models differ in, each as its first component and its last but one."""
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


def trainable(config, index):
    return set(flatten(abstract_phase(resolve(config), index).state.trainable))


def test_phantom_in_full(data_dir, tmp_path):
    config = smoke(phantom, "0.5b", "method=full", data_dir)
    steps = run(config, tmp_path)
    assert [name for name, _ in steps] == ["step_1"] * 2 + ["step_2"] * 2
    # No warm-up: the first step has the whole learning rate.
    assert [rate for _, rate in steps] == pytest.approx([1e-5, 5.5e-6] * 2)
    before, _ = read(tmp_path / "models" / "step_1")
    after, processor = read(tmp_path / "model")
    assert (processor.mean, processor.image_mode, processor.max_tiles) == (IMAGENET_MEAN, "tiles", 6)
    assert trainable(config, 1) == set(after)
    assert all("/phantom/" in path or path.startswith("projector/") for path in trainable(config, 0))
    # Stored in bfloat16, a step of 1e-5 shows in small numbers alone.
    assert {path.split("/")[0] for path in changed(before, after)} == {"vision_tower", "projector", "language_model"}


def test_llava_in_full(data_dir, tmp_path):
    config = smoke(llava, "70b", "recipe=scaling,method=full", data_dir)
    steps = run(config, tmp_path)
    assert [name for name, _ in steps] == ["stage_1"] * 2 + ["stage_2"] * 2
    # One step of warm-up.
    assert [rate for _, rate in steps] == pytest.approx([0, 1e-4, 0, 2e-5])
    before, _ = read(tmp_path / "models" / "stage_1")
    after, processor = read(tmp_path / "model")
    assert (processor.mean, processor.image_mode, processor.max_tiles) == (CLIP_MEAN, "crop", 1)
    assert "[INST]" in processor.template.system
    assert before["language_model/layers/attention/key/kernel"].shape[-2] == 1, "70B groups its queries"
    assert {path.split("/")[0] for path in changed(before, after)} == {"projector", "language_model"}
    assert trainable(config, 0) == {"projector/linear_1/kernel", "projector/linear_1/bias"}
    assert trainable(config, 1) == {path for path in after if not path.startswith("vision_tower/")}


def test_a_phase_has_its_own_template_and_image_mode(data_dir):
    from phantom_jax.training.assembly import assemble

    config = smoke(llava, "7b", "recipe=v1_5", data_dir)
    rows = []
    for index in (0, 1):
        batch = next(assemble(resolve(config), make_mesh({})).train_iterator(index))
        text, image = batch["segment_ids"] > 0, batch["image_slots"] >= 0
        assert image.sum(axis=1).tolist() == [16] * 4, "one image of 4 x 4 patches in each row"
        rows.append((text & ~image).sum(axis=1).max())
    # `plain` is an image and its caption, `vicuna_v1` opens with a text and repeats the question.
    assert rows[0] < 12 and rows[1] > 60


@pytest.mark.parametrize("size, arg", [("7b", "method=lora,recipe=v1_5"), ("7b", "method=qlora")])
def test_llava_with_adapters(size, arg, data_dir, tmp_path):
    config = smoke(llava, size, arg, data_dir)
    names = trainable(config, 1)
    projector = {name for name in names if name.startswith("projector/")}
    factors = names - projector
    assert {name.rpartition("/")[2] for name in factors} == {"lora_a", "lora_b"}
    assert len(factors) == 2 * 7 and all(name.startswith("language_model/layers/") for name in factors)
    assert len(projector) == (4 if "v1_5" in arg else 2)
    quantized = [
        leaf
        for index in (0, 1)
        for leaf in flatten(abstract_phase(resolve(config), index).state.frozen).values()
        if isinstance(leaf, QuantizedTensor)
    ]
    assert len(quantized) == (2 * 7 if "qlora" in arg else 0) and all(leaf.kind == "nf4" for leaf in quantized)

    assert len(run(config, tmp_path)) == 4
    before, _ = read(tmp_path / "models" / "stage_1")
    adapter = adapter_folder.read(tmp_path / "model")
    assert adapter.base == str(tmp_path / "models" / "stage_1") and adapter.template == "vicuna_v1"
    assert len(adapter.low_rank) == 7
    for change in adapter.low_rank.values():
        assert change.ranks == (4, 4) and change.alphas == (8.0, 8.0)
        assert np.abs(np.asarray(change.b)).max() > 0
    others = {path.removeprefix("params/"): np.asarray(leaf) for path, leaf in adapter.others.items()}
    assert others.keys() == projector
    assert all(not np.array_equal(others[path], before[path]) for path in projector)


@pytest.mark.parametrize("size, arg", [("3.8b", "base=int8")])
def test_phantom_with_adapters_on_a_quantised_base(size, arg, data_dir, tmp_path):
    config = smoke(phantom, size, f"method=qlora,{arg}", data_dir)
    names = trainable(config, 1)
    factors = {name for name in names if name.endswith(("/lora_a", "/lora_b"))}
    assert {name.split("/")[0] for name in factors} == {"vision_tower", "language_model"}
    # Six linear maps in a layer of the tower, seven in one of the decoder.
    assert len(factors) == 2 * (6 + 7)
    assert names - factors == trainable(config, 0)
    frozen = flatten(abstract_phase(resolve(config), 1).state.frozen)
    codes = {path for path, leaf in frozen.items() if isinstance(leaf, QuantizedTensor)}
    assert len(codes) == 7 and all(path.startswith("language_model/layers/") for path in codes)

    assert len(run(config, tmp_path)) == 4
    adapter = adapter_folder.read(tmp_path / "model")
    assert len(adapter.low_rank) == 6 + 7 and adapter.template == "phi3"
    assert {alpha for change in adapter.low_rank.values() for alpha in change.alphas} == {4.0}
    assert {path.removeprefix("params/") for path in adapter.others} == names - factors


@pytest.mark.parametrize("family, name", [(phantom, "phantom_triples"), (llava, "llava_pretrain_558k")])
def test_training_on_published_data_says_what_can_be_opened(family, name, tmp_path):
    with pytest.raises(InputError, match=f"{name}', which cannot be opened.*handwritten_numbers"):
        train(family.recipe("7b", ""), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sources_are_one_data_set(data_dir, tmp_path):
    config = smoke(phantom, "0.5b", "", data_dir)
    config.phases[1].data.sources = {"handwritten_numbers": 1.0}
    with pytest.raises(InputError, match=r"phases\[1\].data.sources names 'handwritten_numbers' and data.name is"):
        train(config, tmp_path / "run")
    config.phases[1].data.sources, config.phases[0].data.template = {}, "vicuna"
    with pytest.raises(InputError, match=r"phases\[0\].data.template is 'vicuna'; it must be one of"):
        train(config, tmp_path / "run")


def test_a_smoke_variant_is_as_its_recipe_but_for_sizes(data_dir):
    del data_dir
    for family, arg in ((phantom, "method=qlora"), (llava, "method=lora")):
        full, small = (resolve(family.recipe("7b", variant)) for variant in (arg, f"{arg},smoke"))
        for large, tiny in zip(full["phases"], small["phases"], strict=True):
            for key in ("name", "trainable", "objective", "optimizer", "groups", "quantize"):
                assert large[key] == tiny[key]
            if large["lora"]["rank"]:
                scalings = [phase["lora"]["alpha"] / phase["lora"]["rank"] for phase in (large, tiny)]
                assert scalings[0] == scalings[1]
        assert jax.device_count() == 8 and set(small["mesh"].values()) == {"zero3", 1}, "a batch of 4 on one device"
