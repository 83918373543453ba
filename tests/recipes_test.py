"""The recipes against the papers' tables, and every variant traced."""

import importlib.util
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import pytest

from phantom_jax import config as configs
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.errors import InputError
from phantom_jax.recipes import llava, phantom
from phantom_jax.training.abstract import abstract_phase

PHANTOMS = {"phantom_0_5b": "0.5b", "phantom_1_8b": "1.8b", "phantom_3_8b": "3.8b", "phantom_7b": "7b"}
LLAVAS = {f"llava_{size}": size for size in llava.SIZES}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def resolved(family, size, arg=""):
    return configs.resolve(family.recipe(size, arg))


@pytest.fixture(scope="module")
def files(repository, tmp_path_factory):
    """The config files, copied away from the repository, as modules by name."""
    folder = tmp_path_factory.mktemp("copied")
    modules = {}
    for path in (repository / "configs").glob("*.py"):
        shutil.copy(path, folder)
        spec = importlib.util.spec_from_file_location(path.stem, folder / path.name)
        modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[path.stem])
    return modules


@pytest.mark.parametrize("name", [*PHANTOMS, *LLAVAS])
def test_each_size_has_a_file_that_can_be_copied(name, files):
    family, size = (phantom, PHANTOMS[name]) if name in PHANTOMS else (llava, LLAVAS[name])
    ours = configs.resolve(files[name].get_config("method=qlora"))
    assert ours == resolved(family, size, "method=qlora")
    assert ours["model"]["name"] == name.replace("_", "-", 1).replace("_", ".")
    # Every variant that the file speaks of exists.
    for line in files[name].__doc__.splitlines():
        variant, given, values = line.strip().partition(" ")[0].partition("=")
        if given and line.startswith("  "):
            for value in values.split("|"):
                method = ",method=qlora" if variant in ("base", "rank") else ""
                configs.resolve(files[name].get_config(f"{variant}={value}{method}"))


def test_phantom_trains_as_the_paper_says():
    for size, template in (("0.5b", "qwen2"), ("1.8b", "internlm2"), ("3.8b", "phi3"), ("7b", "internlm2")):
        run = resolved(phantom, size)
        assert run["model"]["dtype"] == "bfloat16" and run["model"]["remat"] == "full"
        assert run["processor"]["template"] == template and template in TEMPLATES
        assert (run["processor"]["tile_size"], run["processor"]["max_tiles"]) == (448, 6)
        assert [phase["name"] for phase in run["phases"]] == ["step_1", "step_2"]
        for phase in run["phases"]:
            assert (phase["batch_size"], phase["accumulation"]) == (128, 4)
            assert round(phase["steps"] / 1000, 1) == 15.9
            assert phase["steps"] - 1 < 2_040_186 / 128 <= phase["steps"]
            optimizer = phase["optimizer"]
            assert (optimizer["schedule"], optimizer["learning_rate"], optimizer["end_learning_rate"]) == (
                "cosine",
                1e-5,
                1e-6,
            )
            assert optimizer["eps"] <= 1e-12
            assert phase["lora"]["rank"] == 0 and phase["quantize"]["kind"] == "none"
        first, second = run["phases"]
        assert first["objective"] == {"name": "phantom_optimization", "beta": 2.0, "gamma": 0.5, "sft_weight": 1.0}
        assert second["objective"] == {"name": "sft"}
        assert second["trainable"] == ["**"]


@pytest.mark.parametrize("arg, base", [("", "int8"), (",base=int8", "int8"), (",base=nf4", "nf4")])
def test_phantom_qlora_is_the_published_one(arg, base):
    first, second = resolved(phantom, "7b", "method=qlora" + arg)["phases"]
    assert second["lora"] == {
        "rank": 256,
        "alpha": 256.0,
        "dropout": 0.0,
        "patterns": ["vision_tower/layers/**", "language_model/layers/**"],
    }
    # One base in both steps: what the first one quantises has no float values for the second.
    assert first["quantize"] == second["quantize"]
    assert first["quantize"]["kind"] == base
    assert first["lora"]["rank"] == 0


@pytest.mark.parametrize(
    "objective, name", [("po", "phantom_optimization"), ("sft", "sft"), ("simpo", "simpo"), ("orpo", "orpo")]
)
def test_only_the_first_step_of_phantom_has_another_objective(objective, name):
    first, second = resolved(phantom, "0.5b", f"objective={objective}")["phases"]
    assert (first["objective"]["name"], second["objective"]["name"]) == (name, "sft")


# size, variants -> stage 1 (batch, steps, rate, schedule), stage 2 (batch, steps, rate), rank, alpha, strategy
TABLE = {
    ("33b", "method=full"): ((128, 4361, 1e-4, "linear"), (512, 157, 2e-5), 0, None, "zero3"),
    ("65b", "method=full"): ((128, 4361, 1e-4, "linear"), (512, 157, 2e-5), 0, None, "zero3"),
    ("65b", "mix=true"): ((128, 4361, 1e-4, "linear"), (512, 235, 2e-5), 0, None, "zero3"),
    ("70b", ""): ((128, 4361, 1e-4, "linear"), (512, 235, 2e-5), 0, None, "zero3"),
    ("70b", "mix=false"): ((128, 4361, 1e-4, "linear"), (512, 157, 2e-5), 0, None, "zero3"),
    ("33b", "method=lora,rank=8"): ((128, 4361, 1e-4, "linear"), (64, 1250, 1e-4), 8, 16.0, "zero3"),
    ("33b", "method=lora"): ((128, 4361, 1e-4, "linear"), (64, 1250, 1e-4), 64, 128.0, "zero3"),
    ("33b", "method=qlora,rank=64"): ((128, 4361, 1e-4, "linear"), (64, 1250, 1e-4), 64, 128.0, "zero2"),
    ("13b", "method=lora,rank=64"): ((128, 4361, 2e-3, "cosine"), (64, 1250, 1e-4), 64, 128.0, "zero3"),
    ("7b", ""): ((128, 4361, 2e-3, "cosine"), (512, 157, 2e-5), 0, None, "zero3"),
    ("7b", "recipe=lightning"): ((128, 4361, 2e-3, "cosine"), (128, 625, 2e-5), 0, None, "zero3"),
    ("13b", "recipe=lightning,method=lora"): ((128, 4361, 2e-3, "cosine"), (128, 625, 2e-5), 64, 16.0, "zero2"),
    ("13b", "recipe=lightning,method=qlora"): ((128, 4361, 2e-3, "cosine"), (128, 625, 2e-5), 64, 16.0, "zero2"),
    ("33b", "method=lora,rank=512"): ((128, 4361, 1e-4, "linear"), (64, 1250, 1e-4), 512, 1024.0, "zero3"),
    ("7b", "recipe=v1_5"): ((256, 2181, 1e-3, "cosine"), (128, 5198, 2e-5), 0, None, "zero3"),
    ("13b", "recipe=v1_5,method=lora"): ((256, 2181, 1e-3, "cosine"), (128, 5198, 2e-4), 128, 256.0, "zero3"),
}


@pytest.mark.parametrize("size, arg", TABLE, ids=[f"{size}:{arg}" for size, arg in TABLE])
def test_llava_trains_as_its_tables_say(size, arg):
    stage_1, stage_2, rank, alpha, strategy = TABLE[size, arg]
    run = resolved(llava, size, arg)
    first, second = run["phases"]
    optimizer = first["optimizer"]
    assert (first["batch_size"], first["steps"], optimizer["learning_rate"], optimizer["schedule"]) == stage_1
    assert first["trainable"] == ["projector/**"]
    optimizer = second["optimizer"]
    assert (second["batch_size"], second["steps"], optimizer["learning_rate"]) == stage_2
    assert optimizer["schedule"] == "cosine"
    for phase in (first, second):
        optimizer = phase["optimizer"]
        assert (optimizer["warmup_fraction"], optimizer["weight_decay"], optimizer["clip_norm"]) == (0.03, 0.0, 0.0)
        assert (optimizer["b1"], optimizer["b2"], optimizer["eps"]) == (0.9, 0.999, 1e-8)
        assert optimizer["end_learning_rate"] == 0.0
        assert phase["objective"] == {"name": "sft"}
    assert second["lora"]["rank"] == rank and first["lora"]["rank"] == 0
    if rank:
        assert (second["lora"]["alpha"], second["lora"]["dropout"]) == (alpha, 0.05)
        assert second["lora"]["patterns"] == ["language_model/layers/**"]
        assert second["trainable"] == ["projector/**"]
    else:
        assert second["trainable"] == ["projector/**", "language_model/**"]
    assert (second["quantize"]["kind"] == "nf4") == ("qlora" in arg)
    assert run["mesh"] == {"strategy": strategy, "data": 1, "fsdp": -1, "tensor": 1, "seq": 1}
    assert run["processor"]["max_length"] == 2048
    assert (first["data"]["template"], second["data"]["template"]) == ("plain", "")
    assert run["processor"]["template"] == ("llava_llama_2" if size == "70b" else "vicuna_v1")


def test_llava_data_images_and_projector():
    mixed = resolved(llava, "65b", "mix=true")
    assert mixed["phases"][0]["data"]["sources"] == {"llava_pretrain_558k": 1.0}
    assert mixed["phases"][1]["data"]["sources"] == pytest.approx({"llava_instruct_80k": 2 / 3, "sharegpt": 1 / 3})
    assert resolved(llava, "65b")["phases"][1]["data"]["sources"] == {"llava_instruct_80k": 1.0}
    for arg, image, projector, modes in (
        ("", 336, "linear", ["crop", "crop"]),
        ("image=224", 224, "linear", ["crop", "crop"]),
        ("recipe=lightning", 224, "linear", ["crop", "crop"]),
        ("recipe=v1_5", 336, "mlp2x_gelu", ["crop", "pad"]),
    ):
        run = resolved(llava, "7b", arg)
        assert (run["model"]["image_size"], run["processor"]["tile_size"], run["processor"]["max_tiles"]) == (
            image,
            image,
            1,
        )
        assert run["model"]["projector"] == projector
        assert [phase["data"]["image_mode"] for phase in run["phases"]] == modes
    lora = resolved(llava, "13b", "recipe=v1_5,method=lora")["phases"][1]
    assert lora["groups"] == [{"patterns": ["projector/**"], "learning_rate": 2e-5}]
    assert resolved(llava, "7b", "recipe=v1_5")["phases"][1]["data"]["sources"] == {"llava_v1_5_mix665k": 1.0}


@pytest.mark.parametrize(
    "family, size, arg, message",
    [
        (llava, "7b", "recipe=scalling", r"recipe=scalling does not exist. Did you mean recipe=scaling\?"),
        (llava, "7b", "method=qlor", r"method=qlor does not exist. Did you mean method=qlora\?"),
        (llava, "7b", "image=448", r"image=448 does not exist.* There are: 224, 336"),
        (llava, "65b", "recipe=v1_5", "recipe=v1_5 does not exist for 65b: it was published for 7b and 13b.*scaling"),
        (llava, "7b", "recipe=v1_5,method=qlora", "does not exist. The nearest is recipe=v1_5,method=lora"),
        (llava, "7b", "recipe=v1_5,image=224", "does not exist: take image=336"),
        (llava, "7b", "recipe=lightning,mix=true", "mixing is of recipe=scaling"),
        (llava, "7b", "rank=8", "rank=8 is of an adapter, and the method is full"),
        (llava, "7b", "method=lora,rank=-1", "rank=-1 does not exist"),
        (llava, "7b", "method=lora,rank=0", "rank=0 does not exist"),
        (llava, "7b", "method=full,rank=0", "rank=0 is of an adapter, and the method is full"),
        (llava, "7b", "ranks=8", r"Variant ranks does not exist. Did you mean 'rank'\?"),
        (phantom, "7b", "method=qlora,base=int4", r"base=int4 does not exist. Did you mean base=int8\?"),
        (phantom, "7b", "base=nf4", "base=nf4 is of method=qlora, and the method is full"),
        (phantom, "7b", "objective=dpo", "objective=dpo does not exist.* There are: po, sft, simpo, orpo"),
        (phantom, "7b", "rank=8", "Variant rank does not exist"),
    ],
)
def test_a_variant_that_does_not_exist_is_named_with_the_nearest(family, size, arg, message):
    with pytest.raises(InputError, match=message) as error:
        family.recipe(size, arg)
    assert "\n" not in str(error.value)


def phantom_variants(size):
    yield from (f"method={method}" for method in ("full", "lora"))
    yield from (f"method=qlora,base={base}" for base in phantom.BASES)
    if size == "0.5b":
        # An objective sees log-probabilities, and nothing of the size.
        yield from (f"objective={objective}" for objective in phantom.OBJECTIVES)


def llava_variants(size):
    for name, recipe in llava.RECIPES.items():
        if size in recipe.sizes:
            for method, image in itertools.product(recipe.methods, recipe.images):
                yield f"recipe={name},method={method},image={image}"
                if name == "scaling":
                    yield f"method={method},image={image},mix={size != '70b'}"
    yield from (f"method={method},rank={rank}" for method, rank in (("lora", 8), ("lora", 512), ("qlora", 8)))


VARIANTS = [
    *[(phantom, size, list(phantom_variants(size))) for size in phantom.SIZES],
    *[(llava, size, list(llava_variants(size))) for size in llava.SIZES],
]


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def same_program(run, index):
    """What a phase's trace depends on: not names, rates or lengths."""
    phase = {key: value for key, value in run["phases"][index].items() if key not in ("name", "steps", "data")}
    phase["optimizer"] = {key: bool(value) for key, value in phase["optimizer"].items()}
    phase["lora"] = {**phase["lora"], "alpha": 1.0}
    # A program's shape in rows is that of its batch.
    phase["batch_size"] = 0
    model = {key: value for key, value in run["model"].items() if key != "weights"}
    return json.dumps([model, run["processor"]["max_length"], run["processor"]["max_tiles"], phase, run["mesh"]])


@pytest.mark.parametrize("family, size, args", VARIANTS, ids=[f"{size}" for _, size, _ in VARIANTS])
def test_every_variant_is_traced(family, size, args):
    seen = set()
    for arg, index in itertools.product(args, (0, 1)):
        run = resolved(family, size, arg)
        program = same_program(run, index)
        if program in seen:
            continue
        seen.add(program)
        phase = run["phases"][index]
        abstract = abstract_phase(run, index)
        rows, length = abstract.batch["token_ids"].shape
        assert (rows, length) == (phase["batch_size"], run["processor"]["max_length"])
        assert abstract.batch["pixels"].shape[:2] == (rows, 7 if family is phantom else 1)
        state, metrics = abstract.trace().out_info
        assert shapes(state) == shapes(abstract.state)
        assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy"} <= metrics.keys()
        assert {leaf.dtype for leaf in jax.tree.leaves(abstract.state.trainable)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "family, size, step_1, step_2",
    [
        # Projector and phantom dimension, then everything: 4.48 M + 1.183 M and 939.3 M for instance.
        (phantom, "0.5b", 4.48 + 1.183, 939.3),
        (phantom, "1.8b", 12.60 + 4.725, 2210.5),
        (phantom, "3.8b", 22.03 + 3.545, 4150.4),
        (phantom, "7b", 33.57 + 6.300, 8081.7),
        (llava, "7b", 4.198, 6738 + 4.198),
        (llava, "13b", 5.248, 13_016 + 5.248),
        (llava, "33b", 6.822, 32_529 + 6.822),
        (llava, "65b", 8.397, 65_286 + 8.397),
        (llava, "70b", 8.397, 68_977 + 8.397),
    ],
)
def test_how_many_parameters_train(family, size, step_1, step_2):
    run = resolved(family, size)
    for index, millions in ((0, step_1), (1, step_2)):
        assert count(abstract_phase(run, index).state.trainable) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(
    "size, arg, billions, with_projector",
    [
        # Table 4 of the scaling study has 0.26, 0.06, 0.49, 0.49 and 0.81. They are with the projector, but for 0.06.
        ("13b", "method=lora", 0.26, 0.2556),
        ("33b", "method=lora,rank=8", 0.06, 0.0678),
        ("33b", "method=lora", 0.49, 0.4944),
        ("33b", "method=qlora", 0.49, 0.4944),
        ("65b", "method=lora", 0.81, 0.8079),
    ],
)
def test_how_many_parameters_adapters_have(size, arg, billions, with_projector):
    tree = abstract_phase(resolved(llava, size, arg), 1).state.trainable
    everything, projector = count(tree) / 1e9, count(tree["projector"]) / 1e9
    assert everything == pytest.approx(with_projector, abs=5e-5)
    assert billions in (round(everything, 2), round(everything - projector, 2))
