"""Stop strings: what is refused, and that the automaton finds what searching finds."""

import numpy as np
import pytest

from phantom_jax.data.stop_strings import MAX_STOP_BYTES, check_stops, stop_automaton, stop_bytes
from phantom_jax.errors import InputError
from tests.data import small_tokenizers


@pytest.fixture(scope="module")
def tokenizer():
    made = small_tokenizers.byte_level()
    made.add_tokens(["<|plain|>"])
    return made


def test_special_tokens_become_ids_and_the_rest_stays_text(tokenizer):
    end, start = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|im_start|>")
    stops = ["\n\n", "<|im_end|>", "[/INST]", "<|plain|>", "<|im_start|>", "</answer>", "\n\n", "<|im_end|>", "<|"]
    assert check_stops(stops, tokenizer) == (("\n\n", "[/INST]", "<|plain|>", "</answer>", "<|"), (end, start))
    assert check_stops("Human:", tokenizer) == (("Human:",), ())
    assert check_stops("<|im_end|>", tokenizer) == ((), (end,))
    assert check_stops((), tokenizer) == ((), ())
    llama = small_tokenizers.llama_like()
    assert check_stops(["</s>", "<|im_end"], llama) == (("<|im_end",), (2,))


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ("", "A stop is the empty string"),
        (["a", ""], "A stop is the empty string"),
        (["a", 3], r"The stops are \['a', 3\]. Give a string or a list of strings"),
        (None, "The stops are None"),
        (b"ab", "The stops are b'ab'"),
        ([f"s{n}" for n in range(17)], "There are 17 stops. Give at most 16"),
        ("<|eot|>", r"The stop '<\|eot\|>' is no special token of this tokenizer: its special tokens are <\|endoftext"),
        ("</s>", "The stop '</s>' is no special token"),
        ("<s>", "The stop '<s>' is no special token"),
        ("<|im_end|>\n", r"can never be found: the special token '<\|im_end\|>' has no text"),
        (["a" * 200, "é" * 28], "have 256 bytes together; at most 255"),
        ("\ud83d", "half a surrogate pair"),
    ],
)
def test_other_stops_are_refused_in_one_sentence(tokenizer, stops, message):
    with pytest.raises(InputError, match=message):
        check_stops(stops, tokenizer)


def test_a_long_list_of_special_tokens_is_cut(tokenizer):
    made = small_tokenizers.byte_level()
    made.add_special_tokens([f"<|reserved_{n}|>" for n in range(50)])
    with pytest.raises(InputError, match=r"</img>, <IMG_CONTEXT>, <\|reserved_0\|>, .* and 48 more\. ") as error:
        check_stops("<|eot|>", made)
    assert "reserved_2|" not in str(error.value)


def test_repeated_stops_count_once(tokenizer):
    assert check_stops(["a" * 100] * 3, tokenizer) == (("a" * 100,), ())


def test_the_longest_stops_have_256_states():
    automaton = stop_automaton(["a" * 100, "b" * (MAX_STOP_BYTES - 100)])
    assert automaton.next_state.shape == (256, 256)
    assert automaton.depth.max() == MAX_STOP_BYTES - 100


def test_without_stops_there_is_only_the_start():
    automaton = stop_automaton(())
    assert automaton.next_state.tolist() == [[0] * 256]
    assert automaton.found.tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_searching_finds(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        stops = ["".join(rng.choice([*"ab"], rng.integers(1, 6))) for _ in range(rng.integers(1, 5))]
        encoded = stop_bytes(stops)
        automaton = stop_automaton(stops)
        data, state = b"", 0
        for byte in rng.choice([*b"aab", *b"b", *b"c"], 60).tolist():
            data += bytes([byte])
            state = automaton.next_state[state, byte]
            assert automaton.found[state] == max(len(stop) if data.endswith(stop) else 0 for stop in encoded)
            begun = [n for stop in encoded for n in range(len(stop) + 1) if data.endswith(stop[:n])]
            assert automaton.depth[state] == max(begun)
