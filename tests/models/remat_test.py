import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.models import remat
from phantom_jax.models.vision_tower import VisionTowerConfig
from tests.models import small

PRESETS = ("none", "dots", "names", "full")


@pytest.fixture(scope="module")
def programs():
    """Loss and gradients of a deep model with one tile, compiled for each preset, and what they are given."""
    tower = VisionTowerConfig(embed_dim=16, num_layers=8, num_heads=2, mlp_dim=64, patch_size=4, image_size=16)
    decoder = small.with_decoder(num_layers=8, mlp_dim=128).language_model
    config = small.VisionLanguageConfig(tower, small.CONFIG.projector, decoder)
    model, params = small.init(config)
    ids = small.random_ids(2, 48)
    batch = small.text_batch(ids) | {
        "pixels": jax.random.normal(jax.random.key(1), (2, 1, 16, 16, 3)),
        "image_slots": jnp.full((2, 48), -1, jnp.int32).at[:, 1:5].set(jnp.arange(4)),
        "targets": jnp.asarray(np.roll(ids, -1, axis=1), jnp.int32),
    }

    def compiled(preset):
        model_of_preset = model.clone(remat=preset)

        def loss(params, batch):
            scores = model_of_preset.apply({"params": params}, batch, rope_length=48, method="score")
            return -scores.log_probs.mean()

        return jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()

    return {preset: compiled(preset) for preset in PRESETS}, (params, batch)


def test_no_preset_changes_the_gradients(programs):
    programs, inputs = programs
    expected = jax.tree.leaves(programs["none"](*inputs))
    assert max(float(jnp.abs(leaf).max()) for leaf in expected[1:]) > 1e-3
    for preset in PRESETS[1:]:
        for ours, theirs in zip(jax.tree.leaves(programs[preset](*inputs)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_each_preset_needs_less_memory_than_the_one_before(programs):
    programs, _ = programs
    needed = [programs[preset].memory_analysis().temp_size_in_bytes for preset in PRESETS]
    assert all(more > 1.1 * less for more, less in zip(needed, needed[1:], strict=False)), needed


def test_every_name_is_given(programs):
    _, (params, batch) = programs
    model = small.VisionLanguageModel(small.CONFIG)
    _, params = small.init(small.CONFIG)
    jaxpr = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, batch, rope_length=48, method="score"))(params))
    for name in remat.NAMES:
        assert jaxpr.count(f"name={name}\n") + jaxpr.count(f"name={name}]") >= 2, name


def test_a_preset_that_does_not_exist():
    with pytest.raises(ValueError, match="remat 'some' does not exist: use one of none, dots, names, full"):
        remat.rematerialized(small.VisionLanguageModel, "some")
