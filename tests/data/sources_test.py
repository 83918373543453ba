"""Data sets by name: reading, and names that do not exist."""

import pathlib
import sys

import pytest

from phantom_jax.data import sources
from phantom_jax.errors import InputError

NAME = "handwritten_numbers/tiny"


def test_records_are_a_sequence(records):
    train = records["train"]
    assert len(train) == 240 and train[-1] == train[239] == list(train)[-1]
    assert train[3].id == "train-00003"
    for index in (240, -241):
        with pytest.raises(IndexError):
            train[index]


def test_unknown_names_list_the_known(data_dir):
    with pytest.raises(InputError, match="handwritten_numbers/tiny"):
        sources.prepare("handwriting", data_dir)
    with pytest.raises(InputError, match="no split 'dev'.* train, validation|no split 'dev'.* test, train"):
        sources.open_records(NAME, "dev", data_dir)


def test_unprepared_data_is_named(tmp_path):
    for open_it in (
        lambda: sources.open_records(NAME, "train", tmp_path),
        lambda: sources.open_tokenizer(NAME, tmp_path),
    ):
        with pytest.raises(InputError, match=f"{NAME} is not prepared in '{tmp_path}'. Prepare it there"):
            open_it()


def test_another_data_set_in_the_folder_is_named(data_dir):
    with pytest.raises(
        InputError, match=f"'{data_dir}' holds {NAME}, not handwritten_numbers. Set data.name to '{NAME}'"
    ):
        sources.open_records("handwritten_numbers", "train", data_dir)


def test_preparing_again_leaves_what_is_there(data_dir):
    folder = data_dir / NAME / "1.0.0"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert sources.prepare(NAME, data_dir) == str(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_missing_scans_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="Install phantom-jax"):
        sources.prepare(NAME, tmp_path)
    with pytest.raises(InputError, match="is not prepared"):
        sources.open_records(NAME, "train", tmp_path)


def test_a_damaged_tokenizer_is_made_anew(tmp_path):
    folder = pathlib.Path(sources.prepare(NAME, tmp_path))
    before = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    sources.prepare(NAME, tmp_path)
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == before
