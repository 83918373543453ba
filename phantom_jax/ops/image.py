"""Images on the device: normalisation and resizing of position grids."""

import jax
import jax.numpy as jnp
import numpy as np


def normalize_pixels(pixels: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Turns uint8 pixels [..., 3] into float32 `(pixels / 255 - mean) / std`, mean and std per channel in 0 to 1."""
    shape = (1,) * (pixels.ndim - 1) + (len(mean),)
    mean_array = np.asarray(mean, np.float32).reshape(shape)
    std_array = np.asarray(std, np.float32).reshape(shape)
    return (pixels.astype(jnp.float32) * np.float32(1 / 255) - mean_array) / std_array


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights [size_out, size_in] of PyTorch's bicubic resize (a = -0.75, half-pixel centres, clamped borders).

    `jax.image.resize` uses a = -0.5 and renormalises at the borders, which is another function: position embeddings
    resized with it would not match those that the published towers were run with.
    """
    a = -0.75
    centres = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    base = np.floor(centres).astype(np.int64)
    matrix = np.zeros((size_out, size_in))
    for offset in range(-1, 3):
        distance = np.abs(centres - (base + offset))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(size_out), np.clip(base + offset, 0, size_in - 1)), weight)
    return matrix.astype(np.float32)


def resize_grid(grid_HWD: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes a position grid [H, W, D] bicubically, as `torch.nn.functional.interpolate` does; float32 inside."""
    rows, columns, _ = grid_HWD.shape
    if (rows, columns) == (height, width):
        return grid_HWD
    resized = jnp.einsum("hr,rcd->hcd", bicubic_matrix(rows, height), grid_HWD.astype(jnp.float32))
    return jnp.einsum("wc,hcd->hwd", bicubic_matrix(columns, width), resized).astype(grid_HWD.dtype)
