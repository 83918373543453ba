"""Tile grids and pixels against the reference, and images that are none."""

import io
import json
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from phantom_jax.data import tiles
from phantom_jax.errors import InputError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def golden(name):
    """A folder of other models may come without tiles; then the copy of this project decides."""
    path = pathlib.Path(os.environ.get("PHANTOM_JAX_GOLDEN", GOLDEN)) / name
    return path if path.exists() else GOLDEN / name


def encoded(image, form="PNG", **kwargs):
    stream = io.BytesIO()
    image.save(stream, form, **kwargs)
    return stream.getvalue()


def picture(width=20, height=10, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_grids_are_those_of_the_reference():
    rows = json.loads(golden("tile_grids.json").read_text())
    assert len(rows) > 100
    for width, height, columns, lines, count in rows:
        assert tiles.tile_grid(width, height, tile_size=448, max_tiles=6) == (columns, lines), (width, height)
        assert tiles.tile_count(width, height, tile_size=448, max_tiles=6) == count


def test_pixels_are_those_of_the_reference():
    reference = np.load(golden("tiles.npz"))
    images = [key for key in reference.files if key.startswith("image_")]
    assert images
    for key in images:
        index = key.removeprefix("image_")
        ours = tiles.split_tiles(Image.fromarray(reference[key]), tile_size=448, max_tiles=6)
        ours = ((ours / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)
        assert ours.shape == tuple(reference[f"tiles_{index}_shape"])
        np.testing.assert_allclose(ours.mean((2, 3)), reference[f"tiles_{index}_mean"], atol=1e-5)
        np.testing.assert_allclose(ours.std((2, 3), ddof=1), reference[f"tiles_{index}_std"], atol=1e-5)
        np.testing.assert_allclose(ours[:, :, 200:216, 200:216], reference[f"tiles_{index}_crop"], atol=1e-5)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_listed_format_opens(form, tmp_path):
    data = encoded(picture(), form)
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image", str(tmp_path / "image")):
        image = tiles.open_image(source)
        assert (image.mode, image.size) == ("RGB", (20, 10))


def test_uncommon_modes_become_rgb():
    for mode in ("RGBA", "LA", "L", "P", "1"):
        assert tiles.open_image(encoded(picture().convert(mode))).mode == "RGB"
    assert tiles.open_image(encoded(picture().convert("CMYK"), "JPEG")).mode == "RGB"
    transparent = encoded(picture().convert("P"), transparency=b"\x00\x80")
    assert tiles.open_image(transparent).mode == "RGB"


def test_sixteen_bits_keep_their_contrast():
    grey = Image.fromarray((np.arange(256, dtype=np.uint16) * 256 + 77).reshape(16, 16))
    np.testing.assert_array_equal(np.asarray(tiles.open_image(encoded(grey)))[..., 0].ravel(), np.arange(256))


def test_first_frame_of_an_animation():
    first, second = picture(seed=1).convert("P"), picture(seed=2).convert("P")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(
        np.asarray(tiles.open_image(data)), np.asarray(tiles.open_image(encoded(first, "GIF")))
    )


def test_exif_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert tiles.open_image(encoded(picture(), "JPEG", exif=exif)).size == (20, 10)


def bomb(width, height):
    """A PNG of a few bytes whose header promises far more."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>not found</html>", "<!DOCTYPE html>"),
        (encoded(picture(200, 200))[:5000], "cut short"),
        (encoded(picture(200, 200), "JPEG")[:2000], "cut short"),
        (bomb(20000, 20000), "has too many pixels; at most"),
        (bomb(9000, 9000), "9000 x 9000 pixels"),
        (encoded(picture(), "TIFF"), "is not an image of the formats"),
        (encoded(picture(), "PPM"), "is not an image of the formats"),
    ],
    ids=["empty", "html", "png", "jpeg", "bomb", "large", "tiff", "ppm"],
)
def test_bad_images_name_themselves(data, message):
    with pytest.raises(InputError, match=message) as info:
        tiles.open_image(data, "record 7")
    assert "record 7" in str(info.value)


def test_missing_files_name_themselves(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            tiles.open_image(path)


def test_one_pixel_is_an_image():
    assert tiles.split_tiles(picture(1, 1), tile_size=32, max_tiles=6).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("columns, rows", [(1, 1), (2, 1), (6, 1), (1, 2), (2, 2), (3, 2)])
def test_tiles_are_read_row_by_row(columns, rows):
    image = np.zeros((rows * 32, columns * 32, 3), np.uint8)
    for index in range(columns * rows):
        row, column = divmod(index, columns)
        image[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] = 10 * index + 5
    cut = tiles.split_tiles(Image.fromarray(image), tile_size=32, max_tiles=6)
    assert len(cut) == columns * rows + (columns * rows > 1)
    for index in range(columns * rows):
        assert (cut[index] == 10 * index + 5).all()


def test_crop_takes_the_middle():
    image = np.zeros((64, 192, 3), np.uint8)
    image[:, 64:128] = 200
    (tile,) = tiles.crop_square(Image.fromarray(image), tile_size=64)
    assert (tile == 200).all()


@pytest.mark.parametrize("width, height", [(30, 10), (10, 31)])
def test_pad_keeps_the_whole_in_the_middle(width, height):
    image, color = picture(width, height), (1, 2, 3)
    square = np.asarray(tiles.pad_square(image, color=color))
    size = max(width, height)
    assert square.shape == (size, size, 3)
    left, top = (size - width) // 2, (size - height) // 2
    np.testing.assert_array_equal(square[top : top + height, left : left + width], np.asarray(image))
    assert (square == color).all(-1).sum() == size * size - width * height


def test_shapes_that_would_fill_the_memory_are_refused():
    strip = Image.new("RGB", (100_000, 2))
    with pytest.raises(InputError, match="record 7 has 100000 x 2 pixels, scaled to a shorter side of 336"):
        tiles.crop_square(strip, tile_size=336, name="record 7")
    with pytest.raises(InputError, match="record 7 has 100000 x 2 pixels, its square"):
        tiles.pad_square(strip, color=(0, 0, 0), name="record 7")
