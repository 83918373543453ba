"""Folders that a run begins with, published ones too: what is read, in which form and where to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.checkpoints import hf
from phantom_jax.config import DEFAULTS
from phantom_jax.errors import InputError
from phantom_jax.json_files import write_json
from phantom_jax.ops.quantize import QuantizedTensor, dequantize
from phantom_jax.pretrained import save
from phantom_jax.training.beginning import open_weights
from phantom_jax.training.division import divide
from phantom_jax.trees import flatten
from tests.generation import tiny
from tests.models import small


def settings(weights, name="", **overrides):
    return {**DEFAULTS["model"], "name": name, "weights": str(weights), **overrides}


def phase(trainable, quantize=("none", ("language_model/layers/**",))):
    kind, patterns = quantize
    lora = {"rank": 0, "alpha": 1.0, "dropout": 0.0, "patterns": ("language_model/layers/**",)}
    return {"trainable": trainable, "lora": lora, "quantize": {"kind": kind, "patterns": patterns}}


@pytest.mark.parametrize("folder, template", [("phantom-1.8b", "internlm2"), ("llava-hf", "vicuna_v1")])
def test_a_published_model_in_the_form_of_a_phase(golden, folder, template):
    begins = open_weights(settings(golden / folder), template)
    expected = flatten(hf.load(golden / folder).params)
    everywhere = ("language_model/layers/**", "vision_tower/layers/**")
    [division] = divide([phase(("projector/**",), ("int8", everywhere))], list(expected))
    devices = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    spread = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, "fsdp"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding(path, array):
        return spread if path == "language_model/embedding" else jax.tree.map(lambda _: one, array)

    params = begins.load_params(lambda path: division.dtype(path, "bfloat16"), division.quantize, sharding)
    params = flatten(params)
    assert set(params) == set(expected) and params["language_model/embedding"].sharding == spread
    codes = {path for path, leaf in params.items() if isinstance(leaf, QuantizedTensor)}
    assert codes == division.quantized and len(codes) == 13
    for path, leaf in params.items():
        source = np.asarray(expected[path]).astype(np.float32)
        if path in codes:
            np.testing.assert_allclose(dequantize(leaf, jnp.float32), source, rtol=0, atol=0.01 * np.abs(source).max())
        else:
            assert leaf.dtype == ("float32" if path.startswith("projector/") else "bfloat16"), path
            np.testing.assert_array_equal(leaf, source.astype(leaf.dtype))


def test_what_lacks_the_phantom_dimension_names_the_way_to_it(golden, tmp_path):
    plain = small.with_decoder(phantom=None).language_model
    save(tiny.handle(plain), tmp_path / "plain")
    with pytest.raises(InputError, match="(?s)has no phantom dimension: .* convert --vision=FOLDER --llm=FOLDER"):
        open_weights(settings(tmp_path / "plain", "phantom-quickstart"), "qwen2")
    (tmp_path / "parent").mkdir()
    write_json(tmp_path / "parent" / "config.json", {"model_type": "qwen2"})
    with pytest.raises(InputError, match="`convert --llm= --vision=` makes one"):
        open_weights(settings(tmp_path / "parent", "phantom-0.5b"), "qwen2")


def test_fields_that_differ_are_listed(golden):
    with pytest.raises(InputError) as error:
        open_weights(settings(golden / "llava-hf", "llava-7b", projector="mlp2x_gelu"), "vicuna_v1")
    lines = str(error.value).splitlines()
    assert "which holds another model than 'llava-7b':" in lines[0]
    assert any(line.startswith("  language_model.num_layers is 3 in the folder and 32 in the config") for line in lines)
    assert not any("vocab_size" in line for line in lines) and "Leave model.name out" in lines[-1]


def test_codes_that_are_kept_or_more_of_them_need_no_floats():
    paths = ["language_model/layers/up/kernel", "language_model/layers/down/kernel", "projector/linear_1/kernel"]
    some, more = ("nf4", ("**/up/kernel",)), ("nf4", ("language_model/**",))
    assert len(divide([phase(("projector/**",), some), phase(("projector/**",), more)], paths)) == 2
    with pytest.raises(InputError, match=r"phases\[1\] needs the float values of language_model/layers/down/kernel, "):
        divide([phase(("projector/**",), more), phase(("projector/**",), some)], paths)
