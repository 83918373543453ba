"""The tables: what they say of names, and that each is a bijection, down to the last number."""

import dataclasses

import numpy as np
import pytest

from phantom_jax.checkpoints import hf, hf_config
from phantom_jax.checkpoints.names import Convolution, GroupedQKV, Linear, Reshape, Row, Transform
from phantom_jax.models import zoo
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from tests.models import small

_CLIP = dataclasses.replace(
    zoo.clip_large(), embed_dim=24, num_layers=2, num_heads=3, mlp_dim=40, patch_size=7, image_size=28
)
_INTERNVIT = VisionTowerConfig(embed_dim=24, num_layers=2, num_heads=3, mlp_dim=40, patch_size=7, image_size=28)


def model(vision, projector, **decoder):
    language_model = dataclasses.replace(small.DECODER, num_heads=6, num_kv_heads=2, head_dim=10, **decoder)
    shuffle = 2 if projector == "pixel_shuffle" else 1
    return VisionLanguageConfig(
        vision, ProjectorConfig(projector, vision.embed_dim, language_model.embed_dim, shuffle), language_model
    )


def phantom(language_model, vision=_INTERNVIT, **decoder):
    config = model(vision, "pixel_shuffle", phantom=PhantomConfig(), qkv_bias=language_model == "qwen2", **decoder)
    return config, hf_config.Published("phantom", language_model)


def llava(layout, projector, **published):
    return model(_CLIP, projector), hf_config.Published(layout, "llama", **published)


FAMILIES = {
    "qwen2": phantom("qwen2"),
    "qwen2 tied": phantom("qwen2", tie_embeddings=True),
    "internlm2": phantom("internlm2"),
    "phi3": phantom("phi3"),
    "internvit with qk-norm": phantom("phi3", dataclasses.replace(_INTERNVIT, qk_norm=True, norm="rms_norm")),
    "llava-hf": llava("llava-hf", "mlp2x_gelu"),
    "llava-hf linear": llava("llava-hf", "linear"),
    "llava-original": llava("llava-original", "mlp2x_gelu"),
    "llava-original linear": llava("llava-original", "linear"),
    "llava-original without tower": llava("llava-original", "linear", tower_inside=False),
}


def numbers(starts, length):
    """Fetches from a tensor whose numbers are 0, 1, 2, ..."""
    return (starts[:, None] + np.arange(length)).reshape(-1)


def whole(view):
    return view.read(tuple(slice(0, axis) for axis in view.shape), numbers)


def shapes_of(row: Row, shapes):
    return [shapes[path][row.layers is not None :] for path in row.paths]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_is_a_bijection(family):
    """Each parameter stands in one row, each published name is there once, each number of a tensor is in one view."""
    config, published = FAMILIES[family]
    rows, shapes = hf.table(config, published), hf.shapes(config)
    names, paths = [name for row in rows for name in row.names()], [path for row in rows for path in row.paths]
    assert len(names) == len(set(names)) and len(paths) == len(set(paths))
    outside = {path for path in shapes if "vision_tower/" in path} if not published.tower_inside else set()
    assert set(paths) == set(shapes) - outside
    for row in rows:
        layout = row.transform.layout(shapes_of(row, shapes))
        assert [view.shape for view in layout.views] == shapes_of(row, shapes)
        # Each view of the numbers 0, 1, 2, ... says which of them are its own.
        size, parts = int(np.prod(layout.shape)), [whole(view) for view in layout.views]
        assert np.array_equal(np.sort(np.concatenate([part.reshape(-1) for part in parts])), np.arange(size)), row.name
        # And back, in blocks that cut the tensor wherever it may be cut.
        for limit in (1, 50, size):
            again = np.concatenate([block() for block in layout.blocks(parts, limit, np.int64)])
            assert np.array_equal(again, np.arange(size)), (row.name, limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_read_alone(family):
    """Any part equals that part of the whole, and no other number is fetched than those of whole heads around it."""
    config, published = FAMILIES[family]
    shapes, rng = hf.shapes(config), np.random.default_rng(0)
    for row in hf.table(config, published):
        layout = row.transform.layout(shapes_of(row, shapes))
        for view in layout.views:
            fetched = []

            def fetch(starts, length, fetched=fetched):
                fetched.append(len(starts) * length)
                return numbers(starts, length)

            all_of_it = whole(view)
            for _ in range(8):
                box = tuple(slice(*sorted(rng.integers(0, axis + 1, 2))) for axis in view.shape)
                fetched.clear()
                part = view.read(box, fetch)
                assert np.array_equal(part, all_of_it[box])
                if not isinstance(row.transform, GroupedQKV):
                    assert sum(fetched) == part.size, row.name


def heads(rows, count):
    """[in, heads, head] of the rows [heads * head, in] of a published matrix."""
    return rows.reshape(count, -1, rows.shape[-1]).transpose(2, 0, 1)


# Transform, shapes of our arrays, shape of the published tensor, and our arrays by the formulas of the published code.
FORMULAS = {
    "as it is": (Transform(), [(3, 4)], (3, 4), lambda tensor: [tensor]),
    "axes of size one": (Reshape((1, 1, 6)), [(6,)], (1, 1, 6), lambda tensor: [tensor[0, 0]]),
    "bias of heads": (Reshape((6,)), [(3, 2)], (6,), lambda tensor: [np.stack(np.split(tensor, 3))]),
    "matrix": (Linear(), [(4, 6)], (6, 4), lambda tensor: [tensor.T]),
    "query": (Linear(), [(4, 3, 2)], (6, 4), lambda tensor: [heads(tensor, 3)]),
    "out": (Linear(2), [(3, 2, 4)], (4, 6), lambda tensor: [np.stack(np.split(tensor.T, 3))]),
    "packed biases": (Linear(0), [(3, 2)] * 3, (18,), lambda tensor: [b.reshape(3, 2) for b in np.split(tensor, 3)]),
    "packed matrices": (Linear(), [(4, 6), (4, 6)], (12, 4), lambda tensor: [m.T for m in np.split(tensor, 2)]),
    "packed heads": (
        Linear(),
        [(5, 4, 2), (5, 2, 2), (5, 2, 2)],
        (16, 5),
        lambda tensor: [heads(rows, len(rows) // 2) for rows in np.split(tensor, [8, 12])],
    ),
    "grouped heads": (
        GroupedQKV(),
        [(5, 6, 4), (5, 2, 4), (5, 2, 4)],
        (40, 5),
        # Of each of the two key-value heads: three query heads, the key, the value.
        lambda tensor: [
            np.concatenate([heads(group[:12], 3) for group in np.split(tensor, 2)], axis=1),
            np.stack([group[12:16].T for group in np.split(tensor, 2)], axis=1),
            np.stack([group[16:].T for group in np.split(tensor, 2)], axis=1),
        ],
    ),
    "patches": (Convolution(), [(2, 3, 3, 5)], (5, 3, 2, 3), lambda tensor: [tensor.transpose(2, 3, 1, 0)]),
}


@pytest.mark.parametrize(("transform", "shapes", "published", "formula"), FORMULAS.values(), ids=FORMULAS.keys())
def test_a_transform_is_its_formula(transform, shapes, published, formula):
    layout = transform.layout(shapes)
    assert layout.shape == published
    tensor, rng = np.arange(np.prod(published)).reshape(published), np.random.default_rng(0)
    for view, expected in zip(layout.views, formula(tensor), strict=True):
        assert np.array_equal(whole(view), expected)
        for _ in range(8):
            box = tuple(slice(*sorted(rng.integers(0, axis + 1, 2))) for axis in view.shape)
            assert np.array_equal(view.read(box, numbers), expected[box])
