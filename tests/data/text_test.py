"""Text of answers: whole code points, stop strings, and that streaming changes nothing."""

import itertools

import numpy as np
import pytest

from phantom_jax.data.text import AnswerText, answer_text
from phantom_jax.data.tokenizer import token_bytes
from phantom_jax.errors import InputError
from tests.data import small_tokenizers

BYTES = tuple(bytes([byte]) for byte in range(256))
END = 256
BY_BYTE = {"token_bytes": (*BYTES, b""), "end_ids": (END,)}


def streamed(pushes, *args, **kwargs):
    answer = AnswerText(*args, **kwargs)
    pieces = [answer.push(push) for push in pushes]
    return [*pieces, answer.finish()]


def cuts(token_ids):
    """Every way of cutting a sequence into consecutive pushes."""
    for inside in itertools.product([False, True], repeat=max(0, len(token_ids) - 1)):
        places = [0, *(place for place, cut in enumerate(inside, start=1) if cut), len(token_ids)]
        yield [token_ids[begin:end] for begin, end in itertools.pairwise(places)]


def by_definition(token_ids, table, end_ids, stops, minimum):
    """The answer by looking at the whole byte string again after every byte."""
    data = b""
    for number, token in enumerate(token_ids):
        if token in end_ids:
            break
        for byte in table[token]:
            data += bytes([byte])
            found = [stop.encode() for stop in stops if data.endswith(stop.encode())]
            if found and number >= minimum:
                return data[: -max(map(len, found))].decode("utf-8", "replace").strip()
    return data.decode("utf-8", "replace").strip()


@pytest.mark.parametrize("text", ["🙂", "北京", "a🙂b", "né", "e\u0301", "👩‍🚀 on 🇫🇷", "ひ らがな"])
def test_a_character_of_several_byte_tokens_leaves_in_one_piece_at_its_last(text):
    data = text.encode()
    pieces = streamed([[byte] for byte in data], **BY_BYTE)
    assert "".join(pieces) == text == answer_text(data, **BY_BYTE)
    assert "\ufffd" not in "".join(pieces)
    ends = set(itertools.accumulate(len(character.encode()) for character in text))
    for place, piece in enumerate(pieces, start=1):
        assert not piece or place in ends
        assert len(piece.strip()) <= 1


def test_without_stops_a_letter_leaves_at_once():
    assert streamed([[byte] for byte in b"word"], **BY_BYTE) == ["w", "o", "r", "d", ""]


def test_white_space_leaves_when_something_follows_it():
    pieces = streamed([[byte] for byte in "\n a \n\u3000b\n\n".encode()], **BY_BYTE)
    assert [piece for piece in pieces if piece] == ["a", " \n\u3000b"]
    assert answer_text("\u3000\n".encode(), **BY_BYTE) == ""


def test_the_end_token_ends_it_and_lets_go_of_what_was_held():
    answer = AnswerText(**BY_BYTE, stops=["stop"])
    assert answer.push(b"a st") == "a"
    assert not answer.ended
    assert answer.push([END, *b"op"]) == " st"
    assert answer.ended
    assert (answer.push(b"more"), answer.finish()) == ("", "")


def test_finish_gives_an_unfinished_character_as_malformed():
    answer = AnswerText(**BY_BYTE)
    assert answer.push("a🙂".encode()[:-1]) == "a"
    assert (answer.finish(), answer.finish(), answer.push(b"b")) == ("\ufffd", "", "")
    assert not answer.ended


def test_ids_without_text_add_nothing():
    answer = AnswerText(BYTES, end_ids=(), stops=["ab"])
    assert answer.push([*b"xa", 256, 10**6, -1]) == "x"
    assert answer.push(b"b") == ""
    assert answer.ended


def test_arrays_of_tokens_are_tokens():
    assert answer_text(np.array([*b"abc", END, *b"d"], np.int32), **BY_BYTE) == "abc"


@pytest.mark.parametrize(
    ("text", "stops", "answer"),
    [
        ("one\nHuman: two", ["\nHuman:"], "one"),
        ("ab stop c stop", ["stop"], "ab"),
        ("xabcdy", ["bc", "abcd"], "xa"),
        ("xabcdy", ["bc", "abc"], "x"),
        ("xabcdy", ["abc", "bc"], "x"),
        ("xabcey", ["abcd", "bce"], "xa"),
        ("aab", ["ab"], "a"),
        ("abab", ["abac", "b"], "a"),
        ("ababac", ["abac"], "ab"),
        ("stop", ["stop"], ""),
        ("sto", ["stop"], "sto"),
        ("è é", ["é"], "è"),
        ("🙂🙃🙂", ["🙃"], "🙂"),
        ("北京市", ["京"], "北"),
        ("e\u0301", ["\u0301"], "e"),
        ("a\n\nb", ["\n\n"], "a"),
        ("\n\na", ["\n\n"], ""),
    ],
)
def test_a_stop_string_ends_the_answer_before_it(text, stops, answer):
    data = text.encode()
    assert answer_text(data, **BY_BYTE, stops=stops) == answer
    assert "".join(streamed([[byte] for byte in data], **BY_BYTE, stops=stops)) == answer
    whole = (data,)
    assert answer_text([0], whole, end_ids=(), stops=stops) == answer


def test_only_what_may_become_a_stop_string_is_held():
    pieces = streamed([[byte] for byte in b"s sto st stopx"], **BY_BYTE, stops=["stop"])
    assert pieces == ["", "s", "", "", "", " sto", "", "", " st", "", "", "", "", "", ""]


def test_a_stop_string_that_ends_too_early_is_text():
    tokens = [0, 1, 0, 1, 0, 1]
    table = (b"a.", b"b,c")
    answers = [answer_text(tokens, table, end_ids=(), stops=[",", "."], min_new_tokens=n) for n in range(7)]
    assert answers == ["a", "a.b", "a.b,ca", "a.b,ca.b", "a.b,ca.b,ca", "a.b,ca.b,ca.b", "a.b,ca.b,ca.b,c"]
    # One that begins within the first tokens and ends after them counts.
    assert answer_text(tokens, table, end_ids=(), stops=["c", "ca"], min_new_tokens=2) == "a.b,"


@pytest.mark.parametrize("seed", range(4))
def test_every_way_of_cutting_random_tokens_gives_the_same_answer(seed):
    rng = np.random.default_rng(seed)
    alphabet = [*"🙂é 北".encode(), *b"ab \n", 0xFF, 0xC3, 0xE5, 0xF0]
    for _ in range(25):
        table = [b"", *(bytes(rng.choice(alphabet, rng.integers(1, 5)).tolist()) for _ in range(8))]
        token_ids = rng.integers(0, len(table), 7).tolist()
        stops = ["".join(rng.choice([*"ab \né🙂"], rng.integers(1, 4))) for _ in range(rng.integers(0, 4))]
        options = {"end_ids": (1,), "stops": stops, "min_new_tokens": int(rng.integers(0, 4))}
        expected = by_definition(token_ids, table, (1,), stops, options["min_new_tokens"])
        assert answer_text(token_ids, table, **options) == expected
        for pushes in cuts(token_ids):
            assert "".join(streamed(pushes, table, **options)) == expected


def test_random_bytes_one_by_one_are_the_whole_decoded():
    rng = np.random.default_rng(0)
    leads = [0x41, 0x80, 0xBF, 0xC1, 0xC3, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0x90, 0xA0]
    for length in range(60):
        data = bytes(rng.choice([*leads, *rng.integers(0, 256, 5).tolist()], length).tolist())
        pieces = streamed([[byte] for byte in data], **BY_BYTE)
        assert "".join(pieces) == data.decode("utf-8", "replace").strip()


@pytest.mark.parametrize("make", [small_tokenizers.byte_level, small_tokenizers.llama_like])
def test_a_tokenizers_random_tokens_stream_as_they_decode(make):
    tokenizer = make()
    table = token_bytes(tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(30):
        token_ids = rng.integers(0, len(table), 40).tolist()
        places = [0, *sorted(rng.integers(0, 40, 6).tolist()), 40]
        pushes = [token_ids[begin:end] for begin, end in itertools.pairwise(places)]
        whole = answer_text(token_ids, table, end_ids=())
        assert "".join(streamed(pushes, table, end_ids=())) == whole
        assert whole == b"".join(table[token] for token in token_ids).decode("utf-8", "replace").strip()
    for text in small_tokenizers.TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(streamed([[token] for token in token_ids], table, end_ids=())) == text


def test_a_bad_stop_string_is_an_input_error():
    with pytest.raises(InputError, match="empty string"):
        AnswerText(**BY_BYTE, stops=[""])
