"""Images: opened with suspicion, cut into the tiles that the vision tower sees.

In the mode `tiles` a picture is stretched to the grid of square tiles whose shape comes closest to its own, cut row by
row, and followed by a thumbnail of the whole when there is more than one tile (Phantom's and InternVL's dynamic
resolution). In `crop` it is one tile, its middle (CLIP's way, and LLaVA's); in `pad` one tile that holds the whole on a
square of the mean colour (LLaVA 1.5).
"""

import functools
import io
import os
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from phantom_jax.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is decoded. Other decoders of the imaging library are never reached; of an animation the first frame counts."""

MAX_PIXELS = 8192 * 8192
"""Largest image that is decoded, as stated in its header: 200 MB of RGB."""

IMAGE_MODES = ("tiles", "crop", "pad")

Source = bytes | str | os.PathLike | Image.Image


def open_image(source: Source, name: str | None = None) -> Image.Image:
    """Decodes an image to 8-bit RGB.

    Alpha is dropped, 16 bits become 8, and EXIF orientation is left alone, as the reference implementation does.

    Args:
      source: the encoded bytes, a path, or an image that is open already.
      name: what to call the image in an error; by default the path.

    Raises:
      InputError: the image cannot be read, is none of `FORMATS`, is cut short, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _decode(_checked_size(source, name or "The image"), name or "The image")
    stream, name = _stream(source, name)
    with stream:
        return _decode(_header(stream, name), name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(image)
    # Decoders of damaged files raise nearly every class of exception, so that no narrower list would do.
    except Exception as error:
        width, height = image.size
        raise InputError(
            f"{name} ({image.format}, {width} x {height}) is cut short or damaged: {error}. Give an intact file."
        ) from error


def image_size(source: Source, name: str | None = None) -> tuple[int, int]:
    """Width and height from the header alone; errors as `open_image`, except that the pixels may still be damaged."""
    if isinstance(source, Image.Image):
        return source.size
    stream, name = _stream(source, name)
    with stream:
        return _header(stream, name).size


def _stream(source: bytes | str | os.PathLike, name: str | None) -> tuple[BinaryIO, str]:
    if isinstance(source, bytes):
        name = name or "The image"
        if not source:
            raise InputError(f"{name} is empty (0 bytes). Give it again, or leave it out.")
        return io.BytesIO(source), name
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"An image is {type(source).__name__}; give its encoded bytes, a path, or a PIL image.")
    name = name or os.fspath(source)
    try:
        return open(source, "rb"), name
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}. Check the path.") from error


def _header(stream: BinaryIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # The library warns where our own limit refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{name} has too many pixels; at most {MAX_PIXELS} are decoded. Scale it down first."
        ) from error
    except Exception as error:
        stream.seek(0)
        raise InputError(
            f"{name} is not an image of the formats {', '.join(FORMATS)} (it begins with {stream.read(16)!r}). "
            "Convert it to PNG or JPEG."
        ) from error
    return _checked_size(image, name)


def _checked_size(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are decoded. Scale it down first."
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # A plain conversion saturates: all but the darkest 1/256 of a 16-bit scan would turn white.
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@functools.cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of at most `max_tiles` tiles, small areas first."""
    shapes = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


def tile_grid(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Picks the grid for an image of `width` x `height` pixels.

    The grid with the nearest ratio of width to height wins. Of two that are equally near, the larger one wins only
    where the image has pixels for more than half of it.

    Returns:
      (columns, rows), with columns * rows <= max_tiles.
    """
    ratio, pixels = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        distance = abs(ratio - columns / rows)
        enough = pixels > 0.5 * tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and enough):
            best, best_distance = (columns, rows), distance
    return best


def tile_count(width: int, height: int, *, tile_size: int, max_tiles: int) -> int:
    """Number of tiles of an image, the thumbnail included."""
    columns, rows = tile_grid(width, height, tile_size=tile_size, max_tiles=max_tiles)
    return 1 if columns * rows == 1 else columns * rows + 1


def split_tiles(image: Image.Image, *, tile_size: int, max_tiles: int) -> np.ndarray:
    """Cuts an RGB image into tiles.

    Returns:
      [T, tile_size, tile_size, 3] uint8: the grid row by row, then the thumbnail if the grid has more than one tile.
    """
    columns, rows = tile_grid(*image.size, tile_size=tile_size, max_tiles=max_tiles)
    grid = np.asarray(image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC))
    tiles = grid.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2).reshape(-1, tile_size, tile_size, 3)
    if len(tiles) == 1:
        return tiles
    thumbnail = np.asarray(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return np.concatenate([tiles, thumbnail[None]])


def crop_square(image: Image.Image, *, tile_size: int, name: str = "The image") -> np.ndarray:
    """Scales an RGB image so that its shorter side is `tile_size`, and takes the square in its middle.

    Returns:
      [1, tile_size, tile_size, 3] uint8.

    Raises:
      InputError: it is so long and narrow that scaled it has more than `MAX_PIXELS` pixels.
    """
    width, height = image.size
    shorter = min(width, height)
    scaled = (tile_size * width // shorter, tile_size * height // shorter)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, scaled to a shorter side of {tile_size} it would have more than "
            f"{MAX_PIXELS}. Cut it to a less narrow shape first."
        )
    left, top = (scaled[0] - tile_size) // 2, (scaled[1] - tile_size) // 2
    whole = image.resize(scaled, Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + tile_size, top + tile_size)))[None]


def pad_square(image: Image.Image, *, color: Sequence[int], name: str = "The image") -> Image.Image:
    """Puts an RGB image in the middle of a square as large as its longer side.

    Args:
      image: the image.
      color: of the rest of the square, three values of 0 to 255.
      name: what to call the image in an error.

    Raises:
      InputError: the square has more than `MAX_PIXELS` pixels.
    """
    width, height = image.size
    size = max(width, height)
    if size * size > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, its square would have more than {MAX_PIXELS}. Scale it down first."
        )
    square = Image.new("RGB", (size, size), tuple(color))
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return square
