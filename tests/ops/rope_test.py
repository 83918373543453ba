import math

import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.ops import rope
from phantom_jax.ops.rope import RopeConfig

DEFAULT = RopeConfig(theta=100.0, max_length=64)
BASE = 1 / 100.0 ** (np.arange(0, 8, 2) / 8)


def test_rotation_preserves_norms_and_depends_on_differences_alone():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    inverse, factor = rope.frequencies(DEFAULT, 8, 16)

    def at(vector, position):
        return rope.rotate(jnp.asarray(vector), *rope.angles(jnp.full((1, 1), position), inverse, factor))

    np.testing.assert_allclose(np.linalg.norm(at(x, 7)), np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose((at(x, 9) * at(y, 4)).sum(), (at(x, 25) * at(y, 20)).sum(), rtol=1e-4)
    np.testing.assert_array_equal(at(x, 0), x)


def test_linear_divides_positions():
    inverse, _ = rope.frequencies(RopeConfig(theta=100.0, kind="linear", factor=4.0), 8, 16)
    np.testing.assert_allclose(inverse, BASE / 4, rtol=1e-6)


def test_dynamic_changes_theta_beyond_its_length_only():
    config = RopeConfig(theta=100.0, kind="dynamic", factor=2.0, max_length=64)
    np.testing.assert_allclose(rope.frequencies(config, 8, 64)[0], BASE, rtol=1e-6)
    theta = 100.0 * (2 * 96 / 64 - 1) ** (8 / 6)
    np.testing.assert_allclose(rope.frequencies(config, 8, 96)[0], 1 / theta ** (np.arange(0, 8, 2) / 8), rtol=1e-6)


def test_su_takes_short_or_long_factors_by_the_longest_conversation():
    short, long = (1.0, 1.5, 2.0, 2.5), (2.0, 3.0, 4.0, 5.0)
    config = RopeConfig(
        theta=100.0, kind="su", max_length=256, original_max_length=32, short_factor=short, long_factor=long
    )
    inverse, factor = rope.frequencies(config, 8, 32)
    np.testing.assert_allclose(inverse, BASE / np.array(short), rtol=1e-6)
    assert factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(32)))
    np.testing.assert_allclose(rope.frequencies(config, 8, 33)[0], BASE / np.array(long), rtol=1e-6)
    # The published Phi-3 with 128k positions: sqrt(1 + ln 32 / ln 4096) = 1.190.
    published = RopeConfig(
        kind="su", max_length=131_072, original_max_length=4096, short_factor=(1.0,) * 4, long_factor=(1.0,) * 4
    )
    assert rope.frequencies(published, 8, 10)[1] == pytest.approx(1.190, abs=5e-4)


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        RopeConfig(kind="dynamic", factor=2.0, max_length=64),
        RopeConfig(kind="su", max_length=64, original_max_length=16, short_factor=(1.0,) * 4, long_factor=(3.0,) * 4),
    ],
)
def test_the_canonical_length_has_the_same_frequencies(config):
    for length in (1, 16, 17, 64, 65, 200):
        ours = rope.frequencies(config, 8, rope.canonical_length(config, length))
        np.testing.assert_array_equal(ours[0], rope.frequencies(config, 8, length)[0])
    assert rope.canonical_length(config, 3) == rope.canonical_length(config, 9)


def test_bad_rotations_are_refused():
    with pytest.raises(ValueError, match="unknown rope kind 'yarn'"):
        RopeConfig(kind="yarn")
    with pytest.raises(ValueError, match="needs original_max_length"):
        RopeConfig(kind="su")
    with pytest.raises(ValueError, match="needs 4 factors, got 2"):
        rope.frequencies(
            RopeConfig(kind="su", original_max_length=4, short_factor=(1.0,) * 2, long_factor=(1.0,) * 2), 8, 3
        )
