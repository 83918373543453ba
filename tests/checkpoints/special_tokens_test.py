"""Tokens that layouts add to a language model's tokenizer, by id."""

import dataclasses

import pytest
import tokenizers
from tokenizers import AddedToken, models

from phantom_jax.checkpoints.special_tokens import for_format, phantom_tokenizer
from phantom_jax.data.conversation import TEMPLATES
from phantom_jax.data.sentencepiece_model import make_tokenizer, parse
from phantom_jax.errors import InputError
from phantom_jax.processor import Processor
from tests.sentencepiece_files import train
from tests.tiny_tokenizers import byte_level, llama

NAMES = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def parent(size, added):
    """A vocabulary of so many tokens with added ones after it."""
    tokenizer = tokenizers.Tokenizer(models.BPE({f"t{number}": number for number in range(size)}, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


PARENTS = {
    "qwen2": (151643, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 151646),
    "internlm2": (92544, [], 92544),
    "phi3": (32000, ["<|endoftext|>", "<|assistant|>", *(f"<|{number}|>" for number in range(2, 11))], 32011),
}


@pytest.mark.parametrize("size, added, first", PARENTS.values(), ids=PARENTS.keys())
def test_phantoms_tokens_have_the_ids_that_are_published(size, added, first):
    tokenizer = parent(size, added)
    before = tokenizer.to_str()
    extended = phantom_tokenizer(tokenizer)
    assert [extended.token_to_id(token) for token in NAMES] == list(range(first, first + 9))
    assert all(extended.get_added_tokens_decoder()[first + number].special for number in range(9))
    assert tokenizer.to_str() == before
    assert phantom_tokenizer(extended).to_str() == extended.to_str()


def test_ids_in_use_are_never_given_again():
    # The quickstart's tokenizer has the first three.
    tokenizer = byte_level()
    extended = phantom_tokenizer(tokenizer)
    for token, token_id in tokenizer.get_vocab().items():
        assert extended.token_to_id(token) == token_id
    assert extended.token_to_id("<quad>") == tokenizer.get_vocab_size()
    with pytest.raises(InputError, match="gaps, and '<img>' got 2, which is in use"):
        phantom_tokenizer(tokenizers.Tokenizer(models.BPE({"a": 0, "b": 2}, [])))


@pytest.fixture(params=["trained", "first", "prepend"])
def original(request):
    """The processor of an original LLaVA."""
    kind = request.param
    tokenizer = make_tokenizer(parse(train())) if kind == "trained" else llama(kind, special=())
    template = dataclasses.replace(TEMPLATES["vicuna_v1"], image_token="<unk>")  # noqa: S106
    return Processor(tokenizer, template, 28, 1, 4, 4096, image_mode="pad")


def test_to_llava_hf_and_back(original):
    size = original.tokenizer.get_vocab_size()
    published = for_format(original, "llava-hf")
    assert published.template == TEMPLATES["vicuna_v1"]
    assert (published.image_token_id, published.pad_id) == (size, size + 1)
    assert published.tokenizer.get_vocab_size() == size + 2
    assert for_format(published, "llava-hf").tokenizer.to_str() == published.tokenizer.to_str()
    back = for_format(published, "llava-original")
    assert back.tokenizer.to_str() == original.tokenizer.to_str()
    for field in dataclasses.fields(Processor):
        if field.name != "tokenizer":
            assert getattr(back, field.name) == getattr(original, field.name)
    for layout in ("ours", "phantom", "llava-original"):
        assert for_format(original, layout) is original


def test_prompts_are_the_same_but_for_the_image(original):
    published = for_format(original, "llava-hf")
    turns = [("<image>\nWhat is the number?", "It is 482."), ("Why?", None)]
    ours, theirs = (one.encode_conversation(turns, [1]) for one in (original, published))
    text = ours.image_slots < 0
    assert (ours.image_slots == theirs.image_slots).all()
    assert (ours.token_ids[text] == theirs.token_ids[text]).all()
    assert (ours.token_ids[~text] == 0).all() and (theirs.token_ids[~text] == published.image_token_id).all()


def test_only_last_tokens_are_dropped(original):
    published = for_format(original, "llava-hf")
    published.tokenizer.add_special_tokens(["<more>"])
    back = for_format(published, "llava-original")
    assert back.tokenizer.get_vocab() == published.tokenizer.get_vocab()
    assert back.template.image_token == "<unk>"  # noqa: S105


def test_a_tokenizer_of_another_kind_makes_no_original_llava():
    tokenizer = byte_level(special=("<s>", "</s>", "<image>"))
    with pytest.raises(InputError, match="has no '<unk>', so it is no original LLaVA"):
        for_format(Processor(tokenizer, TEMPLATES["vicuna_v1"], 28, 1, 4, 4096), "llava-original")
