"""Decoding on eight devices gives what one device gives."""

import dataclasses

import jax
import pytest

from phantom_jax import pretrained
from phantom_jax.errors import InputError
from phantom_jax.generation.settings import Settings
from phantom_jax.sharding.mesh import make_mesh
from phantom_jax.sharding.rules import DECODING, partition
from tests.generation import tiny
from tests.models import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose heads and widths divide by eight, kv heads by two only."""
    decoder = dataclasses.replace(small.DECODER, num_heads=8, num_kv_heads=2, mlp_dim=64)
    path = tmp_path_factory.mktemp("model") / "model"
    pretrained.save(tiny.handle(decoder=decoder), path)
    return path


QUESTIONS = ["What is this?", "Read the number.", "How many digits are there?", "Why?"]


def answers(vlm, **settings):
    images = [[tiny.image(48, 16, seed=1)], [], [tiny.image(seed=2)], [tiny.image(seed=2)]]
    return vlm.generate(QUESTIONS, images=images, max_new_tokens=8, **settings)


@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"data": 4, "tensor": 2}])
@pytest.mark.parametrize("options", [{}, {"int8_cache": True}, {"quantize": "int8"}, {"quantize": "nf4"}])
def test_answers_of_eight_devices_are_those_of_one(folder, mesh, options):
    one, eight = pretrained.load(folder, **options), pretrained.load(folder, mesh=mesh, **options)
    assert answers(eight) == answers(one)
    if not options:
        assert answers(eight, num_beams=3) == answers(one, num_beams=3)
        sampled = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
        assert answers(eight, **sampled) == answers(one, **sampled)


def test_weights_and_cache_are_split(folder):
    vlm = pretrained.load(folder, mesh={"data": 2, "tensor": 4})
    layer = vlm.params["language_model"]["layers_0"]

    def share(array):
        return array.addressable_shards[0].data.size / array.size

    assert share(layer["attention"]["query"]["kernel"]) == share(layer["gate"]["kernel"]) == 1 / 4
    assert share(layer["attention"]["key"]["kernel"]) == 1, "2 heads do not divide by 4"
    vlm = pretrained.load(folder, mesh={"data": 4, "tensor": 2})
    prompts = [vlm.processor.encode_prompt(question) for question in QUESTIONS]
    state, asked = vlm.engine._start([vlm.engine._request(i, p, Settings()) for i, p in enumerate(prompts)], Settings())
    state = vlm.engine._advance(state, asked, 4, 1)
    assert {share(layer.key) for layer in state.cache.layers} == {1 / 8}, "rows over data, heads over tensor"
    quantized = pretrained.load(folder, mesh={"tensor": 8}, quantize="int8")
    assert share(quantized.params["language_model"]["layers_0"]["gate"]["kernel"].codes) == 1 / 8


def test_a_mesh_that_would_split_nothing_is_refused(folder):
    with pytest.raises(InputError, match="splits nothing over mesh axis 'fsdp'.*use data, tensor"):
        pretrained.load(folder, mesh={"fsdp": 8})


def test_a_mesh_that_cannot_be():
    for shape, message in (
        ({"tensr": 2}, "no axis 'tensr': did you mean 'tensor'"),
        ({"tensor": 0}, "tensor is 0: set it to a whole number, 1 or more"),
        ({"tensor": 16}, "takes 16 devices, there are 8"),
    ):
        with pytest.raises(InputError, match=message):
            make_mesh(shape)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh({"tensor": 8})
    assert partition(("embed", "heads", "head_dim"), (32, 16, 8), mesh, DECODING) == jax.P(None, "tensor", None)
    assert partition(("embed", "kv_heads", "head_dim"), (32, 2, 8), mesh, DECODING) == jax.P(None, None, None)
    assert partition((None, "mlp"), (3, 64), mesh, [("mlp", "tensor")]) == jax.P(None, "tensor")
