"""A small data set with its tokenizer and processor, prepared once."""

import pytest

from phantom_jax.data import sources
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.processor import Processor

NAME = "handwritten_numbers/tiny"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sources.prepare(NAME, folder)
    return folder


@pytest.fixture(scope="session")
def records(data_dir):
    return {split: sources.open_records(NAME, split, data_dir) for split in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def processor(data_dir):
    return Processor(
        sources.open_tokenizer(NAME, data_dir),
        TEMPLATES["qwen2"],
        tile_size=32,
        max_tiles=6,
        tokens_per_tile=4,
        max_length=64,
    )
