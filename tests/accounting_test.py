"""Counts against published numbers, and against what XLA counts in compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from phantom_jax import accounting
from phantom_jax.models import zoo
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.training.state import merge, split
from tests.models import small

LANGUAGE_MODEL = ("embeddings", "language_model", "head")


def counts(name, **overrides):
    return accounting.count_parameters(accounting.parameter_shapes(zoo.get_config(name, **overrides)))


@pytest.mark.parametrize(
    "name, billions, projector",
    [
        ("llava-7b", 6.738, 4.198),
        ("llava-13b", 13.016, 5.248),
        ("llava-33b", 32.529, 6.822),
        ("llava-65b", 65.286, 8.397),
        ("llava-70b", 68.977, 8.397),
    ],
)
def test_sizes_of_the_scaling_study(name, billions, projector):
    groups = counts(name)
    assert sum(groups[group] for group in LANGUAGE_MODEL) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert groups["projector"] / 1e6 == pytest.approx(projector, abs=5e-4)
    assert groups["phantom"] == 0


@pytest.mark.parametrize(
    "name, phantom, projector",
    [
        ("phantom-0.5b", 1.183, 4.48),
        ("phantom-1.8b", 4.725, 12.60),
        ("phantom-3.8b", 3.545, 22.03),
        ("phantom-7b", 6.300, 33.57),
    ],
)
def test_sizes_of_phantom(name, phantom, projector):
    groups = counts(name)
    assert groups["phantom"] / 1e6 == pytest.approx(phantom, abs=6e-4)
    assert groups["projector"] / 1e6 == pytest.approx(projector, abs=6e-3)
    assert groups["vision_tower"] / 1e6 == pytest.approx(304.01, abs=6e-3)


# Table 4: model, rank (0: full tuning), node-hours, trainable parameters in billions, dollars.
TABLE_4 = [
    ("llava-7b", 0, 1.3, "7", 17.7),
    ("llava-13b", 64, 2.1, "0.26", 28.6),
    ("llava-13b", 0, 2.3, "13", 31.3),
    ("llava-33b", 8, 4.62, "0.06", 63.0),
    ("llava-33b", 64, 4.68, "0.49", 63.8),
    ("llava-33b", 64, 4.79, "0.49", 65.3),
    ("llava-33b", 0, 5.80, "33", 79.1),
    ("llava-65b", 64, 9.17, "0.81", 125.0),
    ("llava-65b", 0, 13.50, "65", 184.0),
]


@pytest.mark.parametrize("name, rank, hours, trainable, dollars", TABLE_4)
def test_table_4_of_the_scaling_study(name, rank, hours, trainable, dollars):
    config = zoo.get_config(name, image_size=336)
    shapes = accounting.parameter_shapes(config)
    patterns = ("projector/**",) if rank else ("projector/**", "language_model/**")
    trained = sum(accounting.count_parameters(split(shapes, patterns)[0]).values())
    adapters = accounting.lora_parameters(config, rank)
    # The study rounds rank 8 without the projector's 0.007, and all others with it.
    total = adapters if rank == 8 else trained + adapters
    assert f"{total / 1e9:.{len(trainable.partition('.')[2])}f}" == trainable
    assert accounting.dollars(hours) == pytest.approx(dollars, abs=0.06)


def test_adapters_of_the_scaling_study():
    published = {
        ("llava-13b", 64): 250.35,
        ("llava-33b", 64): 487.59,
        ("llava-65b", 64): 799.54,
        ("llava-33b", 8): 60.9,
    }
    for (name, rank), millions in published.items():
        assert accounting.lora_parameters(zoo.get_config(name), rank) / 1e6 == pytest.approx(millions, abs=0.06)


def test_node_hours_and_dollars():
    assert accounting.node_hours(3600, 8) == 1.0
    assert accounting.node_hours(7200, 32) == 8.0
    assert accounting.dollars(2.0, epochs=3, price=10.0) == 60.0


def test_peaks_are_found_by_the_name_of_the_device():
    names = ("TPU v5 lite", "TPU v5", "TPU v5p", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    assert [accounting.peak_flops(name) / 1e12 for name in names] == [197, 459, 459, 989, 756, 312]
    assert accounting.peak_flops("cpu") is None and accounting.mfu(1e12, 1.0, 1, "cpu") is None
    assert accounting.mfu(989e12, 2.0, 4, "NVIDIA H200") == pytest.approx(1 / 8)


def test_bytes_by_kind():
    trainable = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    frozen = {"b": jax.ShapeDtypeStruct((4,), jnp.bfloat16), "c": jax.ShapeDtypeStruct((6,), jnp.int8)}
    counted = accounting.count_bytes(trainable, frozen, (trainable, trainable))
    assert counted == {"trainable": 60, "frozen": 14, "optimizer": 120, "gradients": 60}


# One layer each: XLA counts the body of a loop once. Wide, so that what is no product hardly counts.
TOWER = dataclasses.replace(small.TOWER, embed_dim=256, num_layers=1, num_heads=4, mlp_dim=512, image_size=32)
DECODER = dataclasses.replace(
    small.DECODER, vocab_size=512, embed_dim=256, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=512
)
CONFIG = dataclasses.replace(
    small.CONFIG,
    vision_tower=TOWER,
    projector=dataclasses.replace(small.CONFIG.projector, vision_dim=256, embed_dim=256),
    language_model=DECODER,
)
PLAIN = dataclasses.replace(CONFIG, language_model=dataclasses.replace(DECODER, phantom=None))
ROWS, LENGTH = 2, 192


def xla_flops(config, patterns):
    """What XLA counts in loss and gradients of a batch in which every token sees every other and has a target."""
    model = VisionLanguageModel(config)
    batch = {
        name: jnp.zeros((ROWS, LENGTH), jnp.int32) for name in ("token_ids", "positions", "image_slots", "targets")
    }
    batch["segment_ids"] = jnp.ones((ROWS, LENGTH), jnp.int32)
    batch["pixels"] = jnp.zeros((ROWS, 1, TOWER.image_size, TOWER.image_size, 3))
    shapes = accounting.parameter_shapes(config)
    trainable, frozen = split(shapes, patterns) if patterns else ({}, shapes)

    def loss(trainable, frozen):
        params = {"params": merge(trainable, frozen)}
        return model.apply(params, batch, rope_length=LENGTH, method="score").log_probs.sum()

    function = jax.grad(loss) if patterns else loss
    return trainable, jax.jit(function).lower(trainable, frozen).cost_analysis()["flops"]


@pytest.mark.parametrize("config", [PLAIN, CONFIG], ids=["plain", "phantom"])
@pytest.mark.parametrize(
    "patterns",
    [(), ("**",), ("projector/**",), ("language_model/**",), ("language_model/layers/**/kernel", "projector/**")],
    ids=["forward", "all", "projector", "language_model", "kernels"],
)
def test_flops_are_those_that_xla_counts(config, patterns):
    trainable, counted = xla_flops(config, patterns)
    work = accounting.Work(ROWS * LENGTH, ROWS * LENGTH**2, ROWS * LENGTH, ROWS)
    ours = accounting.step_flops(config, trainable)(work).total
    # XLA also counts what is no product: norms, activations, the softmax, the embeddings' sum of gradients; and scores
    # once more, which the backward pass computes again.
    assert 0.9 * counted < ours < 1.01 * counted


def test_flops_of_adapters_and_the_rules_of_thumb():
    """6N in full; 4N and 6 for each adapter parameter with frozen weights; the tower 2N a patch where it is frozen."""
    shapes = accounting.parameter_shapes(PLAIN)
    kernels = split(shapes, ("language_model/layers/**/kernel",))[0]
    size = accounting.count_parameters(kernels)["language_model"]
    head, work = DECODER.embed_dim * DECODER.vocab_size, accounting.Work(1, 0, 1, 0)
    assert accounting.step_flops(PLAIN, shapes)(work).total == 6 * (size + head)
    query = {
        "lora_a": jax.ShapeDtypeStruct((1, 256, 4), jnp.float32),
        "lora_b": jax.ShapeDtypeStruct((1, 4, 8, 64), jnp.float32),
    }
    adapter = {"language_model": {"layers": {"attention": {"query": query}}}}
    assert accounting.step_flops(PLAIN, adapter)(work).total == 4 * (size + head) + 6 * 4 * (256 + 512)
    image = accounting.Work(0, 0, 0, 1)
    tower = accounting.step_flops(PLAIN, adapter)(image).vision_tower
    assert accounting.step_flops(PLAIN, {})(image).vision_tower == tower
    assert accounting.step_flops(PLAIN, shapes)(image).vision_tower == 3 * tower
    # Only the head trains: nothing passes through the layers.
    only_head = accounting.step_flops(PLAIN, split(shapes, ("language_model/head/**",))[0])(work)
    assert only_head.language_model == 2 * size and only_head.head == 6 * head
