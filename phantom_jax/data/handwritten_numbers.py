"""Images of handwritten numbers, composed of real scans of single digits.

The scans are the 1,797 of 8 x 8 pixels that scikit-learn ships (43 writers, UCI "Optical Recognition of Handwritten
Digits"). They are split before anything is composed, so that no scan of one split is ever seen in another.
"""

import io

import numpy as np
from PIL import Image

from phantom_jax.errors import InputError

CELL = 32
"""Pixels of a digit's square cell."""
GLYPH = 28
"""Pixels that a scan is scaled up to, centred in its cell."""

ROTATION = 12.0
"""Degrees. These are the largest changes; each is drawn evenly up to it, in both directions."""
SCALE = SHEAR = 0.15
SHIFT = 2.0
"""Pixels."""
GAIN = 0.2
ELASTIC = 1.0
"""Pixels: standard deviation of the displacements at a grid of 4 x 4 points, interpolated between."""


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Ink [1797, 8, 8] float32 from 0 to 1, and labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("The scans come with scikit-learn. Install phantom-jax[quickstart].") from error
    scans = load_digits()
    return (scans.images / 16).astype(np.float32), scans.target


def split_scans(labels: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Indices of each split's scans: 70, 15 and 15 % of each digit."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(labels == digit))
        cuts = np.round(np.array([0.70, 0.85]) * len(indices)).astype(int)
        for part, chosen in zip(parts.values(), np.split(indices, cuts), strict=True):
            part.append(chosen)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def deal(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `count` of `size` scans, each as often as any other, in random order."""
    return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]


def enlarge(scans: np.ndarray) -> np.ndarray:
    """Scans [N, 8, 8] -> ink of cells [N, CELL, CELL], float32 from 0 to 1."""
    edge = (CELL - GLYPH) // 2
    glyphs = [np.asarray(Image.fromarray(scan).resize((GLYPH, GLYPH), Image.Resampling.BICUBIC)) for scan in scans]
    return np.pad(np.stack(glyphs).clip(0, 1), ((0, 0), (edge, edge), (edge, edge)))


def augment(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turns, stretches, shears, moves, bends and fades each cell [N, CELL, CELL] in a way of its own."""
    return np.concatenate([_augment(part, rng) for part in np.array_split(cells, -(-len(cells) // 2048))])


def _augment(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = len(cells)
    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION, count))
    across, down = 1 + rng.uniform(-SCALE, SCALE, (2, count))
    shear = rng.uniform(-SHEAR, SHEAR, count)
    cos, sin = np.cos(angle), np.sin(angle)
    # From a cell's pixel (x, y) to where its ink comes from: a shear, then a rotation, then a stretch.
    matrix = np.array([[cos / across, (cos * shear - sin) / across], [sin / down, (sin * shear + cos) / down]])
    shift = rng.uniform(-SHIFT, SHIFT, (2, count, 1, 1))
    bend = rng.normal(0, ELASTIC, (2, count, 4, 4))
    gain = 1 + rng.uniform(-GAIN, GAIN, (count, 1, 1))

    centre = (CELL - 1) / 2
    axis = np.arange(CELL) - centre
    x, y = np.meshgrid(axis, axis)
    smooth = _interpolation(4, CELL)
    displacement = np.matmul(np.matmul(smooth, bend), smooth.T) + shift + centre
    from_x = (matrix[0, 0, :, None, None] * x + matrix[0, 1, :, None, None] * y + displacement[0]).astype(np.float32)
    from_y = (matrix[1, 0, :, None, None] * x + matrix[1, 1, :, None, None] * y + displacement[1]).astype(np.float32)
    return (_sample(cells, from_x, from_y) * gain.astype(np.float32)).clip(0, 1)


def _interpolation(points: int, pixels: int) -> np.ndarray:
    """[pixels, points] weights of linear interpolation, with the outer points at the edges."""
    place = np.linspace(0, points - 1, pixels)
    return (1 - np.abs(place[:, None] - np.arange(points))).clip(0, 1)


def _sample(cells: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of cells [N, CELL, CELL] at x, y [N, CELL, CELL]; there is no ink outside."""
    padded = np.pad(cells, ((0, 0), (1, 2), (1, 2))).reshape(-1)
    width = CELL + 3
    x, y = (x + 1).clip(0, CELL + 1), (y + 1).clip(0, CELL + 1)
    left, top = x.astype(np.int32), y.astype(np.int32)
    x, y = x - left, y - top
    corner = np.arange(len(cells), dtype=np.int32)[:, None, None] * width**2 + top * width + left
    upper = padded[corner] * (1 - x) + padded[corner + 1] * x
    lower = padded[corner + width] * (1 - x) + padded[corner + width + 1] * x
    return upper * (1 - y) + lower * y


def compose(cells: np.ndarray, rows: int) -> bytes:
    """Sets the ink of n cells [n, CELL, CELL] in rows, as dark ink on white paper.

    Returns:
      The image as 8-bit grey PNG. It is ceil(n / rows) cells wide; an unfilled cell of the last row is blank.
    """
    columns = -(-len(cells) // rows)
    page = np.zeros((rows * columns, CELL, CELL), np.float32)
    page[: len(cells)] = cells
    page = page.reshape(rows, columns, CELL, CELL).swapaxes(1, 2).reshape(rows * CELL, columns * CELL)
    stream = io.BytesIO()
    Image.fromarray((255 - np.rint(page * 255)).astype(np.uint8)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
