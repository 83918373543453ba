import numpy as np

from phantom_jax.ops.image import bicubic_matrix, normalize_pixels, resize_grid


def test_pixels_are_normalised_per_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize_pixels(pixels, mean, std), expected, atol=1e-6)


def test_resizing_keeps_constants_and_is_the_identity_at_the_same_size():
    for size in (5, 16, 23):
        np.testing.assert_allclose(bicubic_matrix(16, size).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(bicubic_matrix(16, 16), np.eye(16), atol=1e-7)
    grid = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    assert resize_grid(grid, 4, 4) is grid
    assert resize_grid(grid, 6, 8).shape == (6, 8, 3)
