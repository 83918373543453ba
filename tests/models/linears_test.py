import jax
import pytest
from flax import linen as nn

from phantom_jax.errors import InputError
from phantom_jax.models.layers import Dense
from phantom_jax.models.linears import HEAD, linear_inputs, match_linears
from phantom_jax.models.vlm import VisionLanguageModel, abstract_parameters
from phantom_jax.models.zoo import get_config
from phantom_jax.trees import flatten

TINY = {"num_layers": 2, "mlp_dim": 32}
MODELS = [get_config("phantom-quickstart", **TINY), get_config("llava-7b", **TINY, projector="mlp2x_gelu")]


def paths(config):
    return list(flatten(nn.meta.unbox(abstract_parameters(VisionLanguageModel(config)))))


@pytest.mark.parametrize("config", MODELS, ids=["phantom", "llava"])
def test_they_are_the_kernels_of_every_dense_module(config):
    dense = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, Dense):
            dense["/".join((*context.module.path, "kernel"))] = len(context.module.input_shape)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: abstract_parameters(VisionLanguageModel(config)))
    found = {path: linear_inputs(path) for path in paths(config) if linear_inputs(path)}
    assert found == dense and HEAD in found
    assert sum("vision_tower" in path for path in found) == 6
    assert linear_inputs("language_model/layers_3/attention/out/kernel") == 2


def test_the_head_is_matched_by_name_alone():
    every = paths(MODELS[0])
    assert HEAD not in match_linears(("**",), every, what="lora.patterns")
    assert HEAD not in match_linears(("language_model/**",), every, what="lora.patterns")
    assert match_linears(("language_model/head/**",), every, what="lora.patterns") == {HEAD}
    layers = match_linears(("language_model/layers/**",), every, what="lora.patterns")
    assert len(layers) == 7 and not any("phantom" in path for path in layers)


@pytest.mark.parametrize(
    "pattern, near",
    [
        ("language_model/layer/**", "language_model/layers"),
        ("**/phantom/**", "nearest paths"),
        ("language_model/embedding", "nearest paths"),
        ("vision_tower/layers", "To take everything below it, write 'vision_tower/layers/\\*\\*'"),
    ],
)
def test_a_pattern_without_a_kernel_names_the_nearest(pattern, near):
    with pytest.raises(InputError, match=f"of lora.patterns matches no kernel of a linear map.*{near}"):
        match_linears((pattern,), paths(MODELS[0]), what="lora.patterns")
