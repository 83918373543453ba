"""Adapters against PEFT itself: what it writes is read here, what is written here it reads, and logits are equal."""

import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from phantom_jax.checkpoints import adapter_folder, hf
from phantom_jax.checkpoints.adapter import Adapter, LowRank, merge
from phantom_jax.models.vlm import VisionLanguageModel
from tests.checkpoints import peft_folder

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "plain": {"target_modules": DECODER},
    "the tower too": {"target_modules": ["q_proj", "v_proj"]},
    "all linear and the tower": {"target_modules": "all-linear"},
    "biases of the tower": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "all biases of the tower": {"target_modules": ["q_proj", "linear_1"], "bias": "all"},
    "with the projector": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ".*vision_tower.*"},
    "head and projector": {"target_modules": ["lm_head", "linear_1", "linear_2", "v_proj"]},
    "rank stabilised": {
        "target_modules": r".*language_model.*\.(up_proj|o_proj)",
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"o_proj": 3},
    },
}


def llava(golden):
    return transformers.LlavaForConditionalGeneration.from_pretrained(golden / "llava-hf", dtype=torch.float32).eval()


def with_random_factors(model, *, tower=False, **settings):
    """The model with an adapter that changes something; without `tower`, factors there stay as PEFT begins them."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if (
            ("lora_B" in name and (tower or "vision_tower" not in name))
            or "modules_to_save" in name
            or (parameter.requires_grad and name.endswith(".bias"))
        ):
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def batch_of(config, image_id):
    """One row of text and an image, for transformers and for us."""
    rng = np.random.default_rng(0)
    ids = np.array([[1, 5, *[image_id] * config.vision_tower.grid**2, *rng.integers(3, 200, 9)]], np.int32)
    size = config.vision_tower.image_size
    pixels = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    theirs = {"input_ids": torch.tensor(ids, dtype=torch.long), "pixel_values": torch.tensor(pixels)}
    is_image = ids == image_id
    ours = {
        "token_ids": jnp.asarray(ids),
        "positions": jnp.arange(ids.shape[1], dtype=jnp.int32)[None],
        "segment_ids": jnp.ones_like(ids),
        "image_slots": jnp.asarray(np.where(is_image, is_image.cumsum(1) - 1, -1), jnp.int32),
        "pixels": jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None]),
    }
    return theirs, ours


def logits_of(checkpoint, batch):
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), checkpoint.params)
    length = batch["token_ids"].shape[1]
    return np.asarray(VisionLanguageModel(checkpoint.config).apply({"params": params}, batch, rope_length=length))


def load_exactly(model, folder):
    """PEFT's own loader, which only warns of keys that it misses and says nothing of those that it does not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    taken = peft.get_peft_model_state_dict(adapted)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(taken[name], tensor), name
    return adapted


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_both_ways(golden, name, tmp_path):
    tower = "tower" in name
    theirs = with_random_factors(llava(golden), tower=tower, task_type="CAUSAL_LM", **SETTINGS[name])
    theirs.save_pretrained(tmp_path / "peft")
    base = hf.load(golden / "llava-hf")
    for_them, for_us = batch_of(base.config, base.tokens.image)
    with torch.no_grad():
        expected = theirs(**for_them).logits.numpy()
        plain = llava(golden)(**for_them).logits.numpy()
    assert np.abs(expected - plain).max() > 0.1, "an adapter that changes nothing would equal anything"

    adapter = adapter_folder.read(tmp_path / "peft", base.description)
    np.testing.assert_allclose(logits_of(merge(base, adapter), for_us), expected, rtol=0, atol=1e-4)

    assert tower == any("/vision_tower/" in path for path in adapter.low_rank)
    (tmp_path / "again").mkdir()
    adapter_folder.write(adapter, tmp_path / "again", format="peft")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "again"))
    assert set(after) == {key for key in before if key not in adapter.dropped}
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert set(adapter.dropped) == {key for key in before if "vision_tower" in key and not tower}
    with torch.no_grad():
        again = load_exactly(llava(golden), tmp_path / "again")(**for_them).logits.numpy()
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)


def test_what_was_trained_here_loads(golden, tmp_path):
    base = hf.load(golden / "llava-hf")
    shapes, rng, low_rank = hf.shapes(base.config), np.random.default_rng(0), {}
    for name in ("attention/query", "attention/key", "attention/value", "attention/out", "gate", "up", "down"):
        path = f"params/language_model/layers/{name}/kernel"
        layers, *axes = shapes[path]
        inputs = 2 if name == "attention/out" else 1
        a = rng.normal(size=(layers, *axes[:inputs], 4)).astype(np.float32) * 0.1
        b = rng.normal(size=(layers, 4, *axes[inputs:])).astype(np.float32)
        low_rank[path] = LowRank(a, b, (4,) * layers, (8.0,) * layers)
    others = {
        f"params/projector/{name}": rng.normal(size=shapes[f"params/projector/{name}"]).astype(np.float32)
        for name in ("linear_1/kernel", "linear_1/bias", "linear_2/kernel", "linear_2/bias")
    }
    adapter = Adapter(base.config, base.published, base.tokens, low_rank, others)
    (tmp_path / "peft").mkdir()
    adapter_folder.write(adapter, tmp_path / "peft", format="peft")
    for_them, for_us = batch_of(base.config, base.tokens.image)
    model = load_exactly(llava(golden), tmp_path / "peft")
    assert not [name for name, _ in model.named_parameters() if "lora" in name and "vision_tower" in name]
    with torch.no_grad():
        theirs = model(**for_them).logits.numpy()
    np.testing.assert_allclose(theirs, logits_of(merge(base, adapter), for_us), rtol=0, atol=1e-4)


@pytest.fixture
def phi3(golden):
    """Phantom-3.8B's decoder as transformers has it, without the phantom dimension."""
    text = json.loads((golden / "phantom-3.8b" / "config.json").read_text())["llm_config"]
    sizes = {key: text[key] for key in text if key.endswith(("_size", "_heads", "_layers"))}
    config = transformers.Phi3Config(**sizes, pad_token_id=0, eos_token_id=2)
    tensors = load_file(golden / "phantom-3.8b" / "model.safetensors")
    state = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("language_model.") and not re.search("phantom", name)
    }

    def make():
        model = transformers.Phi3ForCausalLM(config)
        model.load_state_dict(state)
        return model.eval()

    return make


def written(checkpoint):
    return {
        tensor.name: np.concatenate([block() for block in tensor.blocks()]).reshape(tensor.shape)
        for tensor in hf.published_tensors(checkpoint)
    }


def assert_merged(adapted, ours):
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[f"language_model.{name}"], tensor.numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_packed_weights_of_phi3(golden, phi3, tmp_path):
    theirs = with_random_factors(phi3(), target_modules=["qkv_proj", "gate_up_proj", "o_proj"], task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "peft")
    base = hf.load(golden / "phantom-3.8b")
    adapter = adapter_folder.read(tmp_path / "peft", base.description)
    assert_merged(theirs, written(merge(base, adapter)))

    # Each kernel with an A of its own, and the rank that makes of it.
    low_rank = {
        path: LowRank(np.asarray(change.a) + place, np.asarray(change.b), change.ranks, change.alphas)
        for place, (path, change) in enumerate(adapter.low_rank.items())
        if "value" not in path
    }
    adapter = Adapter(base.config, base.published, base.tokens, low_rank, naming=adapter.naming)
    (tmp_path / "own").mkdir()
    adapter_folder.write(adapter, tmp_path / "own", format="peft")
    content = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert {**content["rank_pattern"], "r": content["r"]} == {"o_proj": 4, "r": 8}
    assert_merged(load_exactly(phi3(), tmp_path / "own"), written(merge(base, adapter)))


def test_pickled_folders_of_llava(golden, tmp_path):
    base = golden / "llava-original"
    pairs = peft_folder.factors(base, lambda module: "layers" in module)
    source = peft_folder.write(tmp_path / "source", pairs)
    shutil.copy(base / "config.json", source)
    shutil.copy(base / "vision_config.json", source)
    tensors = load_file(source / "adapter_model.safetensors")
    projector = {
        name: torch.tensor(tensor) for name, tensor in peft_folder.weights(base).items() if "mm_projector" in name
    }
    projector = {f"base_model.model.{name}": tensor + 1 for name, tensor in projector.items()}
    torch.save(tensors, source / "adapter_model.bin")
    torch.save(projector, source / "non_lora_trainables.bin")
    (source / "adapter_model.safetensors").unlink()

    (tmp_path / "scratch").mkdir()
    adapter = adapter_folder.read(source, scratch=tmp_path / "scratch")
    ours = written(merge(hf.load(base), adapter))
    for module, (a, b) in pairs.items():
        expected = peft_folder.weights(base)[f"{module}.weight"] + 2 * (b @ a)
        np.testing.assert_allclose(ours[f"{module}.weight"], expected, rtol=0, atol=1e-4)
    for name, tensor in projector.items():
        np.testing.assert_array_equal(ours[name.removeprefix("base_model.model.")], tensor)
