"""The small tokenizer: its words, its round trip, and that the usual library loads it."""

import json

import numpy as np
import pytest
import tokenizers

from phantom_jax.data import tokenizer as small
from phantom_jax.data.number_questions import PHRASINGS
from phantom_jax.errors import InputError


@pytest.fixture(scope="module")
def trained(processor):
    return processor.tokenizer


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_special_tokens_come_first_and_bytes_are_all_there(trained):
    assert [trained.token_to_id(token) for token in small.SPECIAL_TOKENS] == list(range(6))
    assert 6 + 256 < trained.get_vocab_size() <= 512


def test_digits_stand_alone(trained):
    assert len(ids(trained, "8421")) == 4
    assert len(set(ids(trained, "0123456789"))) == 10
    assert ids(trained, "88") == 2 * ids(trained, "8")


def test_words_of_questions_are_one_token_each(trained):
    for phrasings in PHRASINGS.values():
        for text in phrasings:
            assert len(ids(trained, text)) == len(text.split())
    assert len(ids(trained, "assistant\n")) == len(ids(trained, "user\n")) == 1


@pytest.mark.parametrize("text", ["What is this?", "  two  spaces\n\n", "né à l'été 北京 🙂", "a1b22", "", "\t\x00\n"])
def test_any_text_survives(trained, text):
    assert trained.decode(ids(trained, text)) == text


def test_any_bytes_survive(trained):
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(map(chr, rng.integers(0, 0xD7FF, 20)))
        assert trained.decode(ids(trained, text), skip_special_tokens=False) == text


def test_training_is_deterministic():
    texts = ["Read the number.", "How many digits are there?", "<|im_start|>user\n"] * 3
    assert small.train_tokenizer(texts).to_str() == small.train_tokenizer(iter(texts)).to_str()


def test_the_usual_library_loads_it(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    small.save_tokenizer(trained, tmp_path, end_of_answer="<|im_end|>")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>What is the 1st digit?<|im_end|><|im_start|>assistant\n42<|im_end|>"
    )
    assert loaded(text, add_special_tokens=False).input_ids == ids(trained, text)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", small.PAD)
    assert loaded.decode(ids(trained, text), skip_special_tokens=True) == "user\nWhat is the 1st digit?assistant\n42"
    assert len(loaded) == trained.get_vocab_size()


def test_saving_and_loading_changes_nothing(trained, tmp_path):
    small.save_tokenizer(trained, tmp_path, end_of_answer="<|im_end|>")
    assert small.load_tokenizer(tmp_path).to_str() == trained.to_str()
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert (names["eos_token"], names["pad_token"]) == ("<|im_end|>", small.PAD)


def test_no_tokenizer_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="There is no tokenizer at"):
        small.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        small.load_tokenizer(tmp_path)


def test_a_tokenizer_without_its_own_padding_pads_with_the_end(tmp_path):
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.add_special_tokens(["<|end|>"])
    small.save_tokenizer(other, tmp_path, end_of_answer="<|end|>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["pad_token"]
