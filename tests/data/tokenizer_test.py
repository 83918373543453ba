"""The small tokenizer: its words, its round trip, and that the usual library loads it; any tokenizer's bytes."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from phantom_jax.data import tokenizer as small
from phantom_jax.data.number_questions import PHRASINGS
from phantom_jax.errors import InputError
from tests.data import small_tokenizers
from tests.tiny_tokenizers import llama


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


def test_first_and_unknown_tokens_are_named_where_they_are_special(tmp_path):
    other = llama("first")
    small.save_tokenizer(other, tmp_path, end_of_answer="</s>")
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        names = json.loads((tmp_path / file).read_text())
        assert (names["bos_token"], names["unk_token"], names["eos_token"]) == ("<s>", "<unk>", "</s>")
        assert names["additional_special_tokens"] == ["<image>"]
    content = json.loads(other.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != "<unk>"]
    content["post_processor"] = None
    small.save_tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), tmp_path, end_of_answer="</s>")
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert not {"bos_token", "unk_token"} & set(names)


KINDS = {"byte-level": small_tokenizers.byte_level, "llama-like": small_tokenizers.llama_like}
TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\tand a tab ",
    "🙂👩‍🚀🇫🇷",
    "北京市 and ひらがな",
    "e\u0301 a\u0308\u0323",
    "mixed 🙂北 né\u0301 <0x0A> ▁ Ġ",
    "\x00\x7f\u00ad\ufffd\U0010ffff",
]


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def any_kind(request):
    return request.param()


def joined(tokenizer, token_ids):
    table = small.token_bytes(tokenizer)
    return b"".join(table[token] for token in token_ids)


@pytest.mark.parametrize("text", [*TEXTS, *small_tokenizers.TEXTS])
def test_joined_bytes_are_what_the_tokenizer_decodes(any_kind, text):
    token_ids = ids(any_kind, text)
    theirs = any_kind.decode(token_ids)
    # LLaMA's decoder takes off the space that its normalizer put before the text, and reads every ▁ as a space.
    llama = any_kind.token_to_id("▁") is not None
    assert joined(any_kind, token_ids).decode() == " " * llama + theirs
    assert theirs == (text.replace("▁", " ") if llama else text)


def test_every_token_of_valid_text_is_the_text_that_the_tokenizer_gives_it(any_kind):
    table = small.token_bytes(any_kind)
    assert len(table) == any_kind.get_vocab_size()
    single = [token for token in range(len(table)) if "\ufffd" not in any_kind.decode([token])]
    assert len(single) > len(table) / 2
    for token in single:
        assert table[token].decode().strip() == any_kind.decode([token]).strip()


def test_every_byte_has_a_token(any_kind):
    assert {bytes([byte]) for byte in range(256)} <= set(small.token_bytes(any_kind))


def test_special_tokens_have_no_text_and_other_added_ones_have_their_content(any_kind):
    before = any_kind.get_vocab_size()
    any_kind = tokenizers.Tokenizer.from_str(any_kind.to_str())
    contents = ["<think>", "a b", "é"]
    any_kind.add_tokens([AddedToken(content, special=False) for content in contents])
    any_kind.add_special_tokens(["<|stop|>"])
    table = small.token_bytes(any_kind)
    special = {number for number, token in any_kind.get_added_tokens_decoder().items() if token.special}
    assert len(special) in (4, 7) and all(table[token] == b"" for token in special)
    assert [table[any_kind.token_to_id(content)].decode() for content in contents] == contents
    assert before < len(table) == any_kind.get_vocab_size()


def test_ids_that_the_vocabulary_leaves_out_have_no_text():
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 1, "Ġb": 4}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert small.token_bytes(tokenizer) == (b"", b"a", b"", b"", b" b")


def test_a_metaspace_decoder_knows_no_byte_tokens():
    tokenizer = tokenizers.Tokenizer(models.BPE({"▁a": 0, "<0x41>": 1, "b_": 2}, []))
    tokenizer.decoder = decoders.Metaspace()
    assert small.token_bytes(tokenizer) == (b" a", b"<0x41>", b"b_")
    tokenizer.decoder = decoders.Metaspace(replacement="_")
    assert small.token_bytes(tokenizer) == ("▁a".encode(), b"<0x41>", b"b ")


REPLACE, FUSE = decoders.Replace("▁", " "), decoders.Fuse()
UNSUPPORTED = {
    "null": None,
    "WordPiece": decoders.WordPiece(),
    "Regex": decoders.Sequence([decoders.Replace(tokenizers.Regex("▁+"), " "), FUSE]),
    '"Strip", .* "Fuse"': decoders.Sequence([REPLACE, decoders.Strip(" ", 1, 0), FUSE]),
    '"content": "x"': decoders.Sequence([REPLACE, FUSE, decoders.Strip("x", 1, 0)]),
    "CTC": decoders.Sequence([REPLACE, decoders.CTC()]),
}


@pytest.mark.parametrize(("named", "decoder"), UNSUPPORTED.items(), ids=range(len(UNSUPPORTED)))
def test_any_other_decoder_is_named_and_refused(named, decoder):
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(InputError, match=f"decoder is .*{named}.*Supported are ByteLevel, Metaspace and"):
        small.token_bytes(tokenizer)
