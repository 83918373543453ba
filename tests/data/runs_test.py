"""Runs of text: tokenised as in the whole text, with every token's place, and nothing special in what users write."""

import pytest

from phantom_jax.data.runs import RunEncoder, Special
from tests.tiny_tokenizers import LLAMA_KINDS, byte_level, llama

RUNS = ["USER: What is it?", " x", "\n\nWhat", "482", " ", "猫 and 😀", "  two  spaces  "]


@pytest.mark.parametrize("kind", LLAMA_KINDS)
@pytest.mark.parametrize("opening", RUNS)
def test_runs_are_tokenised_as_in_the_whole_text(kind, opening):
    tokenizer = llama(kind)
    encoder = RunEncoder(tokenizer)
    for following in RUNS:
        whole = tokenizer.encode(f"{opening}</s>{following}<image>{following}", add_special_tokens=False).ids
        end, image = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<image>")
        first, second = encoder.encode(opening, True), encoder.encode(following, False)
        assert [*first.token_ids, end, *second.token_ids, image, *second.token_ids] == whole


@pytest.mark.parametrize("kind", LLAMA_KINDS)
@pytest.mark.parametrize("text", RUNS)
def test_places_cover_the_text_in_order(kind, text):
    for encoder in (RunEncoder(llama(kind)), RunEncoder(byte_level())):
        run = encoder.encode(text, True)
        assert list(run.starts) == sorted(run.starts) and list(run.ends) == sorted(run.ends)
        covered = {place for start, end in zip(run.starts, run.ends, strict=True) for place in range(start, end)}
        assert covered == set(range(len(text)))


def test_markup_is_taken_apart_at_special_tokens():
    tokenizer = byte_level(special=("<|end|>", "<|end|>er"), stripping=("<|user|>",))
    encoder = RunEncoder(tokenizer)
    ids = {token: tokenizer.token_to_id(token) for token in ("<|user|>", "<|end|>", "<|end|>er")}
    assert encoder.split("<|user|>\nAsk<|end|><|end|>er") == (
        Special(ids["<|user|>"], strips_after=True),
        "\nAsk",
        Special(ids["<|end|>"]),
        Special(ids["<|end|>er"]),
    )
    assert encoder.split("") == () and encoder.split("<|en") == ("<|en",)


def test_written_special_tokens_are_text():
    tokenizer = llama("first")
    run = RunEncoder(tokenizer).encode("a</s><image><s>", False)
    ids = {tokenizer.token_to_id(token) for token in ("</s>", "<image>", "<s>")}
    assert ids.isdisjoint(run.token_ids)
    assert tokenizer.decode(list(run.token_ids)) == "a</s><image><s>"


def test_the_templates_tokens_are_special_whatever_the_tokenizer_says():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<end>", "<other>"])
    end, other = tokenizer.token_to_id("<end>"), tokenizer.token_to_id("<other>")
    encoder = RunEncoder(tokenizer, ["<end>"])
    assert encoder.split("<end>") == (Special(end),)
    run = encoder.encode("<end><other>", True)
    assert end not in run.token_ids and other in run.token_ids
