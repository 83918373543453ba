"""Training on meshes of eight devices: the numbers of one, the collectives that were meant, and less memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phantom_jax import axes, objectives
from phantom_jax.batch import IGNORE
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.ops.quantize import QuantizedTensor, quantize
from phantom_jax.sharding.mesh import make_mesh
from phantom_jax.sharding.rules import STRATEGIES, leaf_names, leaf_sharding, parameter_names
from phantom_jax.training.optimizer import Optimizer
from phantom_jax.training.places import Places
from phantom_jax.training.state import merge, split, start_phase
from phantom_jax.training.step import make_train_step
from phantom_jax.trees import flatten, unflatten
from tests.models import small
from tests.sharding.collectives import collectives

# Heads and widths divide by four, kv heads by two alone.
CONFIG = dataclasses.replace(
    small.with_decoder(vocab_size=64, num_heads=8, num_kv_heads=2),
    vision_tower=dataclasses.replace(small.TOWER, num_heads=4),
)
ROWS, LENGTH, TILES = 16, 32, 2

MESHES = {
    "fsdp:1": ({}, "zero3", "xla"),
    "fsdp:2": ({"fsdp": 2}, "zero3", "xla"),
    "fsdp:4": ({"fsdp": 4}, "zero3", "xla"),
    "fsdp:8": ({"fsdp": 8}, "zero3", "xla"),
    "zero2": ({"data": 2, "fsdp": 4}, "zero2", "xla"),
    "zero3_tensor": ({"fsdp": 4, "tensor": 2}, "zero3_tensor", "xla"),
    "tensor": ({"data": 2, "tensor": 4}, "tensor", "chunked"),
    "seq": ({"fsdp": 2, "seq": 4}, "zero3", "chunked"),
    "all": ({"fsdp": 2, "tensor": 2, "seq": 2}, "zero2_tensor", "xla"),
}


def make_batch():
    rng = np.random.default_rng(0)
    image_slots = np.full((ROWS, LENGTH), -1, np.int32)
    image_slots[:, 2:10] = np.arange(8)
    targets = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    # Rows weigh differently, so that means of means are wrong.
    supervised = np.arange(LENGTH) < rng.integers(12, LENGTH, (ROWS, 1))
    segments = (np.arange(LENGTH) < 30).astype(np.int32) * np.where(np.arange(LENGTH) < 20, 1, 2)
    return {
        "token_ids": rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32),
        "positions": np.tile(np.where(np.arange(LENGTH) < 20, np.arange(LENGTH), np.arange(LENGTH) - 20), (ROWS, 1)),
        "segment_ids": np.tile(segments, (ROWS, 1)),
        "branch_ids": np.zeros((ROWS, LENGTH), np.int32),
        "image_slots": image_slots,
        "targets": np.where(supervised, targets, IGNORE),
        "sft_mask": supervised,
        "answer_slots": np.zeros((ROWS, LENGTH), np.int32),
        "pixels": rng.standard_normal((ROWS, TILES, 16, 16, 3)).astype(np.float32),
        "row_ids": np.arange(ROWS, dtype=np.int32),
    }


def _keep_gradients(gradients, state, params, step):
    """An optimiser whose state is the gradients, and whose steps are large enough to be seen."""
    del state, params, step
    return jax.tree.map(lambda leaf: -0.1 * leaf, gradients), gradients, {"grad_norm": jnp.zeros(())}


KEEP_GRADIENTS = Optimizer(lambda params: jax.tree.map(jnp.zeros_like, params), _keep_gradients)


@dataclasses.dataclass
class Run:
    program: jax.stages.Compiled
    state: object
    shardings: object
    loss: float


@functools.cache
def parameters():
    model, params = small.init(CONFIG)
    return jax.device_get(params), parameter_names(model)


def run(shape, strategy, backend, params=None, trainable=("**",), accumulation=2):
    """One step on a mesh, compiled with all places."""
    model = VisionLanguageModel(CONFIG, attention_backend=backend)
    whole, names = parameters()
    params = whole if params is None else params
    mesh = make_mesh(shape)
    places = Places(mesh, strategy, names)
    places.check(whole)

    def score(params, batch):
        return model.apply({"params": params}, batch, rope_length=LENGTH, method="score")

    step = make_train_step(
        score,
        objectives.sft(),
        KEEP_GRADIENTS,
        accumulation=accumulation,
        constrain_gradients=places.constrain_gradients,
    )
    start = functools.partial(
        start_phase, patterns=trainable, init_optimizer=KEEP_GRADIENTS.init, compute_dtype=jnp.float32
    )
    shardings = places.state(jax.eval_shape(start, params))
    with jax.set_mesh(mesh):
        state = jax.jit(start, out_shardings=shardings)(params)
        batch = places.batch(make_batch())
        jitted = jax.jit(places.traced(step), donate_argnums=0, out_shardings=(shardings, places.whole))
        program = jitted.lower(state, batch).compile()
        state, metrics = program(state, batch)
    return Run(program, jax.device_get(state), shardings, float(metrics["loss"]))


@pytest.fixture(scope="module")
def runs():
    """Each mesh compiled once, whichever tests ask for it."""
    return functools.cache(lambda name: run(*MESHES[name]))


@pytest.fixture(scope="module")
def one_device():
    """Loss and gradients of the whole batch at once, without any mesh."""
    params, _ = parameters()
    model = VisionLanguageModel(CONFIG)
    batch = make_batch()

    def loss(params):
        scores = model.apply({"params": params}, batch, rope_length=LENGTH, method="score")
        return objectives.sft().terms(scores.log_probs, batch)["sft"].mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), jax.device_get(gradients)


def assert_close(actual, expected):
    """Within 1e-5 of the largest gradient of the parameter's module; some, those of key biases, are sums to zero."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    scale = {path.split("/")[0]: 0.0 for path in expected}
    for path, leaf in expected.items():
        scale[path.split("/")[0]] = max(scale[path.split("/")[0]], float(np.abs(leaf).max()))
    for path, leaf in expected.items():
        assert np.abs(leaf - actual[path]).max() <= 1e-5 * scale[path.split("/")[0]], path


@pytest.mark.parametrize("name", MESHES)
def test_losses_and_gradients_are_those_of_one_device(name, runs, one_device):
    loss, gradients = one_device
    result = runs(name)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert_close(result.state.optimizer_state, gradients)
    moved = jax.tree.map(lambda param, gradient: param - 0.1 * gradient, parameters()[0], gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), result.state.trainable, moved)


def stacked_shapes():
    flat = flatten(parameters()[0])
    return {
        leaf.shape for path, leaf in flat.items() if "/layers/" in path and path.endswith("/kernel") and leaf.ndim > 2
    }


def layer_kernels(model):
    """How many kernels one layer of a part has."""
    prefix = f"{model}/layers/"
    flat = {path: leaf for path, leaf in flatten(parameters()[0]).items() if path.startswith(prefix)}
    return sum(path.endswith("/kernel") and leaf.ndim > 2 for path, leaf in flat.items())


@pytest.mark.parametrize("name", ["fsdp:8", "seq", "zero3_tensor", "tensor"])
def test_no_stack_of_parameters_is_ever_gathered(name, runs):
    for found in collectives(runs(name).program):
        if found.kind == "all-gather":
            assert not {shape for _, shape in found.arrays} & stacked_shapes(), found


def test_zero3_gathers_each_layers_kernels_forward_and_backward_and_sums_gradients(runs):
    found = collectives(runs("fsdp:8").program)
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    for model in ("language_model", "vision_tower"):
        gathers = [one for one in found if one.kind == "all-gather" and one.layers == model]
        assert len(gathers) == 2 * layer_kernels(model), "once each way"
        [leading] = {shape[0] for one in gathers for _, shape in one.arrays}
        assert leading == 1, "of one layer"
    exchanged = [one.where for one in found if one.kind == "all-to-all"]
    assert len(exchanged) == 2 and all("embed" in where for where in exchanged), "the channels of looked-up tokens"


def test_zero2_gathers_no_parameter_but_the_new_ones(runs):
    found = collectives(runs("zero2").program)
    assert not [one for one in found if one.kind in ("all-gather", "collective-permute") and one.layers]
    updated = {shape for one in found if one.kind == "all-gather" for _, shape in one.arrays}
    assert updated & stacked_shapes(), "each device updates its part, all need the whole"


def test_tensor_parallelism_moves_activations_and_no_kernel(runs):
    found = collectives(runs("tensor").program)
    assert not [one for one in found if one.kind == "all-to-all"]
    kernels = {shape[1:] for shape in stacked_shapes() if 2 not in shape[1:]}
    assert len(kernels) > 4, "those whose heads divide"
    gathered = {shape for one in found if one.kind == "all-gather" for _, shape in one.arrays}
    forward = [one for one in found if one.layers == "language_model" and "transpose" not in one.where]
    sums = [one for one in forward if one.kind == "all-reduce" and one.where.endswith("dot_general")]
    assert len(sums) == 2, "after attention and after the MLP"
    assert not gathered & {(*layers, *kernel) for kernel in kernels for layers in ((), (1,))}


def test_where_tokens_are_split_keys_and_values_are_gathered_and_queries_are_not(runs):
    found = [one for one in collectives(runs("seq").program) if one.layers == "language_model"]
    kinds = {one.kind for one in found}
    assert "all-to-all" not in kinds and "collective-permute" not in kinds
    rows, width = ROWS // 2 // 2, 2 * CONFIG.language_model.head_dim
    gathers = [shape for one in found if one.kind == "all-gather" for _, shape in one.arrays]
    assert gathers.count((rows, LENGTH, 2, width)) >= 2
    assert not any(shape[:3] == (rows, LENGTH, 8) for shape in gathers)


def test_memory_of_a_device_falls_with_the_mesh(runs):
    memory = {parts: runs(f"fsdp:{parts}").program.memory_analysis() for parts in (1, 2, 4, 8)}
    places = flatten(runs("fsdp:8").shardings.trainable)
    sizes = {path: leaf.nbytes for path, leaf in flatten(parameters()[0]).items()}
    split_bytes = sum(size for path, size in sizes.items() if any(places[path].spec))
    whole_bytes = sum(sizes.values()) - split_bytes
    assert split_bytes > 3 * whole_bytes
    rows = sum(array.nbytes for array in make_batch().values())
    for parts, found in memory.items():
        # Parameters and one array of the optimiser's for each.
        expected = 2 * (split_bytes / parts + whole_bytes) + rows / parts
        assert found.argument_size_in_bytes == pytest.approx(expected, rel=0.02, abs=2048)
        assert found.alias_size_in_bytes >= 2 * (split_bytes / parts + whole_bytes), "the state is donated"
    peaks = [memory[parts].temp_size_in_bytes for parts in (1, 2, 4, 8)]
    assert peaks[0] > 1.5 * peaks[1] > 1.5**2 * peaks[2] > peaks[3], peaks


def few_bits(params):
    """Decoder kernels in 4 bits, those of the MLP in 8."""

    def leaf(path, array):
        if not path.startswith("language_model/layers/") or not path.endswith("/kernel") or "phantom" in path:
            return array
        kind = "int8" if path.split("/")[-2] in ("gate", "up", "down") else "nf4"
        return jax.device_get(quantize(jnp.asarray(array), kind, inputs=2 if "/out/" in path else 1, layers=1))

    return unflatten({path: leaf(path, array) for path, array in flatten(params).items()})


def test_of_quantised_kernels_codes_travel():
    params, trainable = few_bits(parameters()[0]), ("projector/**",)
    expected = run({}, "zero3", "xla", params, trainable, 1)
    actual = run({"fsdp": 8}, "zero3", "xla", params, trainable)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_close(actual.state.optimizer_state, expected.state.optimizer_state)
    gathers = [
        dtype
        for one in collectives(actual.program)
        if one.kind == "all-gather" and one.layers == "language_model"
        for dtype, shape in one.arrays
        if math.prod(shape) > 16
    ]
    assert set(gathers) == {"u8", "s8"}
    codes = flatten(actual.state.frozen)["language_model/layers/gate/kernel"].codes
    sharding = flatten(actual.shardings.frozen)["language_model/layers/gate/kernel"].codes
    assert sharding.shard_shape(codes.shape)[1] * 8 == codes.shape[1]


def test_every_strategy_places_every_parameter_of_every_width():
    """Axes that no mesh axis divides are left whole, or another one is split; nothing fails."""
    names = parameter_names(VisionLanguageModel(CONFIG))
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    rng = np.random.default_rng(0)
    for strategy in STRATEGIES.values():
        for path, leaf_axes in names.items():
            leaf = jax.ShapeDtypeStruct(tuple(rng.integers(1, 13, len(leaf_axes))), jnp.float32)
            for rules in (strategy.parameters, strategy.states):
                leaf_sharding(path, leaf, names, mesh, rules).shard_shape(leaf.shape)


def test_where_an_axis_does_not_divide_another_one_is_split():
    names = {"up/kernel": (axes.EMBED, axes.MLP)}

    def spec(shape, rules):
        mesh = make_mesh({"fsdp": 4, "tensor": 2})
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        return leaf_sharding("up/kernel", leaf, names, mesh, rules).spec

    zero3, mixed = STRATEGIES["zero3"].parameters, STRATEGIES["zero3_tensor"].parameters
    assert spec((8, 8), zero3) == jax.P("fsdp", None)
    assert spec((6, 8), zero3) == jax.P(None, "fsdp")
    assert spec((6, 6), zero3) == jax.P(None, None)
    assert spec((8, 8), mixed) == jax.P("fsdp", "tensor")
    assert spec((8, 3), mixed) == jax.P("fsdp", None)


def test_low_rank_factors_bear_the_names_of_their_kernel():
    names = {
        "layers/out/kernel": (axes.LAYERS, axes.HEADS, axes.HEAD_DIM, axes.EMBED),
        "linear_1/kernel": (axes.PROJECTOR_IN, axes.EMBED),
    }

    def of(path, *shape):
        return leaf_names(path, jax.ShapeDtypeStruct(shape, jnp.float32), names)

    assert of("layers/out/lora_a", 3, 8, 4, 2) == (axes.LAYERS, axes.HEADS, axes.HEAD_DIM, axes.LORA_RANK)
    assert of("layers/out/lora_b", 3, 2, 32) == (axes.LAYERS, axes.LORA_RANK, axes.EMBED)
    assert of("linear_1/lora_a", 64, 2) == (axes.PROJECTOR_IN, axes.LORA_RANK)
    assert of("linear_1/lora_b", 2, 32) == (axes.LORA_RANK, axes.EMBED)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_of_stacked_kernels_are_split(kind):
    names = {"layers/up/kernel": (axes.LAYERS, axes.EMBED, axes.MLP)}
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    tensor = jax.eval_shape(lambda: quantize(jnp.zeros((3, 256, 8)), kind, inputs=1, layers=1))
    assert isinstance(tensor, QuantizedTensor)
    places = leaf_sharding("layers/up/kernel", tensor, names, mesh, STRATEGIES["zero3_tensor"].parameters)
    blocks = () if kind == "int8" else (None,)
    assert places.codes.spec == jax.P(None, "fsdp", *blocks, "tensor")
    assert not any(places.scales.spec)


def test_the_optimisers_state_lies_beside_its_parameter():
    params, names = parameters()
    places = Places(make_mesh({"data": 2, "fsdp": 4}), "zero2", names)

    def start(params):
        return start_phase(
            params,
            patterns=("language_model/**",),
            init_optimizer=lambda tree: {"base_decayed": optax.chain(optax.scale_by_adam()).init(tree)},
            compute_dtype=jnp.bfloat16,
        )

    abstract = jax.eval_shape(start, params)
    state = places.state(abstract)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    trainable, frozen = split(params, ("language_model/**",))
    assert flatten(merge(state.trainable, state.frozen)).keys() == flatten(merge(trainable, frozen)).keys()
    path = "language_model/layers/gate/kernel"
    assert not any(flatten(state.trainable)[path].spec)
    [adam] = state.optimizer_state["base_decayed"]
    assert flatten(adam.mu)[path].spec == flatten(adam.nu)[path].spec == jax.P(None, "fsdp", None)
    assert not any(adam.count.spec)
