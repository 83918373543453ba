import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phantom_jax.errors import InputError
from phantom_jax.training import optimizer as optimizers
from phantom_jax.training import state as states
from phantom_jax.trees import flatten

BASE = {
    "learning_rate": 1e-2,
    "end_learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_fraction": 0.0,
    "weight_decay": 0.1,
    "decay_vectors": False,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "clip_norm": 0.0,
}


def params():
    draw = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return jax.random.normal(next(draw), shape)

    return {
        "projector": {"dense": {"kernel": normal(4, 3), "bias": normal(3)}},
        "decoder": {
            "layers": {"norm": {"scale": normal(2, 3)}, "query": {"kernel": normal(2, 3, 5), "bias": normal(2, 5, 1)}}
        },
    }


def gradients():
    return jax.tree.map(lambda x: jnp.sin(7 * x), params())


def run(config, tree, *, groups=(), steps=20, count=3, grads=None):
    """The parameters after `count` steps with constant gradients."""
    optimizer = optimizers.make_optimizer(config, tree, groups=groups, steps=steps)
    state = optimizer.init(tree)
    for step in range(count):
        updates, state, stats = optimizer.update(grads or gradients(), state, tree, jnp.int32(step))
        tree = optax.apply_updates(tree, updates)
    return tree, state, stats


def test_phantom_schedule_is_cosine_from_1e_5_to_1e_6_without_warmup():
    schedule = optimizers.learning_rate_schedule(1e-5, steps=1000, kind="cosine", end=1e-6)
    for step in (0, 1, 250, 500, 999, 1000):
        expected = 1e-6 + 9e-6 * 0.5 * (1 + np.cos(np.pi * step / 1000))
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)


def test_llava_stage_1_is_linear_with_three_percent_warmup():
    schedule = optimizers.learning_rate_schedule(1e-4, steps=1000, kind="linear", warmup_fraction=0.03)
    for step in (0, 1, 29, 30, 31, 500, 999, 1000):
        expected = 1e-4 * (step / 30 if step < 30 else (1000 - step) / 970)
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_llava_stage_2_is_cosine_with_three_percent_warmup():
    schedule = optimizers.learning_rate_schedule(2e-5, steps=157, kind="cosine", warmup_fraction=0.03)
    warmup = 5  # 4.71 steps, rounded up
    for step in (0, 4, 5, 6, 80, 156, 157):
        cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (157 - warmup)))
        expected = 2e-5 * (step / warmup if step < warmup else cosine)
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_constant_schedule_and_an_unknown_one():
    assert float(optimizers.learning_rate_schedule(0.5, steps=3, kind="constant", end=0.1)(3)) == 0.5
    with pytest.raises(InputError, match="'cosin'.*cosine"):
        optimizers.learning_rate_schedule(0.5, steps=3, kind="cosin")


def test_equals_optax_adamw_where_every_parameter_decays():
    schedule = optimizers.learning_rate_schedule(1e-2, steps=20, kind="cosine", end=1e-3)
    peer = optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    expected = params()
    state = peer.init(expected)
    for _ in range(3):
        updates, state = peer.update(gradients(), state, expected)
        expected = optax.apply_updates(expected, updates)
    actual, _, stats = run(BASE | {"decay_vectors": True}, params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected)
    assert float(stats["learning_rate"]) == pytest.approx(float(schedule(2)))


def test_matrices_decay_and_vectors_do_not():
    zeros = jax.tree.map(jnp.zeros_like, params())
    after, _, _ = run(BASE, params(), count=1, grads=zeros)
    before, after = flatten(params()), flatten(after)
    decayed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert decayed == {"projector/dense/kernel", "decoder/layers/query/kernel"}
    np.testing.assert_allclose(
        after["projector/dense/kernel"], before["projector/dense/kernel"] * (1 - 1e-2 * 0.1), rtol=1e-6
    )
    everything, _, _ = run(BASE | {"decay_vectors": True}, params(), count=1, grads=zeros)
    assert all(not np.array_equal(before[path], leaf) for path, leaf in flatten(everything).items())


def test_a_group_has_its_own_learning_rate_and_decay():
    groups = ({"patterns": ("projector/**",), "learning_rate": 2e-2, "weight_decay": 0.0},)
    actual, state, stats = run(BASE, params(), groups=groups)
    plain, _, _ = run(BASE, params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual["decoder"], plain["decoder"])
    alone = {"projector": params()["projector"]}
    own = BASE | {"learning_rate": 2e-2, "end_learning_rate": 2e-3, "weight_decay": 0.0}
    expected, _, _ = run(own, alone, grads={"projector": gradients()["projector"]})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual["projector"], expected["projector"])
    assert float(stats["learning_rate"]) < 1e-2
    assert set(state) == {"base_decayed", "base_undecayed", "group_0_decayed", "group_0_undecayed"}


def test_each_state_holds_its_own_subtree_only():
    groups = ({"patterns": ("projector/**",), "learning_rate": 2e-2},)
    _, state, _ = run(BASE, params(), groups=groups)
    paths = {name: set(flatten(chain[0].mu)) for name, chain in state.items()}
    assert paths == {
        "base_decayed": {"decoder/layers/query/kernel"},
        "base_undecayed": {"decoder/layers/norm/scale", "decoder/layers/query/bias"},
        "group_0_decayed": {"projector/dense/kernel"},
        "group_0_undecayed": {"projector/dense/bias"},
    }


def test_clipping_is_global_over_the_groups():
    groups = ({"patterns": ("projector/**",), "learning_rate": 2e-2},)
    large = jax.tree.map(lambda g: 100 * g, gradients())
    norm = float(optax.tree.norm(large))
    # A huge eps makes Adam linear in the gradient, so that clipping shows.
    config = BASE | {"eps": 1e6, "weight_decay": 0.0}
    clipped, _, stats = run(config | {"clip_norm": 1.0}, params(), groups=groups, count=1, grads=large)
    scaled = jax.tree.map(lambda g: g / norm, large)
    expected, _, _ = run(config, params(), groups=groups, count=1, grads=scaled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)
    assert float(stats["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    small = jax.tree.map(lambda g: g / (2 * norm), large)
    unclipped, _, _ = run(config | {"clip_norm": 1.0}, params(), count=1, grads=small)
    jax.tree.map(np.testing.assert_array_equal, unclipped, run(config, params(), count=1, grads=small)[0])


def test_zero_gradients_with_clipping_are_finite():
    zeros = jax.tree.map(jnp.zeros_like, params())
    after, _, _ = run(BASE | {"clip_norm": 1.0}, params(), grads=zeros)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_overlapping_groups_are_refused():
    groups = ({"patterns": ("projector/**",)}, {"patterns": ("**/kernel",)})
    with pytest.raises(InputError, match="projector/dense/kernel.*groups\\[0\\] and groups\\[1\\]"):
        optimizers.make_optimizer(BASE, params(), groups=groups, steps=3)


def test_a_group_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="'projectr/\\*\\*' of groups\\[0\\].*projector"):
        optimizers.make_optimizer(BASE, params(), groups=({"patterns": ("projectr/**",)},), steps=3)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("**", {"a/phantom/x", "phantom/x", "b/c/phantom/y/z", "b/c/d"}),
        ("**/phantom/**", {"a/phantom/x", "phantom/x", "b/c/phantom/y/z"}),
        ("b/**", {"b/c/phantom/y/z", "b/c/d"}),
        ("*/phantom/*", {"a/phantom/x"}),
        ("b/*/d", {"b/c/d"}),
        ("**/x", {"a/phantom/x", "phantom/x"}),
        ("b/**/z", {"b/c/phantom/y/z"}),
    ],
)
def test_patterns_are_globs_over_whole_paths(pattern, expected):
    paths = ["a/phantom/x", "phantom/x", "b/c/phantom/y/z", "b/c/d"]
    assert states.match([pattern], paths, what="trainable") == expected


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(InputError, match="'projecter/\\*\\*' of trainable matches no parameter.*: projector"):
        states.split(params(), ["decoder/**", "projecter/**"])
    with pytest.raises(InputError, match=r"everything below it, write 'projector/\*\*'"):
        states.split(params(), ["projector"])


def test_split_and_merge_are_inverse():
    trainable, frozen = states.split(params(), ["projector/**", "**/query/*"])
    assert set(flatten(frozen)) == {"decoder/layers/norm/scale"}
    jax.tree.map(np.testing.assert_array_equal, states.merge(trainable, frozen), params())
    assert states.split(params(), ["**"])[1] == {}


def test_start_phase_gives_float32_masters_and_casts_the_frozen():
    low = states.cast(params(), jnp.bfloat16) | {"codes": {"int4": jnp.arange(3, dtype=jnp.int8)}}
    state = states.start_phase(
        low, patterns=["projector/**"], init_optimizer=lambda tree: tree, compute_dtype=jnp.bfloat16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16"), jnp.dtype("int8")}
    assert set(state.optimizer_state) == {"projector"}
