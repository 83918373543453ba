"""SentencePiece model files: every text's ids against SentencePiece, and files that are none."""

import random
import struct
import time

import pytest
import sentencepiece

from phantom_jax.data.sentencepiece_model import Kind, make_tokenizer, parse
from phantom_jax.data.tokenizer import token_bytes
from phantom_jax.errors import InputError
from tests.sentencepiece_files import texts, train

SETTINGS = {
    "llama": {},
    "without a first space": {"add_dummy_prefix": False},
    "without extra spaces": {"remove_extra_whitespaces": True},
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "without bytes": {"byte_fallback": False},
    "over words": {"split_by_whitespace": False},
}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS.keys())
def content(request):
    return train(**request.param)


def plain(tokenizer):
    """In which nothing that is written is special, as in SentencePiece."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_ids_are_those_of_sentencepiece(content):
    judge = sentencepiece.SentencePieceProcessor(model_proto=content)
    model = parse(content)
    ours = plain(make_tokenizer(model))
    assert [piece.text for piece in model.pieces] == [judge.id_to_piece(i) for i in range(judge.get_piece_size())]
    for text in texts(800):
        assert ours.encode(text, add_special_tokens=False).ids == judge.encode(text), repr(text)


def test_answers_are_what_sentencepiece_decodes():
    content = train()
    judge = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = make_tokenizer(parse(content))
    table = token_bytes(ours)
    for text in texts(200, seed=1):
        ids = judge.encode(text)
        joined = b"".join(table[token] for token in ids).decode().removeprefix(" ")
        assert joined == ours.decode(ids) == judge.decode(ids)


def test_the_first_space_before_every_run_or_the_first_alone():
    model = parse(train(user_defined_symbols="<mark>"))
    assert model.pieces[3].kind is Kind.USER_DEFINED
    every, first = make_tokenizer(model), make_tokenizer(model, every_run=False)
    assert every.encode("the<mark>the").tokens == ["▁the", "<mark>", "▁the"]
    assert first.encode("the<mark>the").tokens == ["▁the", "<mark>", *first.encode("x<mark>the").tokens[-2:]]
    assert "▁the" not in first.encode("x<mark>the").tokens


def test_user_defined_pieces_are_one_token_each():
    content = train(user_defined_symbols="<mark>,<mark>s")
    judge = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = plain(make_tokenizer(parse(content), every_run=False))
    for text in ("the <mark> and", "a<mark>sb<mark>", "two<mark><mark>s"):
        assert ours.encode(text).ids == judge.encode(text)


def varint(number):
    head = b""
    while number > 127:
        head += bytes([number & 127 | 128])
        number >>= 7
    return head + bytes([number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text, score=0.0, kind=1):
    return field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))


BPE, IDENTITY = field(2, field(3, 2) + field(35, 1)), field(3, field(4, 0))
UNKNOWN = piece("<unk>", kind=2)


def test_as_many_pieces_as_internlm2_has():
    rng = random.Random(0)  # noqa: S311
    words = [chr(code) for code in (*range(97, 123), 0x2581, *range(0x4E00, 0x4E00 + 5000))]
    seen = set(words)
    while len(words) < 92544 - 259:
        word = "".join(words[rng.randrange(min(len(words), 20000))] for _ in range(2))
        if len(word) <= 16 and word not in seen:
            seen.add(word)
            words.append(word)
    first = [UNKNOWN, piece("<s>", kind=3), piece("</s>", kind=3)]
    first += [piece(f"<0x{byte:02X}>", kind=6) for byte in range(256)]
    scored = [piece(word, -rank) for rank, word in enumerate(words)]
    content = b"".join([*first, *scored, BPE, IDENTITY])
    start = time.perf_counter()
    ours = make_tokenizer(parse(content))
    # A second or two where nothing else runs.
    assert time.perf_counter() - start < 60
    assert ours.get_vocab_size() == 92544
    judge = sentencepiece.SentencePieceProcessor(model_proto=content)
    for _ in range(100):
        text = "".join(rng.choice(words) for _ in range(8))
        assert ours.encode(text).ids == judge.encode(text)


DAMAGED = {
    "empty": (b"", "not complete, or no SentencePiece file"),
    "html": (b"<!DOCTYPE html><html>", "damaged or no SentencePiece file .*wire type 4"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "damaged or no SentencePiece file"),
    "text": (b"\n" * 100, "damaged or no SentencePiece file"),
    "only pieces": (UNKNOWN + piece("a"), "not complete"),
    "number for a piece": (field(1, 7) + BPE + IDENTITY, "a number stands where a message should"),
    "text of a number": (field(1, field(1, 7)) + BPE + IDENTITY, "damaged"),
    "no text": (field(1, field(3, 1)) + BPE + IDENTITY, "a piece has no text"),
    "bad kind": (UNKNOWN + piece("a", kind=9) + BPE + IDENTITY, "damaged .*9 is not a valid Kind"),
    "bad utf-8": (field(1, field(1, b"\xff")) + BPE + IDENTITY, "damaged .*utf-8"),
    "endless number": (b"\xff" * 50, "more than ten bytes"),
    "twice": (UNKNOWN + piece("a") + piece("a") + BPE + IDENTITY, "pieces 1 and 2 are both 'a'"),
    "no unknown": (piece("a") + BPE + IDENTITY, "exactly one piece for what is unknown"),
    "unigram": (UNKNOWN + field(2, b"") + IDENTITY, "of type unigram: only bpe"),
    "suffix": (UNKNOWN + field(2, field(3, 2) + field(24, 1)) + IDENTITY, "spaces after words"),
    "bad table": (UNKNOWN + BPE + field(3, field(2, b"abc")), "damaged or no SentencePiece file"),
    "number for settings": (UNKNOWN + field(2, 5) + IDENTITY, "a number stands where a message should"),
}


@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_bpe_model_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        parse(content)


def test_truncated_and_changed_files_are_refused_or_read():
    content = train()
    for end in range(0, len(content), 997):
        with pytest.raises(InputError):
            parse(content[:end])
    rng = random.Random(0)  # noqa: S311
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] = rng.randrange(256)
        try:
            make_tokenizer(parse(bytes(changed)))
        except InputError:
            continue


def test_a_unigram_model_is_named():
    with pytest.raises(InputError, match="of type unigram"):
        parse(train(model_type="unigram"))


def test_only_pieces_that_no_text_is_made_of_are_renamed():
    model = parse(train(user_defined_symbols="[UNUSED_TOKEN_1]"))
    assert model.renamed({3: "<|im_start|>"}).pieces[3].text == "<|im_start|>"
    assert model.renamed({1: "<s>"}) == model
    normal = next(i for i, one in enumerate(model.pieces) if one.kind is Kind.NORMAL)
    with pytest.raises(InputError, match=f"given id {normal}, which is the piece"):
        model.renamed({normal: "<|im_start|>"})
    with pytest.raises(InputError, match="given id 10, which is the piece '<0x06>'"):
        model.renamed({10: "<|im_start|>"})
    with pytest.raises(InputError, match="pieces 1 and 3 are both '<s>'"):
        model.renamed({3: "<s>"})
    # A placeholder is one also where the file calls it an ordinary piece.
    placeholder = parse(UNKNOWN + piece("a") + piece("[U1]") + BPE + IDENTITY)
    assert placeholder.renamed({2: "<|im_end|>"}).pieces[2].text == "<|im_end|>"
