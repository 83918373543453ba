import math

import jax
import pytest

from phantom_jax.accounting import parameter_shapes
from phantom_jax.checkpoints.hf_config import publish
from phantom_jax.errors import InputError
from phantom_jax.models import zoo


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name, total, projector, phantom",
    [
        ("phantom-0.5b", 939.3, 4.48, 1.183),
        ("phantom-1.8b", 2210.5, 12.60, 4.725),
        ("phantom-3.8b", 4150.4, 22.03, 3.545),
        ("phantom-7b", 8081.7, 33.57, 6.300),
    ],
)
def test_phantom_sizes(name, total, projector, phantom):
    shapes = parameter_shapes(zoo.get_config(name))
    assert count(shapes) / 1e6 == pytest.approx(total, abs=0.05)
    assert count(shapes["vision_tower"]) / 1e6 == pytest.approx(304.01, abs=0.005)
    assert count(shapes["projector"]) / 1e6 == pytest.approx(projector, abs=0.005)
    ours = shapes["language_model"]["layers"]["attention"]["phantom"]
    assert count(ours) / 1e6 == pytest.approx(phantom, abs=0.001)


def test_the_smallest_phantom_with_tied_embeddings():
    shapes = parameter_shapes(zoo.get_config("phantom-0.5b", tie_embeddings=True))
    assert count(shapes) / 1e6 == pytest.approx(803.5, abs=0.05)


@pytest.mark.parametrize(
    "name, decoder, projector",
    [
        ("llava-7b", 6.738, 4.198),
        ("llava-13b", 13.016, 5.248),
        ("llava-33b", 32.529, 6.822),
        ("llava-65b", 65.286, 8.397),
        ("llava-70b", 68.977, 8.397),
    ],
)
def test_llava_sizes(name, decoder, projector):
    shapes = parameter_shapes(zoo.get_config(name))
    assert count(shapes["language_model"]) / 1e9 == pytest.approx(decoder, abs=5e-4)
    assert count(shapes["projector"]) / 1e6 == pytest.approx(projector, abs=5e-4)


@pytest.mark.parametrize("name, parameters", [("llava-7b", 20.98), ("llava-13b", 31.47)])
def test_the_two_layer_projector(name, parameters):
    shapes = parameter_shapes(zoo.get_config(name, projector="mlp2x_gelu"))
    assert count(shapes["projector"]) / 1e6 == pytest.approx(parameters, abs=5e-3)


@pytest.mark.parametrize("size, tokens", [(224, 256), (336, 576)])
def test_clip_patches(size, tokens):
    config = zoo.get_config("llava-7b", image_size=size)
    assert config.tokens_per_tile == tokens
    positions = parameter_shapes(config)["vision_tower"]["position_embedding"]
    assert positions.shape == (1 + tokens, 1024)


def test_tokens_of_a_phantom_tile():
    assert zoo.get_config("phantom-7b").tokens_per_tile == 256


def test_any_decoder_can_take_or_leave_the_phantom_dimension():
    plain = count(parameter_shapes(zoo.get_config("phantom-0.5b", phantom=None)))
    assert count(parameter_shapes(zoo.get_config("phantom-0.5b"))) - plain == 24 * (12 * 64**2 + 2 * 65)
    llava = zoo.get_config("llava-7b", phantom=zoo.PhantomConfig())
    assert count(parameter_shapes(llava)["language_model"]["layers"]["attention"]["phantom"]) == 32 * (
        12 * 128**2 + 2 * 129
    )


def test_the_phantom_dimension_is_configured_by_name():
    config = zoo.get_config("phantom-7b", phantom={"eta": 1, "gate": "equal"}).language_model
    assert config.phantom == zoo.PhantomConfig(eta=1, gate="equal")
    assert zoo.get_config("llava-7b", phantom={"eta": 0.5}).language_model.phantom == zoo.PhantomConfig(eta=0.5)
    assert zoo.get_config("llava-7b", rope={"theta": 1e6}).language_model.rope.max_length == 2048


def test_every_phantom_is_published_as_its_own_language_model():
    families = {"phantom-0.5b": "qwen2", "phantom-1.8b": "internlm2", "phantom-3.8b": "phi3", "phantom-7b": "internlm2"}
    for name, family in families.items():
        assert publish(zoo.get_config(name)).language_model == family


def test_unknown_names_and_fields_are_refused():
    with pytest.raises(InputError, match="did you mean 'phantom-7b'"):
        zoo.get_config("phantom-7B")
    with pytest.raises(InputError, match="no field 'num_layer', did you mean 'num_layers'"):
        zoo.get_config("phantom-7b", num_layer=3)
    with pytest.raises(InputError, match="no field 'phantom.etta', did you mean 'eta'"):
        zoo.get_config("phantom-7b", phantom={"etta": 1.0})
    with pytest.raises(InputError, match="num_layers is '3', it must be of type int"):
        zoo.get_config("phantom-7b", num_layers="3")
    with pytest.raises(InputError, match="5 query heads are no multiple of 8"):
        zoo.get_config("phantom-7b", num_heads=5)
