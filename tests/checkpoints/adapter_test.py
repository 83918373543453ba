"""Adapters against the definition, W + s B A in the published layout, and through every format and back."""

import dataclasses
import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phantom_jax.checkpoints import adapter_folder, hf
from phantom_jax.checkpoints.adapter import Adapter, LowRank, merge
from phantom_jax.errors import InputError
from phantom_jax.ops.quantize import quantize
from phantom_jax.trees import flatten
from tests.checkpoints import peft_folder

FAMILIES = ["llava-hf", "llava-original", "phantom-0.5b", "phantom-1.8b", "phantom-3.8b"]


def naming(family):
    return peft_folder.in_memory if family == "llava-hf" else lambda name: name


def written(checkpoint):
    """The published tensors of a checkpoint."""
    return {
        tensor.name: np.concatenate([block() for block in tensor.blocks()]).reshape(tensor.shape)
        for tensor in hf.published_tensors(checkpoint)
    }


def merged_as(base, pairs, scale):
    """The published weights with the adapter worked in, by the definition."""
    tensors = peft_folder.weights(base)
    for module, (a, b) in pairs.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + scale(module) * (b @ a)
    return tensors


def assert_merged(base, adapter, pairs, scale=lambda module: 2.0, whole=None):
    ours = written(merge(hf.load(base), adapter))
    expected = merged_as(base, pairs, scale) | (whole or {})
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        if name.removesuffix(".weight") in pairs:
            np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-4, err_msg=name)
        else:
            assert ours[name].tobytes() == tensor.tobytes(), name


def assert_same_files(left, right):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


def write(adapter, folder, form="peft"):
    folder.mkdir()
    adapter_folder.write(adapter, folder, format=form)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_map_of_every_family(golden, family, tmp_path):
    base, checkpoint = golden / family, hf.load(golden / family)
    pairs = peft_folder.factors(base, tower=True)
    source = peft_folder.write(tmp_path / "peft", pairs, rename=naming(family))
    adapter = adapter_folder.read(source, checkpoint.description)
    rest = set(checkpoint.flat()) - set(adapter.low_rank)
    # What is no linear map: norms, biases, embeddings and the patches' convolution.
    assert not [path for path in rest if path.split("/")[-1] == "kernel"]
    assert adapter.size == sum(a.size + b.size for a, b in pairs.values()) + packed_again(pairs)
    assert_merged(base, adapter, pairs)

    assert_same_files(write(adapter, tmp_path / "again"), source)
    through_ours = adapter_folder.read(write(adapter, tmp_path / "ours", "ours"))
    assert through_ours == dataclasses.replace(adapter, low_rank=through_ours.low_rank)
    assert_same_files(write(through_ours, tmp_path / "back"), source)
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert settings[0].items() <= settings[1].items()


def packed_again(pairs):
    """Numbers of A that each kernel of a packed map has for itself."""
    times = {"qkv": 2, "qkv_proj": 2, "wqkv": 2, "gate_up_proj": 1}
    return sum(a.size * times.get(module.rpartition(".")[2], 0) for module, (a, _) in pairs.items())


LLAVA_NAMES = {
    "in memory": peft_folder.in_memory,
    "on disk": lambda name: name,
    "original": lambda name: name.replace("language_model.", "").replace("multi_modal_projector.linear_", "skipped"),
}


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("rename", LLAVA_NAMES.values(), ids=LLAVA_NAMES.keys())
def test_names_of_all_versions(golden, rename, infix, tmp_path):
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: "projector" not in module)
    source = peft_folder.write(tmp_path / "peft", pairs, rename=rename, infix=infix)
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert_merged(base, adapter, pairs)
    names = load_file(write(adapter, tmp_path / "again") / "adapter_model.safetensors")
    # Names of another layout than the model's would find no place in it.
    rename = peft_folder.in_memory if rename is LLAVA_NAMES["original"] else rename
    assert set(names) == {f"base_model.model.{rename(m)}.lora_{f}.weight" for m in pairs for f in "AB"}


def test_an_adapter_of_the_decoder_alone(golden, tmp_path):
    base = golden / "phantom-0.5b"
    pairs = peft_folder.factors(base, lambda module: module.endswith(("q_proj", "down_proj")))
    source = peft_folder.write(tmp_path / "peft", pairs, rename=lambda name: name.removeprefix("language_model."))
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert_merged(base, adapter, pairs)
    assert_same_files(write(adapter, tmp_path / "again"), source)


def test_a_folder_of_llava(golden, tmp_path):
    """Factors and the projector in files of their own, and a description of the model."""
    base = golden / "llava-original"
    pairs = peft_folder.factors(base, lambda module: "layers" in module)
    projector = {f"model.mm_projector.{name}": np.float32(1) + weight for name, weight in projector_of(base).items()}
    source = peft_folder.write(tmp_path / "peft", pairs)
    save_file({peft_folder.PREFIX + n: t for n, t in projector.items()}, source / "non_lora_trainables.safetensors")
    for name in ("config.json", "vision_config.json"):
        (source / name).write_text((base / name).read_text())

    adapter = adapter_folder.read(source)
    assert set(adapter.others) == {"params/projector/linear_1/kernel", "params/projector/linear_1/bias"}
    assert_merged(base, adapter, pairs, whole=projector)
    target = write(adapter, tmp_path / "again")
    assert_same_files(target, source)
    for name, tensor in load_file(target / "non_lora_trainables.safetensors").items():
        assert tensor.tobytes() == projector[name.removeprefix(peft_folder.PREFIX)].tobytes()
    # It describes itself again; and for the same model under other names PEFT keeps the projector beside the factors.
    assert_merged(base, adapter_folder.read(target), pairs, whole=projector)


def projector_of(base):
    tensors = peft_folder.weights(base)
    return {name: tensors[f"model.mm_projector.{name}"] for name in ("weight", "bias")}


def test_an_intermediate_folder_needs_the_model(golden, tmp_path):
    pairs = peft_folder.factors(golden / "llava-original", lambda module: "layers" in module)
    source = peft_folder.write(tmp_path / "checkpoint-10", pairs)
    with pytest.raises(InputError, match="give --base, the model that it was trained on, some/base"):
        adapter_folder.read(source)
    assert not adapter_folder.read(source, hf.read_config(golden / "llava-original")).others


def test_whole_modules_beside_the_factors(golden, tmp_path):
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: "layers" in module)
    chosen = re.compile(r"multi_modal_projector.*|.*embed_tokens.*|.*lm_head.*|.*input_layernorm.*")
    whole = {name: tensor * 2 for name, tensor in peft_folder.weights(base).items() if chosen.fullmatch(name)}
    modules = ["multi_modal_projector", "embed_tokens", "lm_head", "input_layernorm"]
    source = peft_folder.write(
        tmp_path / "peft", pairs, rename=peft_folder.in_memory, others=whole, modules_to_save=modules
    )
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert_merged(base, adapter, pairs, whole=whole)
    target = write(adapter, tmp_path / "again")
    assert_same_files(target, source)
    assert json.loads((target / "adapter_config.json").read_text())["modules_to_save"] == modules
    fresh = write(dataclasses.replace(adapter, naming=None, settings={}), tmp_path / "fresh")
    assert_same_files(fresh, source)
    assert json.loads((fresh / "adapter_config.json").read_text())["modules_to_save"] == [
        "lm_head",
        "model.language_model.embed_tokens",
        *(f"model.language_model.layers.{layer}.input_layernorm" for layer in range(3)),
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]


def test_a_head_that_comes_with_its_factors(golden, tmp_path):
    """PEFT puts the weight of an adapted head beside them."""
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: module.endswith("lm_head"))
    head = peft_folder.weights(base)["language_model.lm_head.weight"] * 2
    extra = {"base_model.model.lm_head.base_layer.weight": head}
    source = peft_folder.write(tmp_path / "peft", pairs, rename=peft_folder.in_memory, extra=extra)
    adapter = adapter_folder.read(source, hf.read_config(base))
    ours = written(merge(hf.load(base), adapter))["language_model.lm_head.weight"]
    ((a, b),) = pairs.values()
    np.testing.assert_allclose(ours, head + 2 * (b @ a), rtol=0, atol=1e-4)
    target = write(adapter, tmp_path / "again")
    assert_same_files(target, source)
    assert not json.loads((target / "adapter_config.json").read_text())["modules_to_save"]


def test_ranks_and_alphas_by_pattern_and_missing_layers(golden, tmp_path):
    base = golden / "phantom-3.8b"

    def rank(module):
        return {"o_proj": 2}.get(module.rpartition(".")[2], 6 if ".layers.1.mlp" in module else 4)

    def alpha(module):
        return 3.0 if module.endswith("o_proj") else 8.0

    pairs = peft_folder.factors(base, lambda module: re.search(r"layers\.[12].*_proj", module), rank)
    settings = {
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "layers_to_transform": [1, 2],
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
    }
    source = peft_folder.write(tmp_path / "peft", pairs, **settings)
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert adapter.low_rank["params/language_model/layers/down/kernel"].ranks == (0, 6, 4)
    assert_merged(base, adapter, pairs, lambda module: alpha(module) / np.sqrt(rank(module)))
    target = write(adapter, tmp_path / "again")
    assert_same_files(target, source)
    content = json.loads((target / "adapter_config.json").read_text())
    assert settings.items() <= content.items()
    # Without the settings that it came with, others are found that mean the same.
    fresh = write(dataclasses.replace(adapter, naming=None, settings={}), tmp_path / "fresh")
    assert_same_files(fresh, source)
    again = adapter_folder.read(fresh, hf.read_config(base))
    assert_merged(base, again, pairs, lambda module: alpha(module) / np.sqrt(rank(module)))
    assert again.low_rank["params/language_model/layers/down/kernel"].alphas[1:] == (8, 8)


def trained(checkpoint, ranks, rank_stabilized=False):
    """An adapter as training gives it: each kernel has factors of its own."""
    rng, shapes, low_rank = np.random.default_rng(0), hf.shapes(checkpoint.config), {}
    for name, rank in ranks.items():
        path = f"params/language_model/layers/{name}/kernel"
        layers, *axes = shapes[path]
        inputs = 2 if name == "attention/out" else 1
        a = jnp.asarray(rng.normal(size=(layers, *axes[:inputs], rank)), jnp.float32)
        b = jnp.asarray(rng.normal(size=(layers, rank, *axes[inputs:])), jnp.float32)
        low_rank[path] = LowRank(a, b, (rank,) * layers, (2.0 * rank,) * layers)
    return Adapter(
        checkpoint.config, checkpoint.published, checkpoint.tokens, low_rank, rank_stabilized=rank_stabilized
    )


@pytest.mark.parametrize(
    "ranks",
    [
        {"attention/query": 4, "attention/key": 4, "attention/value": 4, "gate": 4, "up": 4, "attention/out": 4},
        {"attention/query": 4, "attention/value": 2, "up": 3, "down": 4},
    ],
    ids=["all", "some"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_here_is_packed_for_peft(golden, family, ranks, tmp_path):
    checkpoint = hf.load(golden / family)
    adapter = trained(checkpoint, ranks)
    expected = written(merge(checkpoint, adapter))
    folder = write(adapter, tmp_path / "peft")
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    undo = {naming(family)(module): module for module in peft_folder.linears(golden / family)}
    pairs = {}
    for name in tensors:
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", name)
        if match:
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            rank = settings["rank_pattern"].get(match[1].rpartition(".")[2], settings["r"])
            alpha = settings["alpha_pattern"].get(match[1].rpartition(".")[2], settings["lora_alpha"])
            # Tools that know no patterns scale all by the one alpha / r.
            assert a.shape[0] == rank and alpha / rank == settings["lora_alpha"] / settings["r"] == 2
            pairs[undo[match[1]]] = (a, b)
    for name, tensor in merged_as(golden / family, pairs, lambda module: 2.0).items():
        np.testing.assert_allclose(expected[name], tensor, rtol=0, atol=1e-4, err_msg=name)
    again = written(merge(checkpoint, adapter_folder.read(folder, checkpoint.description)))
    for name, tensor in expected.items():
        np.testing.assert_allclose(again[name], tensor, rtol=0, atol=1e-4, err_msg=name)


def test_packed_kernels_have_one_scale(golden, tmp_path):
    checkpoint = hf.load(golden / "phantom-1.8b")
    adapter = trained(checkpoint, {"attention/query": 4, "attention/key": 2}, rank_stabilized=True)
    with pytest.raises(InputError, match="layers.0.attention.wqkv packs low-rank changes with the scales"):
        write(adapter, tmp_path / "peft")


def test_peft_keeps_whole_modules(golden, tmp_path):
    checkpoint = hf.load(golden / "llava-hf")
    kernel = {"params/projector/linear_1/kernel": checkpoint.params["projector"]["linear_1"]["kernel"]}
    adapter = dataclasses.replace(trained(checkpoint, {"up": 2}), others=kernel)
    with pytest.raises(InputError, match=r"linear_1.bias would have to be trained in full too"):
        write(adapter, tmp_path / "peft")
    write(adapter, tmp_path / "ours", "ours")
    with pytest.raises(InputError, match="whole parameters alone"):
        write(dataclasses.replace(adapter, low_rank={}), tmp_path / "none")


def test_ours_for_the_same_model_in_another_layout(golden, tmp_path):
    """The decoder is the same under both layouts of LLaVA, and the names are those of the model that is given."""
    original, other = hf.load(golden / "llava-original"), hf.load(golden / "llava-hf")
    folder = write(trained(original, {"up": 2}), tmp_path / "ours", "ours")
    assert adapter_folder.read(folder).published.format == "llava-original"
    target = write(adapter_folder.read(folder, other.description), tmp_path / "peft")
    assert all("model.language_model.layers" in name for name in load_file(target / "adapter_model.safetensors"))
    with pytest.raises(InputError, match="in the model"):
        adapter_folder.read(
            write(trained(other, {"attention/key": 2}), tmp_path / "b", "ours"), hf.read_config(golden / "phantom-1.8b")
        )


def test_names_are_those_that_vllm_maps(golden, tmp_path):
    """vLLM strips `base_model.model.`, moves `model.language_model.` and takes modules by their last part. It takes
    neither whole modules nor patterns."""
    checkpoint = hf.load(golden / "llava-hf")
    linear_maps = ["attention/query", "attention/key", "attention/value", "attention/out", "gate", "up", "down"]
    folder = write(trained(checkpoint, dict.fromkeys(linear_maps, 4)), tmp_path / "peft")
    accepted = re.compile(
        r"base_model\.model\.model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
        r"\.lora_[AB]\.weight"
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 2 and all(accepted.fullmatch(name) for name in tensors)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None and settings["bias"] == "none" and settings["use_dora"] is False
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    # Its older versions look for the names in the last brackets.
    leaves = re.search(r"\((.*?)\)\$?$", settings["target_modules"])[1].split("|")
    assert leaves == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_merging_rounds_once(golden, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((golden / "llava-hf" / "config.json").read_text())
    bfloat16 = ml_dtypes.bfloat16
    tensors = {name: tensor.astype(bfloat16) for name, tensor in peft_folder.weights(golden / "llava-hf").items()}
    save_file(tensors, base / "model.safetensors")
    pairs = peft_folder.factors(base, lambda module: module.endswith("gate_proj"))
    source = peft_folder.write(tmp_path / "peft", pairs, rename=peft_folder.in_memory)
    ours = written(merge(hf.load(base), adapter_folder.read(source, hf.read_config(base))))
    for module, (a, b) in pairs.items():
        change = 2 * (b.astype(np.float64) @ a.astype(np.float64))
        exact = tensors[f"{module}.weight"].astype(np.float64) + change
        merged = ours[f"{module}.weight"]
        assert merged.dtype == bfloat16
        # The sum in float32 may fall on the other side of a tie; a change rounded before the sum would often differ.
        assert np.mean(merged != exact.astype(bfloat16)) < 1e-3
        np.testing.assert_allclose(merged.astype(np.float64), exact, rtol=2**-8, atol=1e-5)


def test_a_part_of_a_merged_kernel_is_that_part(golden):
    checkpoint = hf.load(golden / "phantom-1.8b")
    adapter = trained(checkpoint, {"attention/query": 4, "attention/out": 3, "down": 2})
    ours = flatten({"params": merge(checkpoint, adapter).params})
    for path in adapter.low_rank:
        whole = np.asarray(ours[path])
        assert not np.array_equal(whole, np.asarray(flatten({"params": checkpoint.params})[path]))
        part = (slice(1, 3), slice(3, 9), *[slice(1, 2)] * (whole.ndim - 2))
        np.testing.assert_allclose(ours[path][part], whole[part], rtol=1e-5, atol=1e-5)
        assert ours[path][2].shape == whole[2].shape


def test_merging_refuses(golden):
    checkpoint = hf.load(golden / "phantom-1.8b")
    adapter = trained(checkpoint, {"attention/query": 4})
    with pytest.raises(InputError, match=r"another model: params/language_model/.* Give the model .*, some/base"):
        merge(hf.load(golden / "llava-hf"), dataclasses.replace(adapter, base="some/base"))
    layers = checkpoint.params["language_model"]["layers"]
    layers["up"]["kernel"] = quantize(jnp.asarray(np.asarray(layers["up"]["kernel"])), "int8", inputs=1)
    with pytest.raises(InputError, match="16-bit"):
        merge(checkpoint, adapter)


def tower(values):
    """LoRA that PEFT put into the tower, since its linear maps are called like the decoder's."""
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_"
    return {name + "A.weight": np.ones((4, 32), np.float32), name + "B.weight": np.full((32, 4), values, np.float32)}


def test_what_leaked_into_the_tower_is_dropped(golden, tmp_path):
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: module.endswith("q_proj"))
    settings = {"rename": peft_folder.in_memory, "target_modules": ["q_proj"]}
    clean = peft_folder.write(tmp_path / "clean", pairs, **settings)
    source = peft_folder.write(tmp_path / "peft", pairs, extra=tower(0), **settings)
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert set(adapter.dropped) == set(tower(0))
    assert_merged(base, adapter, pairs)
    target = write(adapter, tmp_path / "again")
    assert_same_files(target, clean)
    # What is written means the decoder alone.
    targets = json.loads((target / "adapter_config.json").read_text())["target_modules"]
    assert re.fullmatch(targets, "model.language_model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(targets, "model.vision_tower.encoder.layers.0.self_attn.q_proj")


TOWER_NAMES = {
    "5.23": peft_folder.in_memory,
    "4.52": lambda name: peft_folder.in_memory(name).replace("vision_tower.", "vision_tower.vision_model."),
    "4.51": lambda name: name,
}


@pytest.mark.parametrize("rename", TOWER_NAMES.values(), ids=TOWER_NAMES.keys())
def test_the_tower_under_its_names_of_all_versions(golden, rename, tmp_path):
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: module.endswith(("q_proj", "out_proj", "fc1")), tower=True)
    settings = {"rename": rename, "target_modules": ["q_proj", "out_proj", "fc1"]}
    source = peft_folder.write(tmp_path / "peft", pairs, **settings)
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert {path.split("/kernel")[0] for path in adapter.low_rank} == {
        "params/language_model/layers/attention/query",
        *(f"{tree}/vision_tower/layers/{name}" for tree in ("params", "unused") for name in ("query", "out", "up")),
    }
    assert not adapter.dropped
    assert_merged(base, adapter, pairs)
    target = write(adapter, tmp_path / "again")
    assert_same_files(target, source)
    assert json.loads((target / "adapter_config.json").read_text())["target_modules"] == settings["target_modules"]


def test_layers_of_the_tower_that_were_not_reached(golden, tmp_path):
    """Training never changes those behind the one that is read, and PEFT keeps their zeros."""
    base = golden / "llava-hf"
    pairs = peft_folder.factors(base, lambda module: module.endswith("q_proj"), tower=True)
    last = "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj"
    a, b = pairs[last]
    settings = {"rename": peft_folder.in_memory, "target_modules": ["q_proj"]}
    source = peft_folder.write(tmp_path / "peft", pairs | {last: (a, 0 * b)}, **settings)
    adapter = adapter_folder.read(source, hf.read_config(base))
    assert len(adapter.dropped) == 2 and all("encoder.layers.2" in name for name in adapter.dropped)
    del pairs[last]
    assert_merged(base, adapter, pairs)
    target = write(adapter, tmp_path / "again")
    clean = peft_folder.write(tmp_path / "clean", pairs, **settings)
    assert_same_files(target, clean)
    assert_merged(base, adapter_folder.read(target, hf.read_config(base)), pairs)
    with pytest.raises(InputError, match=r"no tensors for 1 of them: model\.vision_tower\.encoder\.layers\.2"):
        adapter_folder.read(clean, hf.read_config(base))


A, B = np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)
Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
WRONG_SETTINGS = {
    "kind": ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
    "dora": ({"use_dora": True}, "use_dora=True"),
    "bias of B": ({"lora_bias": True}, "lora_bias=True"),
    "other parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "repeated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "a setting of tomorrow": ({"use_something": True}, "use_something=True"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
    "rank": ({"r": 8}, "holds rank 4 for .*, its adapter_config.json says 8"),
    "no rank": ({"r": None}, "r=None"),
    "no alpha": ({"lora_alpha": "8"}, "lora_alpha='8'"),
    "pattern": ({"rank_pattern": {"(": 2}}, r"the pattern .* no regular expression"),
    "targets": ({"target_modules": ["q_proj", "up_proj"]}, "no tensors for 3 of them: .*up_proj"),
    "number for a list": ({"target_modules": 3}, "target_modules=3"),
    "number for a name": ({"modules_to_save": [1]}, r"modules_to_save=\[1\]"),
    "text for an alpha": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern={'q_proj': 'x'}"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
    "text for a layer": ({"layers_to_transform": ["0"]}, r"layers_to_transform=\['0'\]"),
    "pattern of layers": ({"layers_to_transform": [0], "layers_pattern": "("}, "the pattern '\\('.* no regular"),
    "brackets that close PEFT's": ({"rank_pattern": {"q)|(v": 2}}, "the pattern .* no regular expression"),
    "repeats": ({"target_modules": "q{99999999999}"}, "the pattern .* no regular expression"),
    "long pattern": ({"target_modules": "q" * 5000}, "a pattern of 5,000 characters"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_settings_that_are_not_supported(golden, settings, message, tmp_path):
    pairs = peft_folder.factors(golden / "llava-hf", lambda module: module.endswith("q_proj"))
    source = peft_folder.write(tmp_path / "peft", pairs, rename=peft_folder.in_memory, **settings)
    with pytest.raises(InputError, match=message):
        adapter_folder.read(source, hf.read_config(golden / "llava-hf"))


WRONG_TENSORS = {
    "embedding": ({"base_model.model.model.language_model.embed_tokens.lora_embedding_A": A}, "LoRA on the embedding"),
    "dora": ({f"{Q}.lora_magnitude_vector.weight": A[0]}, "DoRA"),
    "bias of B": ({f"{Q}.lora_B.bias": A[0]}, "LoRA with a bias"),
    "bias": ({f"{Q}.bias": A[0]}, "1 tensors that the model has no place for: .*q_proj.bias"),
    "unknown": (
        {"base_model.model.model.x.lora_A.weight": A, "base_model.model.model.x.lora_B.weight": B},
        "2 tensors",
    ),
    "one factor": ({f"{Q.replace('q_', 'k_')}.lora_A.weight": A}, "without the other factor"),
    "no common rank": (
        {f"{Q.replace('q_', 'k_')}.lora_A.weight": A, f"{Q.replace('q_', 'k_')}.lora_B.weight": B[:, :3]},
        "no common rank",
    ),
    "vector": (
        {f"{Q.replace('q_', 'k_')}.lora_A.weight": A[0], f"{Q.replace('q_', 'k_')}.lora_B.weight": B[:, :3]},
        "no common rank",
    ),
    "shape": (
        {f"{Q.replace('q_', 'k_')}.lora_A.weight": A, f"{Q.replace('q_', 'k_')}.lora_B.weight": B[:32]},
        r"\(32, 4\), the model wants \(64, 4\)",
    ),
    "two adapters": ({f"{Q}.lora_A.other.weight": A, f"{Q}.lora_B.other.weight": B}, "keep one adapter"),
    "whole in one layer": ({f"{Q.replace('q_', 'k_')}.weight": np.ones((64, 64), np.float32)}, "not in all layers"),
    "integers": ({f"{Q.replace('q_', 'k_')}.lora_A.weight": A.astype(np.int8)}, "as I8"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_tensors_that_are_not_supported(golden, tensors, message, tmp_path):
    pairs = peft_folder.factors(golden / "llava-hf", lambda module: module.endswith("q_proj"))
    source = peft_folder.write(tmp_path / "peft", pairs, rename=peft_folder.in_memory, extra=tensors)
    with pytest.raises(InputError, match=message):
        adapter_folder.read(source, hf.read_config(golden / "llava-hf"))


def test_folders_that_hold_no_adapter(golden, tmp_path):
    base = hf.load(golden / "llava-hf")
    with pytest.raises(InputError, match="holds neither phantom_jax_adapter.json nor adapter_config.json"):
        adapter_folder.read(golden / "llava-hf", base.description)
    assert not adapter_folder.is_adapter(golden / "llava-hf")
    with pytest.raises(InputError, match="no folder"):
        adapter_folder.read(tmp_path / "absent", base.description)
    pairs = peft_folder.factors(golden / "llava-hf", lambda module: module.endswith("q_proj"))
    source = peft_folder.write(tmp_path / "peft", pairs)
    assert adapter_folder.is_adapter(source)
    weights = source / "adapter_model.safetensors"
    weights.rename(source / "adapter_model.bin")
    with pytest.raises(InputError, match="allow_pickle"):
        adapter_folder.read(source, base.description)
    (source / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        adapter_folder.read(source, base.description)
    with pytest.raises(InputError, match="adapter format 'llava-hf' does not exist"):
        adapter_folder.write(trained(base, {"up": 2}), tmp_path, format="llava-hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version=99"),
        ({"low_rank": {}}, "changes nothing"),
        ({"low_rank": {"params/language_model/layers/up/kernel": {"ranks": [2]}}}, "does not fit params/"),
        ({"low_rank": {"params/language_model/layers/up/kernel": {"ranks": [2], "alphas": [4]}}}, "ranks"),
        ({"model": {}}, "does not describe a model"),
    ],
)
def test_damaged_folders_of_ours(golden, change, message, tmp_path):
    folder = write(trained(hf.load(golden / "llava-hf"), {"up": 2}), tmp_path / "ours", "ours")
    path = folder / adapter_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        adapter_folder.read(folder)
