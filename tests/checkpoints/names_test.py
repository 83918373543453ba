"""The tables: what they say of names, and that each is a bijection, down to the last number."""

import dataclasses

import numpy as np
import pytest

from phantom_jax.checkpoints import hf, hf_config
from phantom_jax.checkpoints.names import GroupedQKV, Row
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
        size = int(np.prod(layout.shape))

        def fetch(starts, length):
            return (starts[:, None] + np.arange(length)).reshape(-1)

        whole = [view.read(tuple(slice(0, axis) for axis in view.shape), fetch) for view in layout.views]
        assert np.array_equal(np.sort(np.concatenate([part.reshape(-1) for part in whole])), np.arange(size)), row.name
        # And back, in blocks that cut the tensor wherever it may be cut.
        for limit in (1, 50, size):
            again = np.concatenate([block() for block in layout.blocks(whole, limit, np.int64)])
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
                return (starts[:, None] + np.arange(length)).reshape(-1)

            whole = view.read(tuple(slice(0, axis) for axis in view.shape), fetch)
            for _ in range(8):
                box = tuple(slice(*sorted(rng.integers(0, axis + 1, 2))) for axis in view.shape)
                fetched.clear()
                part = view.read(box, fetch)
                assert np.array_equal(part, whole[box])
                if not isinstance(row.transform, GroupedQKV):
                    assert sum(fetched) == part.size, row.name


def test_heads_of_a_group_are_not_torn_apart_in_internlm2():
    """One tensor of the published kind, taken apart by the formula of its code: h = kv head, g = place in its group."""
    width, heads, kv_heads, head_dim = 5, 6, 2, 4
    groups = heads // kv_heads
    tensor = np.arange(kv_heads * (groups + 2) * head_dim * width)
    shapes = [(width, heads, head_dim), (width, kv_heads, head_dim), (width, kv_heads, head_dim)]
    layout = GroupedQKV().layout(shapes)

    def fetch(starts, length):
        return (starts[:, None] + np.arange(length)).reshape(-1)

    query, key, value = (view.read(tuple(slice(0, axis) for axis in view.shape), fetch) for view in layout.views)
    packed = tensor.reshape(kv_heads, groups + 2, head_dim, width)
    for head in range(heads):
        assert np.array_equal(query[:, head], packed[head // groups, head % groups].T)
    for head in range(kv_heads):
        assert np.array_equal(key[:, head], packed[head, -2].T) and np.array_equal(value[:, head], packed[head, -1].T)
