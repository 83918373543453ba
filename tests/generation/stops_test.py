"""Stop strings in a compiled loop: exactly where searching the bytes finds them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phantom_jax.data.text import answer_text
from phantom_jax.errors import InputError
from phantom_jax.generation.stops import advance, stop_table
from tests.generation import tiny


@jax.jit
def read(table, tokens):
    """Matches [T, B] of tokens [T, B]."""
    start = jnp.zeros(tokens.shape[1:], jnp.int32)
    return jax.lax.scan(lambda state, token: advance(table, state, token), start, tokens)[1]


def ends_in_token(data, before, stop):
    """Whether `stop` ends within what follows the first `before` bytes."""
    return data.find(stop, max(0, before - len(stop) + 1)) >= 0


def by_searching(tokens, table, stops):
    matches, data = [], b""
    for token in tokens:
        before = len(data)
        data += table[token] if token < len(table) else b""
        matches.append(any(ends_in_token(data, before, stop.encode()) for stop in stops))
    return matches


def random_case(rng, letters, longest):
    table = [bytes(rng.choice([*letters.encode()], rng.integers(0, longest)).tolist()) for _ in range(10)]
    stops = ["".join(rng.choice([*letters], rng.integers(1, 5))) for _ in range(rng.integers(1, 6))]
    return table, stops


@pytest.mark.parametrize("letters", ["ab", "abc", "aé🙂"])
@pytest.mark.parametrize("longest", [2, 4, 9])
def test_matches_are_what_searching_the_bytes_finds(letters, longest):
    rng = np.random.default_rng(longest)
    found = 0
    for _ in range(10):
        table, stops = random_case(rng, letters, longest)
        tokens = rng.integers(0, 12, (40, 4)).astype(np.int32)
        ours = np.asarray(read(stop_table(table, stops), tokens))
        for row in range(4):
            assert ours[:, row].tolist() == by_searching(tokens[:, row].tolist(), table, stops)
        found += ours.sum()
    assert 0 < found < 1600


def test_a_loop_and_the_text_agree_on_the_last_token():
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(40):
        table, stops = random_case(rng, "ab ", 4)
        tokens, minimum = rng.integers(0, 10, (20, 1)).astype(np.int32), int(rng.integers(0, 5))
        matched = np.asarray(read(stop_table(table, stops), tokens))[:, 0] & (np.arange(20) >= minimum)
        count = int(np.argmax(matched)) + 1 if matched.any() else 20
        options = {"end_ids": (), "stops": stops, "min_new_tokens": minimum}
        whole = answer_text(tokens[:, 0], table, **options)
        assert answer_text(tokens[:count, 0], table, **options) == whole
        stopped += count < 20
    assert 10 < stopped < 40


def test_a_stop_may_straddle_tokens_or_lie_within_one():
    table = stop_table([b"x\nHu", b"man", b":", b"a\nHuman: b", b""], ["\nHuman:", "an"])
    tokens = jnp.array([[0, 3], [4, 4], [1, 0], [2, 2], [2, 1]])
    assert read(table, tokens).T.tolist() == [[False, False, True, True, False], [True, False, False, False, True]]


def test_tokens_beyond_the_table_leave_the_state_alone():
    table = stop_table([b"a", b"b"], ["ab"])
    tokens = jnp.array([[0], [7], [-1], [2], [1]])
    assert read(table, tokens)[:, 0].tolist() == [False, False, False, False, True]


def test_small_sets_share_one_program():
    table = [bytes([byte]) for byte in range(256)]
    tables = [stop_table(table, stops) for stops in ([], ["stop"], ["a" * 31], ["ab", "cd", "\n\n"])]
    assert {(each.transitions.shape, each.transitions.dtype.name) for each in tables} == {((32, 256), "int8")}
    read.clear_cache()
    for each in tables:
        read(each, jnp.zeros((3, 2), jnp.int32))
    assert read._cache_size() == 1


@pytest.mark.parametrize(
    ("length", "rows", "dtype"),
    [(31, 32, "int8"), (32, 64, "int8"), (127, 128, "int8"), (128, 160, "int16"), (255, 256, "int16")],
)
def test_a_long_stop_string_takes_more_rows(length, rows, dtype):
    table = stop_table([b"b", b"a"], ["a" * length])
    assert (table.transitions.shape, table.transitions.dtype.name) == ((rows, 2), dtype)
    matches = read(table, jnp.ones((length + 2, 1), jnp.int32))[:, 0]
    assert matches.tolist() == [False] * (length - 1) + [True] * 3


def test_no_tokens_and_no_stops_never_match():
    assert not read(stop_table([b"a"], []), jnp.zeros((5, 1), jnp.int32)).any()
    assert stop_table([], ["a"]).transitions.shape == (32, 0)


def test_bad_stops_are_an_input_error():
    with pytest.raises(InputError, match="300 bytes together; at most 255"):
        stop_table([b"a"], ["x" * 300])


def test_the_templates_own_stop_ends_an_answer_too():
    vlm = tiny.handle()
    free = vlm.generate("Why?", max_new_tokens=24)
    letter = free[len(free) // 2]
    cut = vlm.generate("Why?", max_new_tokens=24, stop=letter)
    template = dataclasses.replace(vlm.processor.template, stop_text=letter)
    ending = dataclasses.replace(vlm, processor=dataclasses.replace(vlm.processor, template=template))
    assert ending.generate("Why?", max_new_tokens=24) == cut != free
    assert "".join(ending.stream("Why?", max_new_tokens=24)) == cut
    assert "How" in cut and ending.generate("Why?", max_new_tokens=24, stop="ow") == cut.split("ow")[0]
