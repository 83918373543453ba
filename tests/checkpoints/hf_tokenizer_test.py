"""Tokenizers of published folders that have no tokenizer.json, and folders whose files do not go together."""

import json

import pytest
import sentencepiece

from phantom_jax.checkpoints.hf_tokenizer import read_tokenizer
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.data.tokenizer import SPECIAL_TOKENS
from phantom_jax.errors import InputError
from phantom_jax.processor import Processor
from tests.sentencepiece_files import texts, train
from tests.tiny_tokenizers import byte_level

INTERNVL = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def write(directory, content=None, **files):
    """A folder with a tokenizer.model and JSON files."""
    if content is not None:
        (directory / "tokenizer.model").write_bytes(content)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def internlm2(directory, **changes):
    """As InternLM2-chat and Phantom publish it: placeholders at the end of the file, renamed beside it."""
    content = train(user_defined_symbols="[UNUSED_TOKEN_145],[UNUSED_TOKEN_146]", vocab_size=901)
    size = sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()
    # SentencePiece itself puts them first.
    markers = {"3": {"content": "<|im_end|>", "special": True}, "4": {"content": "<|im_start|>", "special": True}}
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": markers,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *INTERNVL],
        "bos_token": "<s>",
        **changes,
    }
    added = {token: size + number for number, token in enumerate(INTERNVL)}
    return write(directory, content, tokenizer_config=config, added_tokens=added), size


def test_internlm2(tmp_path):
    directory, size = internlm2(tmp_path)
    (directory / "tokenization_internlm2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tokenizer = read_tokenizer(directory)
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert [tokenizer.token_to_id(token) for token in INTERNVL] == list(range(size, size + 9))
    assert (tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|im_start|>")) == (3, 4)
    assert tokenizer.token_to_id("[UNUSED_TOKEN_145]") is None
    assert tokenizer.encode("the <|im_start|>").tokens == ["<s>", "▁the", "▁", "<|im_start|>"]
    processor = Processor(tokenizer, TEMPLATES["internlm2"], 28, 6, 2, 4096)
    judge = sentencepiece.SentencePieceProcessor(model_proto=(directory / "tokenizer.model").read_bytes())
    for text in texts(100):
        prompt = processor.encode_prompt(text)
        parts = judge.encode(f"user\n{text}"), judge.encode("assistant\n")
        assert prompt.token_ids.tolist() == [4, *parts[0], 3, 4, *parts[1]]
    assert not (tmp_path / "ran").exists()


def test_what_stands_around_every_text(tmp_path):
    content = train()
    plain = sentencepiece.SentencePieceProcessor(model_proto=content).encode("the")
    for config, expected in (
        ({}, [1, *plain]),
        ({"add_bos_token": False}, plain),
        ({"add_eos_token": True, "eos_token": {"content": "</s>"}}, [1, *plain, 2]),
    ):
        tokenizer = read_tokenizer(write(tmp_path, content, tokenizer_config=config))
        assert tokenizer.encode("the").ids == expected
    config = {"bos_token": None, "add_eos_token": True, "eos_token": "<|end|>"}
    tokenizer = read_tokenizer(write(tmp_path, content, tokenizer_config=config))
    assert tokenizer.encode("the").ids == [1, *plain, 900]


@pytest.mark.parametrize("legacy, tokens", [({}, "▁a"), ({"legacy": True}, "▁a"), ({"legacy": False}, "a")])
def test_a_space_before_every_run_unless_the_config_says_otherwise(legacy, tokens, tmp_path):
    tokenizer = read_tokenizer(write(tmp_path, train(), tokenizer_config=legacy))
    assert tokenizer.encode("</s>a", add_special_tokens=False).tokens == ["</s>", tokens]


def test_named_tokens_that_have_no_id_come_last(tmp_path):
    special = {"bos_token": {"content": "<s>"}, "pad_token": "[PAD]", "additional_special_tokens": ["<x>"]}
    tokenizer = read_tokenizer(write(tmp_path, train(), special_tokens_map=special))
    assert (tokenizer.token_to_id("[PAD]"), tokenizer.token_to_id("<x>")) == (900, 901)
    assert tokenizer.get_added_tokens_decoder()[900].special


def test_flags_of_added_tokens(tmp_path):
    tokens = {"2": {"content": "</s>", "rstrip": True}, "900": {"content": "<|user|>", "rstrip": True, "special": True}}
    config = {"added_tokens_decoder": {**tokens, "901": {"content": "<think>"}}}
    directory = write(tmp_path, train(), tokenizer_config=config, added_tokens={"<|user|>": 900})
    added = read_tokenizer(directory).get_added_tokens_decoder()
    assert added[900].rstrip and added[900].special and added[2].rstrip and not added[901].special


def decoder(token_id, content):
    return {"tokenizer_config": {"added_tokens_decoder": {token_id: {"content": content}}}}


NOT_FITTING = {
    "gap": ({"added_tokens": {"<x>": 950}}, "'<x>' the id 950, with this vocabulary it has 900"),
    "two ids": (decoder("901", "<s>"), "'<s>' the id 901, with this vocabulary it has 1"),
    "an ordinary piece": (decoder("300", "<x>"), "token '<x>' is given id 300, which is the piece"),
    "two names": ({**decoder("900", "<x>"), "added_tokens": {"<y>": 900}}, "id 900 is '<y>' in added.* '<x>' in"),
    "no number": ({"added_tokens": {"<x>": "one"}}, "does not list tokens and their ids"),
    "no content": ({"tokenizer_config": {"added_tokens_decoder": {"900": {}}}}, "does not list tokens and their ids"),
    "a list": ({"tokenizer_config": {"added_tokens_decoder": ["<x>"]}}, "does not list tokens and their ids"),
    "negative": ({"added_tokens": {"<x>": -1}}, "'<x>'.* id -1"),
    "no object": ({"added_tokens": [1]}, "added_tokens.json holds list, not a JSON object"),
}


@pytest.mark.parametrize("files, message", NOT_FITTING.values(), ids=NOT_FITTING.keys())
def test_ids_that_do_not_fit_are_refused(files, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_tokenizer(write(tmp_path, train(), **files))


def test_a_damaged_model_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.model: it is damaged or no SentencePiece file"):
        read_tokenizer(write(tmp_path, b"<html>"))


def qwen2(directory, **config):
    """vocab.json and merges.txt as Qwen2 publishes them."""
    model = json.loads(byte_level().to_str())["model"]
    ordinary = [token for token in model["vocab"] if token not in SPECIAL_TOKENS]
    write(directory, vocab={token: number for number, token in enumerate(ordinary)}, tokenizer_config=config)
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return len(ordinary)


def test_qwen2(tmp_path):
    size = qwen2(tmp_path, tokenizer_class="Qwen2Tokenizer")
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {token: size + number for number, token in enumerate([*first, *INTERNVL])}
    write(tmp_path, added_tokens=ids, special_tokens_map={"additional_special_tokens": [*first[1:], *INTERNVL]})
    tokenizer = read_tokenizer(tmp_path)
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids
    processor = Processor(tokenizer, TEMPLATES["qwen2"], 28, 6, 2, 4096)
    assert processor.decode(processor.encode_prompt("Née à 北京? 482 🙂").token_ids[1:]) == "user\nNée à 北京? 482 🙂"


def test_no_code_of_a_folder_runs(tmp_path):
    size = qwen2(
        tmp_path,
        tokenizer_class="OurTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_ours.OurTokenizer", "tokenization_ours.OurTokenizer"]},
    )
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import Qwen2Tokenizer as OurTokenizer\n"
    (tmp_path / "tokenization_ours.py").write_text(code)
    with pytest.raises(InputError, match="tokenizer_class='OurTokenizer', which transformers does not have"):
        read_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, tokenizer_config={**config, "tokenizer_class": "Qwen2Tokenizer"})
    assert read_tokenizer(tmp_path).get_vocab_size() >= size
    assert not (tmp_path / "ran").exists()


def test_damaged_vocabularies_are_refused(tmp_path):
    qwen2(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(InputError, match="make no Qwen2Tokenizer"):
        read_tokenizer(tmp_path)
    for name in ("AutoModel", "load_tool", "__name__", 3):
        write(tmp_path, tokenizer_config={"tokenizer_class": name})
        with pytest.raises(InputError, match="which transformers does not have"):
            read_tokenizer(tmp_path)


def test_nothing_to_read(tmp_path):
    assert read_tokenizer(tmp_path) is None
    write(tmp_path, vocab={})
    assert read_tokenizer(tmp_path) is None
